"""What Inductor makes of the ops: calls of the kernels themselves, into buffers that Inductor plans.

An op of torch.library reaches its Python kernel through the dispatcher and its autograd layer, which takes longer
on the host than the launch. Compiled code has checked all that a call could get wrong when it was traced. Rows that
have to be padded are padded by Inductor. Where the kernels need more than a call (a device with another layout, rows
whose number is not known, a C++ wrapper) the op itself is called, as without this file.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.virtualized import V

from . import cuda_ops, reference
from . import grad_ops as _grad_ops  # noqa: F401  (registers torch.ops.sparse_pass)
from . import input_ops as _input_ops  # noqa: F401
from . import ops as _ops  # noqa: F401

_sparse_ops = torch.ops.sparse_pass
aten = torch.ops.aten
# Where compiled code finds the kernels. The references are there to test this file without a GPU.
_KERNELS = "sparse_pass.kernels.compiled"
_REFERENCES = {
    "sparsify": "sparse_pass.reference",
    "sparsify_one": "sparse_pass.reference",
    "linear_into": "sparse_pass.reference",
    "sparsify_mvue": "sparse_pass.reference_mvue",
    "sparsify_mvue_sum": "sparse_pass.reference_mvue",
    "grad_weight_into": "sparse_pass.reference_mvue",
    "sparsify_input": "sparse_pass.reference_activation",
    "input_linear_into": "sparse_pass.reference_activation",
    "input_grad_weight_into": "sparse_pass.reference_activation",
}
_MULTIPLE = 8
"""What the library takes multiples of, of rows in `linear` and of the features of a dense operand elsewhere."""
_TILE_ROWS = reference.TILE
"""What the kernels that pack rows, or contract over them, pad rows to."""


def _import_into(wrapper: Any, kernel: ir.ExternKernel) -> None:
    # In the code itself and not in a registry: code from a compile cache runs where nothing was lowered.
    wrapper.add_import_once(f"import {kernel.get_kernel_name().rpartition('.')[0]}")


class _Into(ir.ExternKernelOut):
    """A kernel that writes into a given buffer."""

    def codegen(self, wrapper: Any) -> None:
        _import_into(wrapper, self)
        super().codegen(wrapper)


class _Making(ir.ExternKernelAlloc):
    """A kernel that makes its results itself."""

    def codegen(self, wrapper: Any) -> None:
        _import_into(wrapper, self)
        super().codegen(wrapper)


def _kernel(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Where compiled code finds a kernel, or None if it has to call the op."""
    if V.graph.cpp_wrapper:
        return None
    if device.type == "cpu":
        return f"{_REFERENCES[name]}.{name}"
    return f"{_KERNELS}.{name}" if device.type == "cuda" and cuda_ops.is_sm90_layout(device, dtype) else None


def _is_multiple(size: Any, of: int) -> bool:
    sizes = V.graph.sizevars
    return bool(sizes.statically_known_multiple_of(size, of) and sizes.statically_known_gt(size, 0))


def _up_to(rows: Any, multiple: int) -> Any:
    """A number of rows, rounded up; None if it is not known whether there are any or how many are missing."""
    if _is_multiple(rows, multiple):
        return rows
    is_number = isinstance(rows, int) or rows.is_Integer
    return reference.padded(int(rows), multiple) if is_number and rows > 0 else None


def _padded(x: Any, rows: Any) -> Any:
    """With rows of zeros up to so many, made once for all that read it. By Inductor: one kernel, or a part of the one
    that makes x."""
    missing = rows - x.get_size()[0]
    if missing == 0:
        return x
    made = vars(V.graph).setdefault("sparse_pass_padded", {})
    if (id(x), rows) not in made:  # with x, so that its id stays its own
        made[id(x), rows] = lowerings[aten.constant_pad_nd.default](x, [0, 0, 0, int(missing)], 0.0), x
    return made[id(x), rows][0]


def _first(x: Any, rows: Any) -> Any:
    """The first so many rows: a view, so that an output of the graph keeps the memory of whole tiles."""
    return x if rows == x.get_size()[0] else lowerings[aten.slice.Tensor](x, 0, 0, rows)


