"""The operators on CUDA devices: which kernels are right there, and what those want of their operands.

Where the layout is SM90's the kernels are ours; on other devices torch's, in whatever layout the device has.
`ops` registers the functions here; code that Inductor compiled calls the kernels without them (`lowering`).
"""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, reference_activation, reference_mvue

if TYPE_CHECKING:
    from .kernels.problem import Form


def is_sm90_layout(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell which kernels are right on the device. RuntimeError if none is."""
    from .kernels import probe

    layout = probe.layout(device, dtype)
    if layout not in (probe.SM90, probe.COMPRESS):
        raise RuntimeError(f"{layout}; use the masked dense weight, weight * mask24(weight)")
    return layout == probe.SM90


def sparsify(weight: Tensor, mask: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`torch.ops.sparse_pass.sparsify` for arguments that are known to be right."""
    if weight.get_device() != torch.cuda.current_device():
        with torch.cuda.device(weight.device):
            return sparsify(weight, mask, dtype)
    if not is_sm90_layout(weight.device, dtype):
        from .kernels import torch_cslt

        masked = weight.masked_fill(~mask24(weight, mask), 0).to(dtype)
        return torch_cslt.compress(masked), torch_cslt.compress(masked.T)
    if weight.dtype == torch.float64:  # rare, and the Triton kernel compares in float32
        return reference.sparsify(weight, mask, dtype)
    from .kernels import sparsify as kernel

    return kernel.sparsify(weight, mask, dtype)


def sparsify_one(weight: Tensor, mask: str, transposed: bool, dtype: torch.dtype) -> Tensor:
    """`torch.ops.sparse_pass.sparsify_one` for arguments that are known to be right."""
    if not is_sm90_layout(weight.device, dtype) or weight.dtype == torch.float64:
        return sparsify(weight, mask, dtype)[int(transposed)]
    from .kernels import sparsify as kernel

    with torch.cuda.device(weight.device):
        return kernel.sparsify_one(weight, mask, transposed, dtype)


def linear(input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, tuned: bool) -> Tensor:
    """`torch.ops.sparse_pass.linear` for arguments that are known to be right."""
    if input.get_device() != torch.cuda.current_device():
        with torch.cuda.device(input.device):
            return linear(input, packed, bias, out_features, tuned)
    rows, cols = input.shape
    if rows == 0:
        return input.new_empty(0, out_features)
    if rows % 8:
        # The library takes multiples of 8. A row of the output depends on its own row of the input only: what is in
        # the rows added here does not matter.
        padded = input.new_empty(rows + -rows % 8, cols)
        padded[:rows].copy_(input)
    else:
        padded = input.contiguous()
    packed, bias = packed.contiguous(), None if bias is None else bias.contiguous()
    if is_sm90_layout(input.device, input.dtype):
        from .kernels import cusparselt, tuner

        multiply = tuner.linear if tuned else cusparselt.linear
        output = multiply(padded, packed, bias, out_features)
    else:
        from .kernels import torch_cslt

        output = torch_cslt.linear(padded, packed, bias, out_features)
    return output[:rows] if rows % 8 else output


def mask24(weight: Tensor, mask: str) -> Tensor:
    """`torch.ops.sparse_pass.mask24` for arguments that are known to be right."""
    # Triton needs SM 7.0 and comes with torch for Linux; the reference gives the same mask anywhere.
    if weight.dtype == torch.float64 or not _has_triton(weight.device):
        return reference.mask24(weight, mask)
    from .kernels import sparsify as kernel

    with torch.cuda.device(weight.device):
        return kernel.mask24(weight, mask)


def mvue24(grad: Tensor, seed: Tensor) -> Tensor:
    """`torch.ops.sparse_pass.mvue24` for arguments that are known to be right."""
    if grad.dtype not in (torch.float16, torch.bfloat16) or not grad.numel() or not _has_triton(grad.device):
        return reference_mvue.mvue24(grad, seed)
    from .kernels import mvue

    with torch.cuda.device(grad.device):
        return mvue.mvue24(grad, seed)


def sparsify_mvue(grad: Tensor, seed: Tensor) -> Tensor:
    """`torch.ops.sparse_pass.sparsify_mvue` for arguments that are known to be right."""
    if grad.shape[0] == 0:
        return grad.new_empty(0)
    with torch.cuda.device(grad.device):
        if is_sm90_layout(grad.device, grad.dtype):
            from .kernels import mvue

            return mvue.sparsify_mvue(grad, seed)
        from .kernels import torch_cslt

        return torch_cslt.compress(_padded_rows(mvue24(grad, seed)).T)


def sparsify_mvue_sum(grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.ops.sparse_pass.sparsify_mvue_sum` for arguments that are known to be right."""
    if grad.shape[0] and is_sm90_layout(grad.device, grad.dtype):
        from .kernels import mvue

        with torch.cuda.device(grad.device):
            return mvue.sparsify_mvue_sum(grad, seed)
    return sparsify_mvue(grad, seed), reference_mvue.sums(grad)


def grad_weight(packed: Tensor, input: Tensor, out_features: int, tuned: bool) -> Tensor:
    """`torch.ops.sparse_pass.grad_weight` for arguments that are known to be right."""
    if input.shape[0] == 0:
        return input.new_zeros(out_features, input.shape[1])
    return _product("grad_weight", packed, _padded_rows(input), out_features, tuned)


def sparsify_input(input: Tensor, gate: Tensor | None, mask: str, activation: str) -> tuple[Tensor, Tensor]:
    """`torch.ops.sparse_pass.sparsify_input` for arguments that are known to be right."""
    if input.shape[0] == 0:
        return input.new_empty(0), input.new_empty(0)
    with torch.cuda.device(input.device):
        if is_sm90_layout(input.device, input.dtype):
            from .kernels import sparsify as kernel

            return kernel.sparsify_input(input, gate, mask, activation)
        from .kernels import torch_cslt

        x = _padded_rows(reference_activation.activate(input, gate, activation))
        masked = x.masked_fill(~mask24(x, mask), 0)
        return torch_cslt.compress(masked), torch_cslt.compress(masked.T)


def input_linear(packed: Tensor, weight: Tensor, rows: int, tuned: bool) -> Tensor:
    """`torch.ops.sparse_pass.input_linear` for arguments that are known to be right."""
    if rows == 0:
        return weight.new_empty(0, weight.shape[0])
    return _product("input", packed, weight, reference.padded(rows), tuned)[:rows]


def input_grad_weight(packed_t: Tensor, grad_output: Tensor, in_features: int, tuned: bool) -> Tensor:
    """`torch.ops.sparse_pass.input_grad_weight` for arguments that are known to be right."""
    if grad_output.shape[0] == 0:
        return grad_output.new_zeros(grad_output.shape[1], in_features)
    return _product("input_grad_weight", packed_t, _padded_rows(grad_output), in_features, tuned)


def _product(form: Form, packed: Tensor, dense: Tensor, rows: int, tuned: bool) -> Tensor:
    """D of a form of `kernels.problem`, whose M is padded to a multiple of 8. rows: of packed."""
    by_rows = form == "input"  # B is stored [M, K]
    cols = dense.shape[0 if by_rows else 1]
    if cols % 8:
        dense = F.pad(dense, (0, 0, 0, -cols % 8) if by_rows else (0, -cols % 8))
    packed, dense = packed.contiguous(), dense.contiguous()
    with torch.cuda.device(dense.device):
        if is_sm90_layout(dense.device, dense.dtype):
            from .kernels import cusparselt, tuner

            multiply = tuner.product if tuned else cusparselt.product
            result = multiply(form, dense, packed, rows)
        else:
            from .kernels import torch_cslt

            result = torch_cslt.product(packed, dense.T if by_rows else dense, rows)
            result = result.T.contiguous() if form == "input_grad_weight" else result
    if not cols % 8:
        return result
    return result[:cols].contiguous() if form == "input_grad_weight" else result[:, :cols].contiguous()


def _padded_rows(matrix: Tensor) -> Tensor:
    """With rows of zeros up to whole tiles, for the forms whose K is padded. They meet zeros that are not stored: any
    number but NaN would do."""
    missing = -matrix.shape[0] % reference.TILE
    return F.pad(matrix, (0, 0, 0, missing)) if missing else matrix


@functools.cache
def _has_triton(device: torch.device) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)
