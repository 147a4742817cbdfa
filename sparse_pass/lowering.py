"""What Inductor makes of the ops: calls of the kernels themselves, into buffers that Inductor plans.

An op of torch.library reaches its Python kernel through the dispatcher and its autograd layer, which takes longer
on the host than the launch. Compiled code has checked all that a call could get wrong when it was traced. Where the
kernels need more than a call (a device with another layout, a number of rows that has to be padded, a C++ wrapper)
the op itself is called, as without this file.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.virtualized import V

from . import cuda_ops
from . import ops as _ops  # noqa: F401  (registers torch.ops.sparse_pass)

_SPARSIFY = torch.ops.sparse_pass.sparsify.default
_LINEAR = torch.ops.sparse_pass.linear.default
# Where compiled code finds `sparsify` and `linear_into`. The reference is there to test this file without a GPU.
_MODULES = {"cuda": "sparse_pass.kernels.compiled", "cpu": "sparse_pass.reference"}
_ROWS = 8
"""The kernels take a multiple of as many rows."""


def _import_into(wrapper: Any, kernel: ir.ExternKernel) -> None:
    # In the code itself and not in a registry: code from a compile cache runs where nothing was lowered.
    wrapper.add_import_once(f"import {kernel.get_kernel_name().rpartition('.')[0]}")


class _Linear(ir.ExternKernelOut):
    def codegen(self, wrapper: Any) -> None:
        _import_into(wrapper, self)
        super().codegen(wrapper)


class _Sparsify(ir.ExternKernelAlloc):
    def codegen(self, wrapper: Any) -> None:
        _import_into(wrapper, self)
        super().codegen(wrapper)


def _direct(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels of the device can be called directly."""
    if V.graph.cpp_wrapper or device.type not in _MODULES:
        return False
    return device.type == "cpu" or cuda_ops.is_sm90_layout(device, dtype)


def _lower_linear(input: Any, packed: Any, bias: Any, out_features: Any, *, tuned: bool = False) -> Any:
    device, dtype = input.get_device(), input.get_dtype()
    rows, features = input.get_size()[0], out_features
    sizes = V.graph.sizevars
    fits = sizes.statically_known_multiple_of(rows, _ROWS) and sizes.statically_known_gt(rows, 0)
    if not fits or not _direct(device, dtype):
        return fallback_handler(_LINEAR, add_to_fallback_set=False)(input, packed, bias, out_features, tuned=tuned)
    operands = [
        ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))
        for x in (input, packed, bias)
        if x is not None
    ]
    return ir.TensorBox.create(
        _Linear(
            layout=ir.FixedLayout(device, dtype, [rows, features], [features, 1]),
            inputs=operands,
            kwargs={"tuned": tuned},
            python_kernel_name=f"{_MODULES[device.type]}.linear_into",
        )
    )


def _lower_sparsify(weight: Any, mask: str, *, dtype: torch.dtype | None = None) -> Any:
    device, packed_dtype = weight.get_device(), dtype or weight.get_dtype()
    if weight.get_dtype() == torch.float64 or not _direct(device, packed_dtype):
        return fallback_handler(_SPARSIFY, add_to_fallback_set=False)(weight, mask, dtype=dtype)
    n, k = weight.get_size()
    both = _Sparsify(
        layout=ir.MultiOutputLayout(device=device),
        inputs=[ir.ExternKernel.require_stride1(ir.ExternKernel.realize_input(weight))],
        constant_args=[mask, packed_dtype],
        python_kernel_name=f"{_MODULES[device.type]}.sparsify",
    )
    layout = ir.FixedLayout(device, packed_dtype, [n * k * 9 // 16], [1])
    results = [ir.MultiOutput(layout, both, [(tuple, place)]) for place in range(2)]
    both.outputs = results
    return tuple(ir.TensorBox.create(one) for one in results)


@functools.cache
def register() -> None:
    """Tell Inductor, once in a process."""
    register_lowering(_LINEAR, type_promotion_kind=None)(_lower_linear)
    register_lowering(_SPARSIFY, type_promotion_kind=None)(_lower_sparsify)
