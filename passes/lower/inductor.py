"""graph over owned constants  ->  one compiled callable, by Inductor with freezing

Freezing is what lets Inductor see constants as constants; since every weight was packed before, it
has nothing left to fold or re-pack, and the constants keep their identity: refreshed in place.
The slower modes also use the C++ matmul templates, which save the fixed cost of a call into oneDNN
and fuse what follows; what they derive from a weight is redone after a refresh.  At last the
kernels may be called from C++ instead of Python, which saves a few microseconds each.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx import GraphModule

from mpq_fx.passes.lower.gemm_templates import recording
from mpq_fx.passes.lower.target import Compiled

log = logging.getLogger("mpq_fx")
# Weights that Inductor joins are constants of its own, which no refresh would reach.
FROZEN: dict[str, Any] = {"freezing": True, "cpp.enable_concat_linear": False}
TEMPLATES: dict[str, Any] = {
    **FROZEN,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",  # not timed by op: whole graphs are raced instead
}
INT8, ALL, WRAPPER = "int8 templates", "templates", "C++ wrapper"
OPERANDS = {  # mode -> dtypes of activations whose matmuls become templates
    INT8: frozenset({torch.uint8, torch.int8}),
    ALL: frozenset({torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32}),
}


KERNELS_PER_SITE = 2  # a site and what is fused around it
SAVED = 0.004  # ms of one call of a kernel, from Python and from C++
LEAST = 0.02  # share of a call that has to be saved


def finishing(mode: str, sites: int, ms: float) -> tuple[str, ...]:
    """The mode with its kernels called from C++, where calling them takes a share of `ms`."""
    if mode.endswith(WRAPPER):
        return ()
    saved = SAVED * KERNELS_PER_SITE * sites
    return (f"{mode}, {WRAPPER}".removeprefix(", "),) if saved > LEAST * ms else ()


def kernels_of(mode: str) -> str:
    """The mode without its wrapper: which matmuls are templates."""
    return mode.removesuffix(WRAPPER).removesuffix(", ")


def compile_frozen(gm: GraphModule, example_inputs: Sequence[Any], mode: str) -> Compiled:
    """Compile once; `example_inputs` may be fake and symbolic."""
    import torch._inductor.config as inductor
    from torch._inductor.compile_fx import compile_fx

    kernels = kernels_of(mode)
    # The wrapper in C++ takes a size that is an input for None (torch 2.13); it only saves time.
    is_wrapped = mode.endswith(WRAPPER) and all(isinstance(x, Tensor) for x in example_inputs)
    settings = {**(TEMPLATES if kernels else FROZEN), "cpp_wrapper": is_wrapped}
    dtypes = OPERANDS.get(kernels, frozenset())
    with (
        torch.no_grad(),
        inductor.patch(settings),
        adding_in_place(),
        unlisted(),
        recording(dtypes) as derived,
    ):
        run: Callable[..., Any] = compile_fx(gm, list(example_inputs))  # type: ignore[assignment]
    return Compiled(run, tuple(derived))


def adding_in_place() -> AbstractContextManager[Any]:
    """Lets an integer matmul add into every operand that the lowering allowed it to overwrite.

    Other sums beside one are hidden (`sums`), so it is asked for no other.  Into a view, as the
    pixels of a convolution are one, Inductor would not; it would take the operand's codes for
    numbers instead, without their scale (torch 2.13).
    """
    from torch._inductor.fx_passes import mkldnn_fusion

    return patch.object(mkldnn_fusion, "_qlinear_binary_can_be_inplace", lambda other: True)


@contextmanager
def unlisted() -> Iterator[None]:
    """What Inductor loads inside lives as long as the compiled graph, and no longer.

    It sets the constants of a graph on the module of its code, and lists every module until the
    process ends (torch 2.13): so the packed weights of each plan that lost a race, and of each
    model that is gone, would stay in memory.
    """
    from torch._inductor.codecache import PyCodeCache

    known = {id(module) for module in PyCodeCache.modules}
    try:
        yield
    finally:
        without_constants = {id(module) for module in PyCodeCache.modules_no_attr.values()}
        for module in [m for m in PyCodeCache.modules if id(m) not in known | without_constants]:
            PyCodeCache.modules.remove(module)
            if sys.modules.get(module.__name__) is module:
                del sys.modules[module.__name__]
