"""How AOTAutograd sees quantizations on an absent GPU: the kernels themselves; prints them.

Run in a process of its own, without TRITON_INTERPRET.  Which arguments a kernel writes to, PyTorch
reads from the kernel's own intermediate code, which needs to know a GPU.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._functorch.aot_autograd import aot_export_module  # noqa: TID251 - what Inductor calls
from torch._subclasses import FakeTensorMode  # noqa: TID251
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import mpq_fx.kernels.quantize.triton
import mpq_fx.kernels.quantize.triton_norm  # noqa: F401 - registers the ops

mpq_triton = torch.ops.mpq_triton


class Offline:
    """A driver that knows its GPU, and nothing else."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Quantizations(nn.Module):
    def forward(self, x, scale, zero):
        static = mpq_triton.quantize(x, scale, zero, "uint8_tensor")
        dynamic = mpq_triton.quantize_dynamic(x, "int8")
        gated = mpq_triton.activation_quantize_dynamic(x, x, "silu", "int8_g128")
        norm = mpq_triton.norm_quantize_dynamic(x, None, None, 1e-5, True, "int8")
        return static, *dynamic, *gated, *norm


def main() -> None:
    driver.set_active(Offline())
    with FakeTensorMode(), torch.no_grad():
        x, scale = torch.empty(4, 300, device="cuda"), torch.empty((), device="cuda")
        zero = torch.empty((), dtype=torch.int32, device="cuda")
        gm, _ = aot_export_module(Quantizations(), [x, scale, zero], trace_joint=False)
    for node in gm.graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.triton_kernel_wrapper_functional
    ):
        print(" ".join(sorted(node.kwargs["tensors_to_clone"])))


if __name__ == "__main__":
    main()
