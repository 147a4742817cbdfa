"""The operators of the rewritten graphs, `torch.ops.sparse_pass.*`: schema, fake, CPU, CUDA, in this order.

    sparsify: W [N, K] -> S(W) and S(W)^T, packed       linear: X [M, K], packed -> X S(W)^T + b  [M, N]
    mask24:   W [N, K] -> bool [N, K]                   input_mask24: X [..., K] -> bool [..., K]
    sparsify_one: S(W), or S(W)^T, alone

`grad_ops` has those of 2:4 gradients.
All are functional and take any strides. They have no derivative: the pass rewrites graphs that already hold their
backward. The CPU kernels are the reference and use the byte layout of the GPU kernels (`reference.pack`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import cuda_ops, reference, reference_activation

PACKED_DTYPES = (torch.float16, torch.bfloat16)

_LIBRARY = torch.library.Library("sparse_pass", "DEF")
for _schema in (
    "sparsify(Tensor weight, str mask, *, ScalarType? dtype=None) -> (Tensor, Tensor)",
    "sparsify_one(Tensor weight, str mask, bool transposed, *, ScalarType? dtype=None) -> Tensor",
    "linear(Tensor input, Tensor packed, Tensor? bias, SymInt out_features, *, bool tuned=False) -> Tensor",
    "mask24(Tensor weight, str mask) -> Tensor",
    "input_mask24(Tensor input, str mask) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def mask24(weight: Tensor, mask: str = "optimal") -> Tensor:
    """Return the transposable 2:4 mask of a weight: bool [N, K], at most two True of four along rows and columns.

    weight: [N, K] floating point, N and K multiples of 4, any device and strides. mask: "optimal", the largest sum of
    magnitudes of all such masks of a 4x4 tile, or "greedy", torch core's `largest_abs_values_greedy`;
    `sparse_pass.reference.mask24` defines both, ties included. ValueError for anything else.
    """
    return _OPS.mask24(weight.detach(), mask)  # type: ignore[no-any-return]


# Checks: one sentence with the shape, the rule and the remedy. The fakes use them too, so that a graph with a wrong
# call fails while it is traced.


def _check_compared(tensor: Tensor, what: str, mask: str, masks: tuple[str, ...]) -> None:
    if mask not in masks:
        raise ValueError(f"mask={mask!r} is unknown; choose one of {', '.join(masks)}")
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
        raise ValueError(
            f"a 2:4 mask compares magnitudes and takes float16, bfloat16, float32 or float64, not {tensor.dtype}; "
            f"convert the {what} first"
        )


def _check_mask_args(weight: Tensor, mask: str) -> None:
    _check_compared(weight, "weight", mask, reference.MASKS)
    _check_dims(weight, 4, "pad the weight with zeros or leave the layer dense")


def _check_input_mask_args(input: Tensor, mask: str) -> None:
    _check_compared(input, "input", mask, reference_activation.MASKS)
    if input.dim() == 0 or input.shape[-1] % 4:
        raise ValueError(
            f"a 2:4 input must be [..., K] with K a multiple of 4, not {list(input.shape)}; leave it dense"
        )


def _check_dims(weight: Tensor, multiple: int, remedy: str) -> None:
    if weight.dim() != 2 or weight.shape[0] % multiple or weight.shape[1] % multiple:
        raise ValueError(
            f"a 2:4 weight must be 2-D with both dims multiples of {multiple}, not {list(weight.shape)}; {remedy}"
        )


def _check_sparsify(weight: Tensor, mask: str, dtype: torch.dtype | None) -> torch.dtype:
    """Raise for what cannot be packed, and return the dtype of the packed values."""
    _check_mask_args(weight, mask)
    _check_dims(weight, 64, "use the masked dense weight, weight * mask24(weight)")
    if weight.numel() == 0:
        raise ValueError(f"an empty weight {list(weight.shape)} has nothing to pack; leave the layer dense")
    packed_dtype = dtype or weight.dtype
    if packed_dtype not in PACKED_DTYPES:
        raise ValueError(
            f"packed 2:4 values are float16 or bfloat16, not {packed_dtype}; pass dtype=torch.bfloat16 or use the "
            "masked dense weight, weight * mask24(weight)"
        )
    return packed_dtype


def _check_linear(input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> None:
    if input.dim() != 2 or packed.dim() != 1 or packed.numel() * 16 != out_features * input.shape[1] * 9:
        raise ValueError(
            f"input {list(input.shape)} and packed {list(packed.shape)} do not fit out_features={out_features}: input "
            "must be [M, K] and packed 1-D of out_features * K * 9 / 16 elements, as sparsify returns it"
        )
    if packed.dtype not in PACKED_DTYPES or input.dtype != packed.dtype:
        raise ValueError(
            f"input is {input.dtype} and packed {packed.dtype}; both must be float16 or both bfloat16: pass dtype= to "
            "sparsify or convert the input"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != out_features or bias.dtype != input.dtype):
        raise ValueError(
            f"bias is {bias.dtype} {list(bias.shape)}; it must be {input.dtype} [{out_features}], like the output"
        )


# Autograd. The ops have no derivative, for which torch's default is a warning and missing gradients. A Python function
# under the autograd key that refuses would double the host time of every call, so the kernels refuse by themselves:
# when a gradient comes back, or while a graph with one is traced.

_NO_DERIVATIVE = (
    "sparse_pass ops have no derivative: the pass puts them into graphs that already hold their backward. Train through"
    " sparse_pass.sparse_backend, or call them under torch.no_grad()"
)


def refuse_to_trace(*tensors: Tensor | None) -> None:
    """For fakes."""
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors):
        raise NotImplementedError(_NO_DERIVATIVE)


class _Refusal(torch.autograd.Function):
    """The result as it is; an error where a gradient is to be propagated through it."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(_NO_DERIVATIVE)


