"""graph over owned constants  ->  one compiled callable, by Inductor with freezing

Freezing is what lets Inductor see constants as constants; since every weight was packed before, it
has nothing left to fold or re-pack, and the constants keep their identity: refreshed in place.
A thorough compilation also uses the C++ matmul templates, which take longer to build and save the
fixed cost of a call into oneDNN; what they derive from a weight is redone after a refresh.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from mpq_fx.passes.lower.gemm_templates import recording
from mpq_fx.passes.lower.target import Compiled

log = logging.getLogger("mpq_fx")
QUICK: dict[str, Any] = {"freezing": True}
THOROUGH: dict[str, Any] = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP",  # no timing of single ops: whole graphs are raced instead
}


def compile_frozen(gm: GraphModule, example_inputs: Sequence[Any], thorough: bool) -> Compiled:
    """Compile once; `example_inputs` may be fake and symbolic."""
    import torch._inductor.config as inductor
    from torch._inductor.compile_fx import compile_fx

    settings = THOROUGH if thorough else QUICK
    with torch.no_grad(), inductor.patch(settings), recording() as derived:
        run: Callable[..., Any] = compile_fx(gm, list(example_inputs))  # type: ignore[assignment]
    return Compiled(run, tuple(derived))
