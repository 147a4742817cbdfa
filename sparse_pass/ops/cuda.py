"""The operators on CUDA devices: which kernels are right there, and what those want of their operands.

Arguments are those of the operators (`definitions`), and known to be right. Where the device's backend has kernels that
mask and pack at once they are called; elsewhere the masked matrix is packed as the backend says. Code that Inductor
compiled calls the kernels without this file (`lowering`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..vocabulary import FLOAT8, KERNEL_DTYPES, KERNEL_TILE, PRODUCTS, Form, padded, row_multiple
from .reference import float8, gradients, inputs, weights

if TYPE_CHECKING:
    from ..kernels.backends import Backend


def backend_of(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend whose kernels are right on the device. RuntimeError if there is none."""
    from ..kernels import probe

    found = probe.backend(device, dtype)
    if isinstance(found, str):
        raise RuntimeError(f"{found}; use the masked dense weight, weight * mask24(weight)")
    return found


def _current(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which the tensor's device is the current one."""
    if tensor.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


# Masks, and an estimate of a gradient, as dense tensors


def mask24(weight: Tensor, mask: str) -> Tensor:
    # Triton needs SM 7.0 and comes with torch for Linux; the reference gives the same mask anywhere.
    if weight.dtype == torch.float64 or not _has_triton(weight.device):
        return weights.mask24(weight, mask)
    from ..kernels import sparsify as kernel

    with _current(weight):
        return kernel.mask24(weight, mask)


def mvue24(grad: Tensor, seed: Tensor) -> Tensor:
    if grad.dtype not in KERNEL_DTYPES or not grad.numel() or not _has_triton(grad.device):
        return gradients.mvue24(grad, seed)
    from ..kernels import mvue

    with _current(grad):
        return mvue.mvue24(grad, seed)


@functools.cache
def _has_triton(device: torch.device) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


# Packed


def sparsify(weight: Tensor, mask: str, dtype: torch.dtype | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    with _current(weight):
        backend = backend_of(weight.device, dtype or weight.dtype)
        if (pack := backend.packer("sparsify", weight.dtype)) is not None:
            return pack(weight, mask, dtype or weight.dtype, scale)  # type: ignore[no-any-return]
        masked = (_masked(weight, mask) * scale).to(dtype or weight.dtype)
        return backend.pack(masked), backend.pack(masked.T)


def sparsify_one(
    weight: Tensor, mask: str, transposed: bool, dtype: torch.dtype | None = None, scale: float = 1.0
) -> Tensor:
    with _current(weight):
        backend = backend_of(weight.device, dtype or weight.dtype)
        if (pack := backend.packer("sparsify_one", weight.dtype)) is not None:
            return pack(weight, mask, transposed, dtype or weight.dtype, scale)  # type: ignore[no-any-return]
        masked = (_masked(weight, mask) * scale).to(dtype or weight.dtype)
        return backend.pack(masked.T if transposed else masked)


def sparsify_float8(weight: Tensor, scale: Tensor, mask: str, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    with _current(weight):
        backend = backend_of(weight.device, FLOAT8)
        if (pack := backend.packer("sparsify_float8", weight.dtype)) is not None:
            return pack(weight, scale, mask, factor)  # type: ignore[no-any-return]
        return float8.sparsify(weight, scale, mask, factor)


def sparsify_input(input: Tensor, gate: Tensor | None, mask: str, activation: str) -> tuple[Tensor, Tensor]:
    if input.shape[0] == 0:
        return input.new_empty(0), input.new_empty(0)
    with _current(input):
        backend = backend_of(input.device, input.dtype)
        if (pack := backend.packer("sparsify_input", input.dtype)) is not None:
            return pack(input, gate, mask, activation)  # type: ignore[no-any-return]
        masked = _masked(_whole_tiles(inputs.activate(input, gate, activation)), mask)
        return backend.pack(masked), backend.pack(masked.T)


def sparsify_mvue(grad: Tensor, seed: Tensor) -> Tensor:
    if grad.numel() == 0:
        return grad.new_empty(0)
    with _current(grad):
        backend = backend_of(grad.device, grad.dtype)
        if (pack := backend.packer("sparsify_mvue", grad.dtype)) is not None:
            return pack(grad, seed)  # type: ignore[no-any-return]
        return backend.pack(_whole_tiles(mvue24(grad, seed)).T)


def sparsify_mvue_float8(grad: Tensor, seed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if grad.numel() == 0:
        return grad.new_empty(0, dtype=FLOAT8), grad.new_empty(grad.shape, dtype=FLOAT8)
    with _current(grad):
        backend = backend_of(grad.device, FLOAT8)
        if (pack := backend.packer("sparsify_mvue_float8", grad.dtype)) is not None:
            return pack(grad, seed, scale)  # type: ignore[no-any-return]
        return float8.sparsify_mvue(grad, seed, scale)


def sparsify_mvue_sum(grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    if grad.shape[0]:
        pack = backend_of(grad.device, grad.dtype).packer("sparsify_mvue_sum", grad.dtype)
        if pack is not None:
            with _current(grad):
                return pack(grad, seed)  # type: ignore[no-any-return]
    return sparsify_mvue(grad, seed), gradients.sums(grad)


def _masked(matrix: Tensor, mask: str) -> Tensor:
    return matrix.masked_fill(~mask24(matrix, mask), 0)


def _whole_tiles(matrix: Tensor) -> Tensor:
    """With zeros below and on the right, up to whole tiles."""
    below, right = (-size % KERNEL_TILE for size in matrix.shape)
    return F.pad(matrix, (0, right, 0, below)) if below or right else matrix


# Products


def product(
    form: Form, dense: Tensor, packed: Tensor, n: int, bias: Tensor | None = None, tuned: bool = False
) -> Tensor:
    """Multiply as the form says: packed A [N, K] and B -> D, contiguous."""
    spec = PRODUCTS[form]
    m, k = spec.dense_shape(*dense.shape)
    shape = spec.output_shape(m, n)
    if {"m": m, "n": n, "k": k}[spec.rows] == 0:
        return dense.new_zeros(shape)
    whole_k, whole_n = (padded(k), n) if spec.rows == "k" else (k, padded(n) if spec.rows == "n" else n)
    with _current(dense):
        dense = _extended(dense, *spec.dense_shape(padded(m, row_multiple(dense.dtype)), whole_k), zeros=whole_k != k)
        bias = None if bias is None else bias.contiguous()
        backend = backend_of(dense.device, dense.dtype)
        output = backend.multiply(form, dense, packed.contiguous(), whole_n, bias, tuned)
        return output if output.shape == shape else output[: shape[0], : shape[1]].contiguous()


def _extended(matrix: Tensor, rows: int, cols: int, *, zeros: bool) -> Tensor:
    """Contiguous and with more rows and columns: of M, where anything may be in them, as each makes its own part of the
    output; and of K, where zeros are, which meet zeros that are not stored."""
    if matrix.shape == (rows, cols):
        return matrix.contiguous()
    made = (matrix.new_zeros if zeros else matrix.new_empty)(rows, cols)
    made[: matrix.shape[0], : matrix.shape[1]].copy_(matrix)
    return made