def _call_op(op: Any, *args: Any, **kwargs: Any) -> Any:
    return fallback_handler(op, add_to_fallback_set=False)(*args, **kwargs)


def _contiguous(x: Any) -> Any:
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))


def _stride1(x: Any) -> Any:
    return ir.ExternKernel.require_stride1(ir.ExternKernel.realize_input(x))


def _into(kernel: str, like: Any, size: Sequence[Any], operands: Sequence[Any], **kwargs: Any) -> Any:
    """A matrix of the device and dtype of ``like``."""
    layout = ir.FixedLayout(like.get_device(), like.get_dtype(), list(size), [size[1], 1])
    inputs = [_contiguous(x) for x in operands if x is not None]
    return ir.TensorBox.create(_Into(layout=layout, inputs=inputs, kwargs=kwargs, python_kernel_name=kernel))


def _packed(device: torch.device, dtype: torch.dtype, numel: Any) -> Any:
    return ir.FixedLayout(device, dtype, [numel], [1])


def _making(kernel: str, layouts: Sequence[Any], inputs: Any, constants: Any = ()) -> Any:
    """What a kernel makes of these layouts; as a tuple if there are several."""
    all_ = _Making(
        layout=ir.MultiOutputLayout(device=layouts[0].device),
        inputs=inputs,
        constant_args=list(constants),
        python_kernel_name=kernel,
    )
    places = [[(tuple, place)] for place in range(len(layouts))] if len(layouts) > 1 else [[]]
    results = [ir.MultiOutput(layout, all_, place) for layout, place in zip(layouts, places, strict=True)]
    all_.outputs = results
    boxes = tuple(ir.TensorBox.create(one) for one in results)
    return boxes if len(boxes) > 1 else boxes[0]


def _lower_linear(input: Any, packed: Any, bias: Any, out_features: Any, *, tuned: bool = False) -> Any:
    rows = input.get_size()[0]
    kernel = _kernel("linear_into", input.get_device(), input.get_dtype())
    padded = _up_to(rows, _MULTIPLE)
    if kernel is None or padded is None:
        return _call_op(_sparse_ops.linear.default, input, packed, bias, out_features, tuned=tuned)
    operands = _padded(input, padded), packed, bias
    return _first(_into(kernel, input, [padded, out_features], operands, tuned=tuned), rows)


