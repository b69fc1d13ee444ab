"""graph over owned constants  ->  one compiled callable, by Inductor with freezing

Freezing is what lets Inductor see constants as constants; since every weight was packed before, it
has nothing left to fold or re-pack, and the constants keep their identity: refreshed in place.
max_autotune stays off: its matmul templates copy the weight into a layout of their own at compile
time, where no refresh reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

SETTINGS: dict[str, Any] = {"freezing": True}


def compile_frozen(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile once; `example_inputs` may be fake and symbolic."""
    import torch._inductor.config as inductor
    from torch._inductor.compile_fx import compile_fx

    with torch.no_grad(), inductor.patch(SETTINGS):
        compiled: Callable[..., Any] = compile_fx(gm, list(example_inputs))  # type: ignore[assignment]
    return compiled
