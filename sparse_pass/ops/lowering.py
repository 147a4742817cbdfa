"""What Inductor makes of the ops: calls of the kernels themselves, into buffers that Inductor plans.

An op of torch.library reaches its Python kernel through the dispatcher and its autograd layer, which takes longer
on the host than the launch. Compiled code has checked all that a call could get wrong when it was traced. Rows that
have to be padded are padded by Inductor. Where the kernels need more than a call (a device with another layout, rows
whose number is not known, a C++ wrapper) the op itself is called, as without this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.virtualized import V

from ..vocabulary import (
    FLOAT8,
    FLOAT8_CAPABILITY,
    KERNEL_DTYPES,
    KERNEL_TILE,
    PRODUCTS,
    Form,
    output_dtype,
    packed_numel,
    padded,
    row_multiple,
)
from . import cuda, lowering_float8
from . import definitions as _ops  # noqa: F401  (registers torch.ops.sparse_pass)

_sparse_ops = torch.ops.sparse_pass
aten = torch.ops.aten
_REFERENCES = "sparse_pass.ops.reference.compiled"
"""What compiled code calls on a CPU: there to test this file without a GPU."""
_PACKERS = {
    "sparsify": 2,
    "sparsify_one": 1,
    "sparsify_float8": 2,
    "sparsify_input": 2,
    "sparsify_mvue": 1,
    "sparsify_mvue_float8": 1,
    "sparsify_mvue_sum": 1,
}
"""Operators that pack, and how many matrices."""


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
    if V.graph.cpp_wrapper or device.type not in ("cpu", "cuda"):
        return None
    module = _REFERENCES if device.type == "cpu" else cuda.backend_of(device, dtype).compiled
    return module and f"{module}.{name}"


def _is_multiple(size: Any, of: int) -> bool:
    sizes = V.graph.sizevars
    return bool(sizes.statically_known_multiple_of(size, of) and sizes.statically_known_gt(size, 0))


def _up_to(rows: Any, multiple: int) -> Any:
    """A number of rows, rounded up; None if it is not known whether there are any or how many are missing."""
    if _is_multiple(rows, multiple):
        return rows
    is_number = isinstance(rows, int) or rows.is_Integer
    return padded(int(rows), multiple) if is_number and rows > 0 else None


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
    """A matrix of the device of ``like``, and of the dtype of what is multiplied in that of it."""
    layout = ir.FixedLayout(like.get_device(), output_dtype(like.get_dtype()), list(size), [size[1], 1])
    inputs = [_contiguous(x) for x in operands if x is not None]
    return ir.TensorBox.create(_Into(layout=layout, inputs=inputs, kwargs=kwargs, python_kernel_name=kernel))


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


def _lower_product(form: Form) -> Callable[..., Any]:
    spec = PRODUCTS[form]
    op = getattr(_sparse_ops, spec.op).default

    def lower(*args: Any, tuned: bool = False) -> Any:
        dense, packed, n, bias = spec.operands(*args)
        m, k = spec.dense_shape(*dense.get_size())
        sizes = {"m": m, "n": n, "k": k}
        kernel = None
        if dense.get_dtype() in (*KERNEL_DTYPES, FLOAT8):
            kernel = _kernel(f"{spec.op}_into", dense.get_device(), dense.get_dtype())
        rows = _up_to(sizes[spec.rows], spec.multiple(dense.get_dtype()))
        if rows != sizes[spec.rows] and (dense.get_dtype() == FLOAT8 or (spec.rows == "k" and spec.b_transposed)):
            kernel = None  # Triton does not pad in 8 bits, and columns are not padded here
        if kernel is None or rows is None or not (spec.rows == "m" or _is_multiple(m, row_multiple(dense.get_dtype()))):
            return _call_op(op, *args, tuned=tuned)
        sizes[spec.rows] = rows
        dense = _padded(dense, spec.dense_shape(sizes["m"], sizes["k"])[0])
        size = spec.output_shape(sizes["m"], sizes["n"])
        result = _into(kernel, dense, size, (dense, packed, bias), tuned=tuned)
        return _first(result, spec.output_shape(m, n)[0])

    return lower


def _lower_packer(name: str, count: int) -> Callable[..., Any]:
    op = getattr(_sparse_ops, name).default
    is_weight = any(argument.name == "dtype" for argument in op._schema.arguments)

    def lower(source: Any, *rest: Any, **kwargs: Any) -> Any:
        device = source.get_device()
        dtype = FLOAT8 if "float8" in name else kwargs.get("dtype") or source.get_dtype()
        kernel = _kernel(name, device, dtype)
        rows, cols = (_up_to(size, KERNEL_TILE) for size in source.get_size())
        if kernel is None or rows is None or cols is None or source.get_dtype() == torch.float64:
            return _call_op(op, source, *rest, **kwargs)
        layouts = [ir.FixedLayout(device, dtype, [packed_numel(rows, cols, dtype)], [1]) for _ in range(count)]
        if name == "sparsify_mvue_float8":
            sizes = source.get_size()
            layouts.append(ir.FixedLayout(device, dtype, sizes, [sizes[1], 1]))
        if name == "sparsify_mvue_sum":
            layouts.append(ir.FixedLayout(device, torch.float32, [rows // KERNEL_TILE, cols], [cols, 1]))
        # Tensors come first, and None in the place of one among the constants.
        inputs = [_stride1(x) for x in (source, *rest) if isinstance(x, ir.IRNode)]
        constants = [x for x in rest if not isinstance(x, ir.IRNode)]
        if is_weight:
            constants += [dtype, kwargs.get("scale", 1.0)]
        return _making(kernel, layouts, inputs, constants)

    return lower


def _lower_fused(name: str, lower: Callable[..., Any]) -> Callable[..., Any]:
    """Arithmetic of Inductor's own, where it has that of float8."""
    op = getattr(_sparse_ops, name).default

    def lower_or_call(tensor: Any, *rest: Any) -> Any:
        device = tensor.get_device()
        has_float8 = device.type == "cpu" or (
            torch.version.hip is None and torch.cuda.get_device_capability(device) >= FLOAT8_CAPABILITY
        )
        if not has_float8 or tensor.get_dtype() == torch.float64:
            return _call_op(op, tensor, *rest)
        return lower(tensor, *rest)

    return lower_or_call


@functools.cache
def register() -> None:
    """Tell Inductor, once in a process."""
    lowers = {spec.op: _lower_product(form) for form, spec in PRODUCTS.items()}
    lowers |= {name: _lower_packer(name, count) for name, count in _PACKERS.items()}
    lowers |= {
        "float8_scale": _lower_fused("float8_scale", lowering_float8.scale),
        "float8_inverse": _lower_fused("float8_inverse", lowering_float8.inverse),
        "quantize_float8": _lower_fused("quantize_float8", lowering_float8.quantize),
    }
    for name, lower in lowers.items():
        register_lowering(getattr(_sparse_ops, name).default, type_promotion_kind=None)(lower)
