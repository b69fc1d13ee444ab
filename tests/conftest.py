"""One thread, fixed seeds, no user cache; a marker says what a test needs."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import sys
from textwrap import dedent

# Before torch is imported, and for the processes that tests start: one thread, so that sums do not
# depend on the machine, and compilation in the process itself, so that no worker outlives a test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Without a GPU Triton's kernels run in its interpreter.  Triton reads this when kernels are
# defined, which importing torch may do: so the driver's own tool is asked, and not torch.
if shutil.which("nvidia-smi") is None and not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import numpy as np
import pytest
import torch

from mpq_fx import plugins

hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("fixed")

NEEDS = {
    "gpu": (torch.cuda.is_available, "no NVIDIA GPU"),
    "onednn": (torch.backends.mkldnn.is_available, "this PyTorch has no oneDNN"),
    "tensorrt": (lambda: importlib.util.find_spec("torch_tensorrt"), "torch_tensorrt is absent"),
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, (is_there, reason) in NEEDS.items():
        if item.get_closest_marker(marker) and not is_there():
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Measured latencies go to a folder of this run, never to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def isolated():
    """Nothing that Dynamo compiled or counted before this test is visible in it, nor after it."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # noqa: TID251 -- reset() keeps them
    yield
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # noqa: TID251


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A distribution as pip leaves it: a module, METADATA and entry_points.txt on sys.path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = []

    def write(package: str, code: str, **groups: str) -> None:
        (tmp_path / f"{package}.py").write_text(
            "from __future__ import annotations\n" + dedent(code)
        )
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"[mpq_fx.{group}]\n{line}\n" for group, line in groups.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        modules.append(package)
        plugins.forget()

    yield write
    for module in modules:
        sys.modules.pop(module, None)
    monkeypatch.undo()
    plugins.forget()
