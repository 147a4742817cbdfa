"""The operators of 2:4 inputs, `torch.ops.sparse_pass.*`: schema, fake, CPU, CUDA, in this order.

    sparsify_input:    X [M, K] -> S(x) [Mp, K] and S(x)^T [K, Mp], packed       x = activation(X), or of X and a gate
    input_linear:      S(x), W [N, K] -> S(x) W^T  [M, N]
    input_grad_weight: S(x)^T, dY [M, N] -> dY^T S(x)  [N, K]

Mp is M rounded up to a multiple of 64. As in `ops`, all are functional, take any strides and have no derivative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda_ops, reference, reference_activation
from .ops import PACKED_DTYPES, forward_only, refuse_to_trace

_LIBRARY = torch.library.Library("sparse_pass", "FRAGMENT")
for _schema in (
    "sparsify_input(Tensor input, Tensor? gate, str mask, str activation) -> (Tensor, Tensor)",
    "input_linear(Tensor packed, Tensor weight, SymInt rows, *, bool tuned=False) -> Tensor",
    "input_grad_weight(Tensor packed_t, Tensor grad_output, SymInt in_features, *, bool tuned=False) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


# Checks


def _check_sparsify(input: Tensor, gate: Tensor | None, mask: str, activation: str) -> None:
    if mask not in reference.MASKS:
        raise ValueError(f"mask={mask!r} cannot be packed both ways; choose one of {', '.join(reference.MASKS)}")
    if activation not in reference_activation.ACTIVATIONS:
        known = ", ".join(reference_activation.ACTIVATIONS)
        raise ValueError(f"activation={activation!r} is unknown; choose one of {known}")
    if (gate is not None) != (activation in reference_activation.GATED):
        raise ValueError(f"activation={activation!r} {'has no' if gate is not None else 'needs a'} gate")
    for what, tensor in (("input", input), ("gate", gate)):
        if tensor is None:
            continue
        if (
            tensor.dim() != 2
            or tensor.dtype not in PACKED_DTYPES
            or tensor.shape[1] % reference.TILE
            or tensor.shape[1] == 0
        ):
            raise ValueError(
                f"{what} is {tensor.dtype} {list(tensor.shape)}; to be packed it must be float16 or bfloat16 [M, K] "
                "with K a multiple of 64: use input_mask24 and dense matmuls"
            )
        if tensor.shape != input.shape or tensor.dtype != input.dtype:
            raise ValueError(f"gate is {tensor.dtype} {list(tensor.shape)}, not {input.dtype} {list(input.shape)}")


def _features(weight: Tensor) -> int:
    return weight.shape[1] if weight.dim() == 2 else 0


def _check_product(packed: Tensor, dense: Tensor, rows: int, cols: int, what: str) -> None:
    fits = dense.dim() == 2 and packed.dim() == 1 and cols % reference.TILE == 0
    if not fits or packed.numel() != reference.packed_numel(rows, cols):
        raise ValueError(
            f"packed {list(packed.shape)} and {what} {list(dense.shape)} do not fit [M, K] of {[rows, cols]}: packed "
            "must be what sparsify_input returns for an input of this shape"
        )
    if packed.dtype not in PACKED_DTYPES or dense.dtype != packed.dtype:
        raise ValueError(
            f"packed is {packed.dtype} and {what} {dense.dtype}; both must be float16 or both bfloat16: convert one"
        )


# Fakes


@torch.library.register_fake("sparse_pass::sparsify_input", lib=_LIBRARY)
def _sparsify_input_fake(input: Tensor, gate: Tensor | None, mask: str, activation: str) -> tuple[Tensor, Tensor]:
    _check_sparsify(input, gate, mask, activation)
    refuse_to_trace(input, gate)
    numel = reference.packed_numel(*input.shape)
    return input.new_empty(numel), input.new_empty(numel)


@torch.library.register_fake("sparse_pass::input_linear", lib=_LIBRARY)
def _input_linear_fake(packed: Tensor, weight: Tensor, rows: int, *, tuned: bool = False) -> Tensor:
    _check_product(packed, weight, rows, _features(weight), "weight")
    refuse_to_trace(weight)
    return weight.new_empty(rows, weight.shape[0])


@torch.library.register_fake("sparse_pass::input_grad_weight", lib=_LIBRARY)
def _input_grad_weight_fake(packed_t: Tensor, grad_output: Tensor, in_features: int, *, tuned: bool = False) -> Tensor:
    _check_product(packed_t, grad_output, grad_output.shape[0], in_features, "grad_output")
    refuse_to_trace(grad_output)
    return grad_output.new_empty(grad_output.shape[1], in_features)


# CPU


@torch.library.impl(_LIBRARY, "sparsify_input", "CPU")
@forward_only
def _sparsify_input_cpu(input: Tensor, gate: Tensor | None, mask: str, activation: str) -> tuple[Tensor, Tensor]:
    _check_sparsify(input, gate, mask, activation)
    return reference_activation.sparsify_input(input, gate, mask, activation)


@torch.library.impl(_LIBRARY, "input_linear", "CPU")
@forward_only
def _input_linear_cpu(packed: Tensor, weight: Tensor, rows: int, *, tuned: bool = False) -> Tensor:
    _check_product(packed, weight, rows, _features(weight), "weight")
    return reference_activation.input_linear(packed, weight, rows)


@torch.library.impl(_LIBRARY, "input_grad_weight", "CPU")
@forward_only
def _input_grad_weight_cpu(packed_t: Tensor, grad_output: Tensor, in_features: int, *, tuned: bool = False) -> Tensor:
    _check_product(packed_t, grad_output, grad_output.shape[0], in_features, "grad_output")
    return reference_activation.input_grad_weight(packed_t, grad_output, in_features)


# CUDA


@torch.library.impl(_LIBRARY, "sparsify_input", "CUDA")
@forward_only
def _sparsify_input_cuda(input: Tensor, gate: Tensor | None, mask: str, activation: str) -> tuple[Tensor, Tensor]:
    _check_sparsify(input, gate, mask, activation)
    return cuda_ops.sparsify_input(input, gate, mask, activation)


@torch.library.impl(_LIBRARY, "input_linear", "CUDA")
@forward_only
def _input_linear_cuda(packed: Tensor, weight: Tensor, rows: int, *, tuned: bool = False) -> Tensor:
    _check_product(packed, weight, rows, _features(weight), "weight")
    return cuda_ops.input_linear(packed, weight, rows, tuned)


@torch.library.impl(_LIBRARY, "input_grad_weight", "CUDA")
@forward_only
def _input_grad_weight_cuda(packed_t: Tensor, grad_output: Tensor, in_features: int, *, tuned: bool = False) -> Tensor:
    _check_product(packed_t, grad_output, grad_output.shape[0], in_features, "grad_output")
    return cuda_ops.input_grad_weight(packed_t, grad_output, in_features, tuned)


for _op in ("sparsify_input", "input_linear", "input_grad_weight"):
    _LIBRARY.impl(_op, torch.library.fallthrough_kernel, "Autograd")
