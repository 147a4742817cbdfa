"""What the operators refuse, by ValueErrors of one sentence with the shape, the rule and the remedy.

Each function takes the arguments of its operator. Fakes ask them too, so that a graph with a wrong call fails while it
is traced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..vocabulary import FLOAT8, KERNEL_DTYPES, KERNEL_TILE, MASKS, PRODUCTS, TILE, Form, packed_numel
from .reference import inputs


def mask24(weight: Tensor, mask: str) -> None:
    _compared(weight, "weight", mask, MASKS)
    _matrix(weight, TILE, "pad the weight with zeros or leave the layer dense")


def input_mask24(input: Tensor, mask: str) -> None:
    _compared(input, "input", mask, inputs.MASKS)
    if input.dim() == 0 or input.shape[-1] % TILE:
        raise ValueError(
            f"a 2:4 input must be [..., K] with K a multiple of 4, not {list(input.shape)}; leave it dense"
        )


def sparsify_float8(weight: Tensor, scale: Tensor, mask: str, factor: float = 1.0) -> None:
    sparsify(weight, mask, dtype=KERNEL_DTYPES[0])
    round_float8(weight, scale)


def float8_scale(tensor: Tensor, factor: float = 1.0) -> None:
    if not _is_compared(tensor):
        raise ValueError(f"a float8 scale is of float16, bfloat16, float32 or float64, not {tensor.dtype}")
    if any(isinstance(size, int) and size == 0 for size in tensor.shape):
        raise ValueError(f"an empty tensor {list(tensor.shape)} has no largest magnitude; leave it as it is")


def float8_inverse(scale: Tensor, other: Tensor) -> None:
    for one in (scale, other):
        if one.dtype != torch.float32 or one.dim() != 0 or one.device != scale.device:
            raise ValueError(f"a scale is one float32 without dims, not {one.dtype} {list(one.shape)} on {one.device}")


def round_float8(tensor: Tensor, scale: Tensor) -> None:
    if not _is_compared(tensor):
        raise ValueError(f"float16, bfloat16, float32 or float64 is rounded to float8, not {tensor.dtype}")
    if scale.dtype != torch.float32 or scale.dim() != 0 or scale.device != tensor.device:
        raise ValueError(
            f"scale is {scale.dtype} {list(scale.shape)} on {scale.device}; it must be one float32 without dims on"
            f" {tensor.device}, as float8_scale gives it"
        )


def sparsify(weight: Tensor, mask: str, *, dtype: torch.dtype | None = None, scale: float = 1.0) -> None:
    mask24(weight, mask)
    _matrix(weight, KERNEL_TILE, "use the masked dense weight, weight * mask24(weight)")
    if weight.numel() == 0:
        raise ValueError(f"an empty weight {list(weight.shape)} has nothing to pack; leave the layer dense")
    packed_dtype = dtype or weight.dtype
    if packed_dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"packed 2:4 values are float16 or bfloat16, not {packed_dtype}; pass dtype=torch.bfloat16 or use the "
            "masked dense weight, weight * mask24(weight)"
        )


def sparsify_one(
    weight: Tensor, mask: str, transposed: bool, *, dtype: torch.dtype | None = None, scale: float = 1.0
) -> None:
    sparsify(weight, mask, dtype=dtype, scale=scale)


def sparsify_input(input: Tensor, gate: Tensor | None, mask: str, activation: str) -> None:
    if mask not in MASKS:
        raise ValueError(f"mask={mask!r} cannot be packed both ways; choose one of {', '.join(MASKS)}")
    if activation not in inputs.ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; choose one of {', '.join(inputs.ACTIVATIONS)}")
    if (gate is not None) != (activation in inputs.GATED):
        raise ValueError(f"activation={activation!r} {'has no' if gate is not None else 'needs a'} gate")
    for what, tensor in (("input", input), ("gate", gate)):
        if tensor is None:
            continue
        if not _packs(tensor):
            raise ValueError(
                f"{what} is {tensor.dtype} {list(tensor.shape)}; to be packed it must be float16 or bfloat16 [M, K] "
                "with K a multiple of 64: use input_mask24 and dense matmuls"
            )
        if tensor.shape != input.shape or tensor.dtype != input.dtype:
            raise ValueError(f"gate is {tensor.dtype} {list(tensor.shape)}, not {input.dtype} {list(input.shape)}")


def mvue24(grad: Tensor, seed: Tensor) -> None:
    if grad.dim() != 2 or not _is_compared(grad):
        raise ValueError(
            f"grad is {grad.dtype} {list(grad.shape)}; it must be [M, N] of float16, bfloat16, float32 or float64: "
            "flatten the leading dims or convert it first"
        )
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != grad.device:
        raise ValueError(
            f"seed is {seed.dtype} {list(seed.shape)} on {seed.device}; it must be one int64 on {grad.device}, like "
            "torch.randint(2**62, (1,), device=grad.device)"
        )


def sparsify_mvue(grad: Tensor, seed: Tensor) -> None:
    mvue24(grad, seed)
    if grad.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"grad is {grad.dtype} {list(grad.shape)}; to be packed it must be float16 or bfloat16: use mvue24, the "
            "same as a dense tensor"
        )


def sparsify_mvue_float8(grad: Tensor, seed: Tensor, scale: Tensor) -> None:
    sparsify_mvue(grad, seed)
    round_float8(grad, scale)
    if isinstance(grad.shape[1], int) and grad.shape[1] % TILE:
        raise ValueError(f"grad is {list(grad.shape)}; its columns must be a multiple of {TILE}: use mvue24")


def sparsify_mvue_sum(grad: Tensor, seed: Tensor) -> None:
    mvue24(grad, seed)
    if not _packs(grad):
        raise ValueError(
            f"grad is {grad.dtype} {list(grad.shape)}; to be packed and summed it must be float16 or bfloat16 [M, N] "
            f"with N a multiple of {KERNEL_TILE}: use mvue24, the same as a dense tensor"
        )


def product(form: Form, dense: Tensor, packed: Tensor, n: int, bias: Tensor | None, names: tuple[str, str]) -> None:
    """names: of the dense operand, with its shape as in "input [M, K]", and of n, as the operator has them."""
    spec, (what, count) = PRODUCTS[form], names
    name, _, letters = what.partition(" ")
    fits, k = False, 0
    # Of float8 cuSPARSELt wants both operands with the dim last that it contracts over.
    if dense.dtype == packed.dtype == FLOAT8 and form in ("linear", "grad_weight_t") and bias is None:
        dtypes: tuple[torch.dtype, ...] = (FLOAT8,)
    else:
        dtypes = KERNEL_DTYPES
    if dense.dim() == 2 and packed.dim() == 1:
        _, k = spec.dense_shape(*dense.shape)
        # Rows are padded, and the others must be whole tiles.
        rows, cols = (n, k) if spec.rows == "n" else (k, n)
        fits = cols % KERNEL_TILE == 0 and packed.numel() == packed_numel(rows, cols, packed.dtype)
        fits = fits and (spec.rows != "m" or rows % KERNEL_TILE == 0)
    if not fits:
        maker = {"weight": "sparsify", "grad_output": "sparsify_mvue", "input": "sparsify_input"}[spec.structured]
        if packed.dtype == FLOAT8:
            maker = {"weight": "sparsify_float8", "grad_output": "sparsify_mvue_float8"}.get(spec.structured, maker)
        share = "5 / 8" if packed.dtype == FLOAT8 else "9 / 16"
        raise ValueError(
            f"packed {list(packed.shape)} and {name} {list(dense.shape)} do not fit {count}={n}: {name} must be "
            f"{letters} and packed what {maker} returns, 1-D of {share} of the elements of [{n}, {k or 'K'}] in whole "
            "tiles"
        )
    if dense.dtype == packed.dtype == FLOAT8 != dtypes[0]:
        raise ValueError(
            f"{spec.op} of float8{' with a bias' if bias is not None else ''}: float8 has linear and grad_weight_t,"
            " without a bias: add it afterwards, or take bfloat16"
        )
    if packed.dtype not in dtypes or dense.dtype != packed.dtype:
        raise ValueError(
            f"packed is {packed.dtype} and {name} {dense.dtype}; both must be float16 or both bfloat16: convert one, or"
            " pass dtype= to sparsify"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != n or bias.dtype != dense.dtype):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}; it must be {dense.dtype} [{n}], like the output")


def _is_compared(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1


def _compared(tensor: Tensor, what: str, mask: str, masks: tuple[str, ...]) -> None:
    if mask not in masks:
        raise ValueError(f"mask={mask!r} is unknown; choose one of {', '.join(masks)}")
    if not _is_compared(tensor):
        raise ValueError(
            f"a 2:4 mask compares magnitudes and takes float16, bfloat16, float32 or float64, not {tensor.dtype}; "
            f"convert the {what} first"
        )


def _matrix(weight: Tensor, multiple: int, remedy: str) -> None:
    if weight.dim() != 2 or weight.shape[0] % multiple or weight.shape[1] % multiple:
        raise ValueError(
            f"a 2:4 weight must be 2-D with both dims multiples of {multiple}, not {list(weight.shape)}; {remedy}"
        )


def _packs(matrix: Tensor) -> bool:
    """Whether it can be packed when its rows are padded."""
    if matrix.dim() != 2 or matrix.dtype not in KERNEL_DTYPES:
        return False
    return matrix.shape[1] % KERNEL_TILE == 0 and matrix.shape[1] != 0
