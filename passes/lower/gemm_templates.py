"""Inductor's C++ matmul templates, kept refreshable: what they derive from a constant can be redone

A template copies a packed weight into the blocking of its own kernel, and sums its rows for zero
points, once, while compiling.  `recording` notes each such copy, so that after a weight was edited
and its constant refreshed, the copy can be made again, in place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

Redo = Callable[[], None]


@dataclass
class _Choice:
    """The operands of the template that is being instantiated."""

    weight: str = ""
    nodes: list[str] = field(default_factory=list)
    is_transposed: bool = False


@contextmanager
def recording(dtypes: Collection[torch.dtype]) -> Iterator[list[Redo]]:
    """Collects, while Inductor compiles, one callable per derived constant.

    Matmuls whose activation is not of one of `dtypes` stay calls into oneDNN.
    """
    from torch._inductor.codegen.common import KernelTemplate
    from torch._inductor.codegen.cpp_gemm_template import CppGemmTemplate as Template
    from torch._inductor.select_algorithm import get_algorithm_selector_cache

    found: list[Redo] = []
    choice = _Choice()
    add = Template.__dict__["add_choices"].__func__
    pack = Template.__dict__["prep_weight"].__func__
    parse = KernelTemplate._template_from_string
    selector = get_algorithm_selector_cache()
    filters = [*selector.preprocessing_fns, templates_alone]
    with (
        patch.object(selector, "preprocessing_fns", filters),
        patch.object(Template, "add_choices", classmethod(_noting(choice, add, dtypes))),
        patch.object(Template, "prep_weight", classmethod(_collecting(choice, pack, found))),
        # Inductor parses the same templates again for every matmul: a third of the time.
        patch.object(KernelTemplate, "_template_from_string", staticmethod(cache(parse))),
    ):
        yield found


def _noting(
    choice: _Choice, add: Callable[..., Any], dtypes: Collection[torch.dtype]
) -> Callable[..., Any]:
    """add_choices that notes which operand is the weight, and adds none for other dtypes, where a
    callee is as good, or for the product of two activations: the template would pack one of them
    in every call, and fails on some sums behind a batch of them (torch 2.13).
    """
    from torch._inductor.virtualized import V

    def add_choices(
        cls: Any, choices: Any, layout: Any, input_nodes: Sequence[Any], *args: Any, **kwargs: Any
    ) -> Any:
        order = kwargs.get("input_indices") or list(range(len(input_nodes)))
        first = 1 if kwargs.get("has_bias") else 0
        x, weight = (input_nodes[order[k]] for k in (first, first + 1))
        if (
            weight.get_name() not in V.graph.constants
            or x.get_dtype() not in dtypes
            or overruns(x.get_dtype(), kwargs)
            or not layout.dtype.is_floating_point  # its scale would be part of the code
            or is_weight_only(x.get_dtype(), weight.get_dtype())
        ):
            return None
        choice.weight = weight.get_name()
        choice.nodes = [node.get_name() for node in input_nodes]
        choice.is_transposed = kwargs.get("trans_w", False)
        return add(cls, choices, layout, input_nodes, *args, **kwargs)

    return add_choices


def templates_alone(choices: list[Any]) -> list[Any]:
    """The templates where there are some, else the callees: nothing is left to be timed."""
    from torch._inductor.select_algorithm import ExternKernelCaller

    return [c for c in choices if not isinstance(c, ExternKernelCaller)] or choices


def is_weight_only(x: torch.dtype, weight: torch.dtype) -> bool:
    """Floats times codes: for the few rows where that pays, PyTorch's own kernels are as good."""
    return x.is_floating_point and not weight.is_floating_point


def overruns(dtype: torch.dtype, settings: Mapping[str, Any]) -> bool:
    """Would the template write beyond its result?

    Of a float matmul with a bias and an activation inside, torch 2.13 also stores what lies between
    the two, in the template's dtype, into the result; which is too small for that once a
    quantization was fused behind.
    """
    has_activation = settings.get("epilogue_creator") is not None
    return dtype.is_floating_point and has_activation and bool(settings.get("has_bias"))


def _collecting(choice: _Choice, pack: Callable[..., Any], found: list[Redo]) -> Callable[..., Any]:
    """prep_weight that keeps how the copy which will run was made."""

    def prep_weight(  # noqa: PLR0913 - the signature of the method it stands for
        cls: Any,
        inputs: Any,
        layout: Any,
        micro_gemm: Any,
        block: bool,
        fast: bool = False,
        skip_int8_compensation: bool = False,
    ) -> Any:
        result = pack(cls, inputs, layout, micro_gemm, block, fast, skip_int8_compensation)
        if skip_int8_compensation and isinstance(inputs[1], Tensor):

            def again(weight: Tensor) -> Tensor:
                return pack(cls, [None, weight], None, micro_gemm, block, False, True)[0][1]

            found.append(_redo(choice, again, result[0][1]))
        return result

    return prep_weight


def _redo(choice: _Choice, pack: Callable[[Tensor], Tensor], packed: Tensor) -> Redo:
    """packed ← pack(weight); row sums · zero point · scales likewise, where there are some."""
    from torch._inductor.virtualized import V

    constants = V.graph.constants
    source, is_transposed = constants[choice.weight], choice.is_transposed
    sums = constants.get(choice.weight + "_BMatrixCompens")
    factors = constants.get(choice.weight + "_x_w_compens")
    names = [*choice.nodes[1:3], *choice.nodes[4:5]]

    def redo() -> None:
        weight = source.to_dense() if source.is_mkldnn else source
        weight = weight.t() if is_transposed else weight
        packed.copy_(pack(weight))
        scale: Tensor | float = 1.0
        if factors is not None:
            x_scale, zero, w_scale = (constants[name] for name in names)
            scale = torch.mul(x_scale, w_scale, out=factors) * zero
        if sums is not None:
            sums.copy_(weight.float().sum(0) * scale)

    return redo
