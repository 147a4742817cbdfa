"""The operators of 2:4 gradients, `torch.ops.sparse_pass.*`: schema, fake, CPU, CUDA, in this order.

    mvue24:        dY [M, N] -> MVUE(dY)  [M, N], dense
    sparsify_mvue: dY [M, N] -> MVUE(dY)^T [N, Mp], packed     grad_weight: packed, X [M, K] -> MVUE(dY)^T X  [N, K]
    sparsify_mvue_sum: the same, and sums of dY over 64 rows each, float32 [Mp / 64, N], for the gradient of a bias

MVUE is `reference_mvue`: two of every four along M, at random, right in expectation; Mp is M rounded up to a multiple
of 64. The seed, an int64 tensor of one element on grad's device, decides all that is random. As in `ops`, all are
functional, take any strides and have no derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda_ops, reference, reference_mvue
from .ops import PACKED_DTYPES, forward_only, refuse_to_trace

_LIBRARY = torch.library.Library("sparse_pass", "FRAGMENT")
for _schema in (
    "mvue24(Tensor grad, Tensor seed) -> Tensor",
    "sparsify_mvue(Tensor grad, Tensor seed) -> Tensor",
    "sparsify_mvue_sum(Tensor grad, Tensor seed) -> (Tensor, Tensor)",
    "grad_weight(Tensor packed, Tensor input, SymInt out_features, *, bool tuned=False) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


# Checks


def _check_mvue(grad: Tensor, seed: Tensor) -> None:
    if grad.dim() != 2 or not grad.dtype.is_floating_point or grad.dtype.itemsize == 1:
        raise ValueError(
            f"grad is {grad.dtype} {list(grad.shape)}; it must be [M, N] of float16, bfloat16, float32 or float64: "
            "flatten the leading dims or convert it first"
        )
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != grad.device:
        raise ValueError(
            f"seed is {seed.dtype} {list(seed.shape)} on {seed.device}; it must be one int64 on {grad.device}, like "
            "torch.randint(2**62, (1,), device=grad.device)"
        )


def _check_sparsify_mvue(grad: Tensor, seed: Tensor) -> None:
    _check_mvue(grad, seed)
    if grad.dtype not in PACKED_DTYPES or grad.shape[1] % reference.TILE or grad.shape[1] == 0:
        raise ValueError(
            f"grad is {grad.dtype} {list(grad.shape)}; to be packed it must be float16 or bfloat16 [M, N] with N a "
            f"multiple of {reference.TILE}: use mvue24, the same as a dense tensor"
        )


def _check_grad_weight(packed: Tensor, input: Tensor, out_features: int) -> None:
    fits = input.dim() == 2 and packed.dim() == 1 and out_features % reference.TILE == 0
    if not fits or packed.numel() != reference.packed_numel(input.shape[0], out_features):
        raise ValueError(
            f"packed {list(packed.shape)} and input {list(input.shape)} do not fit out_features={out_features}: input "
            "must be [M, K] and packed as sparsify_mvue returns it for grad [M, out_features]"
        )
    if packed.dtype not in PACKED_DTYPES or input.dtype != packed.dtype:
        raise ValueError(
            f"packed is {packed.dtype} and input {input.dtype}; both must be float16 or both bfloat16: convert grad or "
            "input first"
        )


# Fakes


@torch.library.register_fake("sparse_pass::mvue24", lib=_LIBRARY)
def _mvue24_fake(grad: Tensor, seed: Tensor) -> Tensor:
    _check_mvue(grad, seed)
    refuse_to_trace(grad)
    return grad.new_empty(grad.shape)


@torch.library.register_fake("sparse_pass::sparsify_mvue", lib=_LIBRARY)
def _sparsify_mvue_fake(grad: Tensor, seed: Tensor) -> Tensor:
    _check_sparsify_mvue(grad, seed)
    refuse_to_trace(grad)
    return grad.new_empty(reference.packed_numel(*grad.shape))


@torch.library.register_fake("sparse_pass::sparsify_mvue_sum", lib=_LIBRARY)
def _sparsify_mvue_sum_fake(grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    rows, cols = grad.shape
    return _sparsify_mvue_fake(grad, seed), grad.new_empty(
        reference.padded(rows) // reference.TILE, cols, dtype=torch.float32
    )


@torch.library.register_fake("sparse_pass::grad_weight", lib=_LIBRARY)
def _grad_weight_fake(packed: Tensor, input: Tensor, out_features: int, *, tuned: bool = False) -> Tensor:
    _check_grad_weight(packed, input, out_features)
    refuse_to_trace(input)
    return input.new_empty(out_features, input.shape[1])


# CPU


@torch.library.impl(_LIBRARY, "mvue24", "CPU")
@forward_only
def _mvue24_cpu(grad: Tensor, seed: Tensor) -> Tensor:
    _check_mvue(grad, seed)
    return reference_mvue.mvue24(grad, seed)


@torch.library.impl(_LIBRARY, "sparsify_mvue", "CPU")
@forward_only
def _sparsify_mvue_cpu(grad: Tensor, seed: Tensor) -> Tensor:
    _check_sparsify_mvue(grad, seed)
    return reference_mvue.sparsify_mvue(grad, seed)


@torch.library.impl(_LIBRARY, "sparsify_mvue_sum", "CPU")
@forward_only
def _sparsify_mvue_sum_cpu(grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    _check_sparsify_mvue(grad, seed)
    return reference_mvue.sparsify_mvue_sum(grad, seed)


@torch.library.impl(_LIBRARY, "grad_weight", "CPU")
@forward_only
def _grad_weight_cpu(packed: Tensor, input: Tensor, out_features: int, *, tuned: bool = False) -> Tensor:
    _check_grad_weight(packed, input, out_features)
    return reference_mvue.grad_weight(packed, input, out_features)


# CUDA


@torch.library.impl(_LIBRARY, "mvue24", "CUDA")
@forward_only
def _mvue24_cuda(grad: Tensor, seed: Tensor) -> Tensor:
    _check_mvue(grad, seed)
    return cuda_ops.mvue24(grad, seed)


@torch.library.impl(_LIBRARY, "sparsify_mvue", "CUDA")
@forward_only
def _sparsify_mvue_cuda(grad: Tensor, seed: Tensor) -> Tensor:
    _check_sparsify_mvue(grad, seed)
    return cuda_ops.sparsify_mvue(grad, seed)


@torch.library.impl(_LIBRARY, "sparsify_mvue_sum", "CUDA")
@forward_only
def _sparsify_mvue_sum_cuda(grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    _check_sparsify_mvue(grad, seed)
    return cuda_ops.sparsify_mvue_sum(grad, seed)


@torch.library.impl(_LIBRARY, "grad_weight", "CUDA")
@forward_only
def _grad_weight_cuda(packed: Tensor, input: Tensor, out_features: int, *, tuned: bool = False) -> Tensor:
    _check_grad_weight(packed, input, out_features)
    return cuda_ops.grad_weight(packed, input, out_features, tuned)


for _op in ("mvue24", "sparsify_mvue", "sparsify_mvue_sum", "grad_weight"):
    _LIBRARY.impl(_op, torch.library.fallthrough_kernel, "Autograd")
