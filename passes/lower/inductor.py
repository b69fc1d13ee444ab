"""graph over owned constants  ->  one compiled callable, by Inductor with freezing

Freezing is what lets Inductor see constants as constants; since every weight was packed before, it
has nothing left to fold or re-pack, and the constants keep their identity: refreshed in place.
The slower modes also use the C++ matmul templates, which save the fixed cost of a call into oneDNN
and fuse what follows; what they derive from a weight is redone after a refresh.
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
# Weights that Inductor joins are constants of its own, which no refresh would reach.
FROZEN: dict[str, Any] = {"freezing": True, "cpp.enable_concat_linear": False}
TEMPLATES: dict[str, Any] = {
    **FROZEN,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP",  # no timing of single ops: whole graphs are raced instead
}
INT8, ALL = "int8 templates", "templates"
OPERANDS = {  # mode -> dtypes of activations whose matmuls become templates
    INT8: frozenset({torch.uint8, torch.int8}),
    ALL: frozenset({torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32}),
}


def compile_frozen(gm: GraphModule, example_inputs: Sequence[Any], mode: str) -> Compiled:
    """Compile once; `example_inputs` may be fake and symbolic."""
    import torch._inductor.config as inductor
    from torch._inductor.compile_fx import compile_fx

    settings = TEMPLATES if mode else FROZEN
    dtypes = OPERANDS.get(mode, frozenset())
    with torch.no_grad(), inductor.patch(settings), recording(dtypes) as derived:
        run: Callable[..., Any] = compile_fx(gm, list(example_inputs))  # type: ignore[assignment]
    return Compiled(run, tuple(derived))