def _lower_sparsify(weight: Any, mask: str, *, dtype: torch.dtype | None = None) -> Any:
    device, packed_dtype = weight.get_device(), dtype or weight.get_dtype()
    kernel = _kernel("sparsify", device, packed_dtype)
    if kernel is None or weight.get_dtype() == torch.float64:
        return _call_op(_sparse_ops.sparsify.default, weight, mask, dtype=dtype)
    n, k = weight.get_size()
    inputs = [_stride1(weight)]
    layouts = [_packed(device, packed_dtype, n * k * 9 // 16) for _ in range(2)]
    return _making(kernel, layouts, inputs, (mask, packed_dtype))


def _lower_sparsify_one(weight: Any, mask: str, transposed: bool, *, dtype: torch.dtype | None = None) -> Any:
    device, packed_dtype = weight.get_device(), dtype or weight.get_dtype()
    kernel = _kernel("sparsify_one", device, packed_dtype)
    if kernel is None or weight.get_dtype() == torch.float64:
        return _call_op(_sparse_ops.sparsify_one.default, weight, mask, transposed, dtype=dtype)
    n, k = weight.get_size()
    layouts = [_packed(device, packed_dtype, n * k * 9 // 16)]
    return _making(kernel, layouts, [_stride1(weight)], (mask, transposed, packed_dtype))


def _lower_sparsify_mvue(grad: Any, seed: Any) -> Any:
    device, dtype = grad.get_device(), grad.get_dtype()
    kernel = _kernel("sparsify_mvue", device, dtype)
    rows, cols = _up_to(grad.get_size()[0], _TILE_ROWS), grad.get_size()[1]
    if kernel is None or rows is None:
        return _call_op(_sparse_ops.sparsify_mvue.default, grad, seed)
    inputs = [_stride1(grad), ir.ExternKernel.realize_input(seed)]
    return _making(kernel, [_packed(device, dtype, rows * cols * 9 // 16)], inputs)


def _lower_sparsify_mvue_sum(grad: Any, seed: Any) -> Any:
    device, dtype = grad.get_device(), grad.get_dtype()
    kernel = _kernel("sparsify_mvue_sum", device, dtype)
    rows, cols = _up_to(grad.get_size()[0], _TILE_ROWS), grad.get_size()[1]
    if kernel is None or rows is None:
        return _call_op(_sparse_ops.sparsify_mvue_sum.default, grad, seed)
    sums = ir.FixedLayout(device, torch.float32, [rows // _TILE_ROWS, cols], [cols, 1])
    inputs = [_stride1(grad), ir.ExternKernel.realize_input(seed)]
    return _making(kernel, [_packed(device, dtype, rows * cols * 9 // 16), sums], inputs)


def _lower_grad_weight(packed: Any, input: Any, out_features: Any, *, tuned: bool = False) -> Any:
    rows, cols = input.get_size()
    kernel = _kernel("grad_weight_into", input.get_device(), input.get_dtype())
    padded = _up_to(rows, _TILE_ROWS)
    if kernel is None or padded is None or not _is_multiple(cols, _MULTIPLE):
        return _call_op(_sparse_ops.grad_weight.default, packed, input, out_features, tuned=tuned)
    return _into(kernel, input, [out_features, cols], (packed, _padded(input, padded)), tuned=tuned)


def _lower_sparsify_input(input: Any, gate: Any, mask: str, activation: str) -> Any:
    device, dtype = input.get_device(), input.get_dtype()
    kernel = _kernel("sparsify_input", device, dtype)
    rows, cols = _up_to(input.get_size()[0], _TILE_ROWS), input.get_size()[1]
    if kernel is None or rows is None:
        return _call_op(_sparse_ops.sparsify_input.default, input, gate, mask, activation)
    # The gate comes second, or None does.
    inputs = [_stride1(x) for x in (input, gate) if x is not None]
    constants = (mask, activation) if gate is not None else (None, mask, activation)
    return _making(kernel, [_packed(device, dtype, rows * cols * 9 // 16) for _ in range(2)], inputs, constants)


def _lower_input_linear(packed: Any, weight: Any, rows: Any, *, tuned: bool = False) -> Any:
    out_features = weight.get_size()[0]
    kernel = _kernel("input_linear_into", weight.get_device(), weight.get_dtype())
    padded = _up_to(rows, _TILE_ROWS)
    if kernel is None or padded is None or not _is_multiple(out_features, _MULTIPLE):
        return _call_op(_sparse_ops.input_linear.default, packed, weight, rows, tuned=tuned)
    return _first(_into(kernel, weight, [padded, out_features], (packed, weight), tuned=tuned), rows)


def _lower_input_grad_weight(packed_t: Any, grad_output: Any, in_features: Any, *, tuned: bool = False) -> Any:
    rows, out_features = grad_output.get_size()
    kernel = _kernel("input_grad_weight_into", grad_output.get_device(), grad_output.get_dtype())
    padded = _up_to(rows, _TILE_ROWS)
    if kernel is None or padded is None or not _is_multiple(out_features, _MULTIPLE):
        return _call_op(_sparse_ops.input_grad_weight.default, packed_t, grad_output, in_features, tuned=tuned)
    operands = packed_t, _padded(grad_output, padded)
    return _into(kernel, grad_output, [out_features, in_features], operands, tuned=tuned)


@functools.cache
def register() -> None:
    """Tell Inductor, once in a process."""
    for op, lower in (
        (_sparse_ops.linear, _lower_linear),
        (_sparse_ops.sparsify, _lower_sparsify),
        (_sparse_ops.sparsify_one, _lower_sparsify_one),
        (_sparse_ops.sparsify_mvue, _lower_sparsify_mvue),
        (_sparse_ops.sparsify_mvue_sum, _lower_sparsify_mvue_sum),
        (_sparse_ops.grad_weight, _lower_grad_weight),
        (_sparse_ops.sparsify_input, _lower_sparsify_input),
        (_sparse_ops.input_linear, _lower_input_linear),
        (_sparse_ops.input_grad_weight, _lower_input_grad_weight),
    ):
        register_lowering(op.default, type_promotion_kind=None)(lower)
