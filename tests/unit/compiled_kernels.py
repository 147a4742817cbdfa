"""Compile the Triton kernels to machine code for GPUs that are not there: run by test_layouts.py."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from sparse_pass.kernels import mvue, sparsify

LAYOUTS = {80: ["sm80", "cutlass", "dense"], 86: ["sm80"], 89: ["sm80"], 90: ["sm90"], 100: ["dense"], 120: ["dense"]}
"""By compute capability, the layouts that its devices may read."""


class Driver:
    """Of a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target


def build(kernel: Any, pointers: list[str], constants: list[Any], warps: int, target: GPUTarget) -> None:
    """As `launch` has it: pointers, 32-bit numbers, constants."""
    names = kernel.arg_names
    numbers = len(names) - len(pointers) - len(constants)
    kinds = [*pointers, *["i32"] * numbers, *["constexpr"] * len(constants)]
    given = dict(zip(names[-len(constants) :], constants, strict=True))
    source = ASTSource(kernel, dict(zip(names, kinds, strict=True)), given, {})
    assert triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"]


if __name__ == "__main__":
    for capability, layouts in LAYOUTS.items():
        target = GPUTarget("cuda", capability, 32)
        driver.set_active(Driver(target))
        for layout in layouts:
            bounded = capability == 80
            weights = [tl.bfloat16, False, "gelu" if bounded else "none", bounded, True, True, 1.0, layout]
            build(sparsify._sparsify_kernel, ["*bf16", "*i32", "*i32", "*bf16"], weights, 4, target)
            out = "*bf16" if layout == "dense" else "*i32"
            build(
                mvue._mvue_kernel, ["*bf16", "*i64", out, "*fp32"], [tl.bfloat16, layout, bounded, bounded], 2, target
            )
    print("compiled")