def forward_only(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """For kernels."""

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        sources = [one for one in args if isinstance(one, Tensor) and one.requires_grad]
        if not sources or not torch.is_grad_enabled():
            return kernel(*args, **kwargs)
        with torch.no_grad():
            results = kernel(*args, **kwargs)
        if isinstance(results, Tensor):
            return _Refusal.apply(results, *sources)  # type: ignore[no-untyped-call]
        return tuple(_Refusal.apply(one, *sources) for one in results)  # type: ignore[no-untyped-call]

    return call


# Fakes


@torch.library.register_fake("sparse_pass::sparsify", lib=_LIBRARY)
def _sparsify_fake(weight: Tensor, mask: str, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    packed_dtype = _check_sparsify(weight, mask, dtype)
    refuse_to_trace(weight)
    numel = weight.shape[0] * weight.shape[1] * 9 // 16
    return weight.new_empty(numel, dtype=packed_dtype), weight.new_empty(numel, dtype=packed_dtype)


@torch.library.register_fake("sparse_pass::sparsify_one", lib=_LIBRARY)
def _sparsify_one_fake(weight: Tensor, mask: str, transposed: bool, *, dtype: torch.dtype | None = None) -> Tensor:
    packed_dtype = _check_sparsify(weight, mask, dtype)
    refuse_to_trace(weight)
    return weight.new_empty(weight.shape[0] * weight.shape[1] * 9 // 16, dtype=packed_dtype)


@torch.library.register_fake("sparse_pass::linear", lib=_LIBRARY)
def _linear_fake(
    input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *, tuned: bool = False
) -> Tensor:
    _check_linear(input, packed, bias, out_features)
    refuse_to_trace(input, bias)
    return input.new_empty(input.shape[0], out_features)


@torch.library.register_fake("sparse_pass::mask24", lib=_LIBRARY)
def _mask24_fake(weight: Tensor, mask: str) -> Tensor:
    _check_mask_args(weight, mask)
    return weight.new_empty(weight.shape, dtype=torch.bool)


@torch.library.register_fake("sparse_pass::input_mask24", lib=_LIBRARY)
def _input_mask24_fake(input: Tensor, mask: str) -> Tensor:
    _check_input_mask_args(input, mask)
    return input.new_empty(input.shape, dtype=torch.bool)


# CPU


@torch.library.impl(_LIBRARY, "sparsify", "CPU")
@forward_only
def _sparsify_cpu(weight: Tensor, mask: str, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    return reference.sparsify(weight, mask, _check_sparsify(weight, mask, dtype))


@torch.library.impl(_LIBRARY, "sparsify_one", "CPU")
@forward_only
def _sparsify_one_cpu(weight: Tensor, mask: str, transposed: bool, *, dtype: torch.dtype | None = None) -> Tensor:
    return reference.sparsify_one(weight, mask, transposed, _check_sparsify(weight, mask, dtype))


@torch.library.impl(_LIBRARY, "linear", "CPU")
@forward_only
def _linear_cpu(
    input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *, tuned: bool = False
) -> Tensor:
    _check_linear(input, packed, bias, out_features)
    return reference.linear(input, packed, bias, out_features)


@torch.library.impl(_LIBRARY, "mask24", "CPU")
def _mask24_cpu(weight: Tensor, mask: str) -> Tensor:
    _check_mask_args(weight, mask)
    return reference.mask24(weight, mask)


@torch.library.impl(_LIBRARY, "input_mask24", "CPU")
def _input_mask24_cpu(input: Tensor, mask: str) -> Tensor:
    _check_input_mask_args(input, mask)
    return reference_activation.input_mask24(input, mask)


# CUDA


@torch.library.impl(_LIBRARY, "sparsify", "CUDA")
@forward_only
def _sparsify_cuda(weight: Tensor, mask: str, *, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    return cuda_ops.sparsify(weight, mask, _check_sparsify(weight, mask, dtype))


@torch.library.impl(_LIBRARY, "sparsify_one", "CUDA")
@forward_only
def _sparsify_one_cuda(weight: Tensor, mask: str, transposed: bool, *, dtype: torch.dtype | None = None) -> Tensor:
    return cuda_ops.sparsify_one(weight, mask, transposed, _check_sparsify(weight, mask, dtype))


@torch.library.impl(_LIBRARY, "linear", "CUDA")
@forward_only
def _linear_cuda(
    input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, *, tuned: bool = False
) -> Tensor:
    _check_linear(input, packed, bias, out_features)
    return cuda_ops.linear(input, packed, bias, out_features, tuned)


@torch.library.impl(_LIBRARY, "mask24", "CUDA")
def _mask24_cuda(weight: Tensor, mask: str) -> Tensor:
    _check_mask_args(weight, mask)
    return cuda_ops.mask24(weight, mask)


@torch.library.impl(_LIBRARY, "input_mask24", "CUDA")
def _input_mask24_cuda(input: Tensor, mask: str) -> Tensor:
    _check_input_mask_args(input, mask)
    return reference_activation.input_mask24(input, mask, cuda_ops.mask24)


for _op in ("sparsify", "sparsify_one", "linear"):
    _LIBRARY.impl(_op, torch.library.fallthrough_kernel, "Autograd")

_OPS = torch.ops.sparse_pass
