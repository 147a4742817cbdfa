"""The straight-through reference of a random network: what the schemes say, eager.

It takes the choices of the compiled network, see `random_seen`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from float8_by_hand import scale_by_hand
from random_networks import Block, Network, Scheme
from random_seen import Match
from support import decay_of, mask_by_hand, ste_reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_pass as sp
from sparse_pass.config import gradient_scheme, input_scheme, is_float8, weight_scheme


class Product(torch.autograd.Function):
    """x [M, K] times w^T [K, N] and b, by the table of docs/schemes.md. s is S(w), kept its mask."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        s: Tensor,
        kept: Tensor | None,
        scheme: Scheme,
        match: Match,
        name: str,
    ) -> Tensor:
        on_input = input_scheme(scheme)
        kept_x = None if on_input is None else mask_by_hand(match.input(x), on_input.mask)
        read, multiplied = match.float8.operand(x) if is_float8(scheme) else (x, False)
        ctx.save_for_backward(x, s, kept, kept_x, read)
        ctx.scheme, ctx.match, ctx.name = scheme, match, name
        left, right = (read, s.T) if kept_x is None else (_masked(x, kept_x), w.T)
        if multiplied:
            return _float8_product(left, right, b)
        # Rounded once, as by the graph, see `_adds_at_once`.
        return left @ right if b is None else torch.addmm(b, left, right)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, s, kept, kept_x, read = ctx.saved_tensors
        on_weight, on_input, on_grad = (of(ctx.scheme) for of in (weight_scheme, input_scheme, gradient_scheme))
        grad_weight = grad_input = None
        if ctx.needs_input_grad[0]:
            estimate = grad
            if isinstance(on_grad, sp.GradientSparsity) and on_grad.grad_input == "mvue":
                estimate = ctx.match.grad(grad.T, ctx.name, "grad_input").T
            multiplied = False
            if is_float8(ctx.scheme):
                estimate, multiplied = ctx.match.float8.operand(grad)
            grad_input = _float8_product(estimate, s) if multiplied else estimate @ s
        if grad_input is not None and on_input is not None and on_input.grad_input == "masked":
            grad_input = _masked(grad_input, kept_x)
        if ctx.needs_input_grad[1]:
            if on_grad is not None and on_grad.grad_weight == "mvue":
                grad_weight = _estimated_grad_weight(ctx, grad, x, read)
            else:
                grad_weight = grad.T @ _masked(x, kept_x)
            if on_weight is not None and on_weight.grad_weight == "masked":
                grad_weight = _masked(grad_weight, kept)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


def _estimated_grad_weight(ctx: Any, grad: Tensor, x: Tensor, read: Tensor) -> Tensor:
    if not is_float8(ctx.scheme):
        return ctx.match.grad(grad, ctx.name, "grad_weight").T @ x  # type: ignore[no-any-return]
    drawn = ctx.match.grad_float8(grad, ctx.name, "grad_weight")
    if drawn is None:
        return grad.T @ x
    estimate, packed = drawn
    return _float8_product(estimate.T, read) if packed else estimate.T @ read


def _float8_product(left: Tensor, right: Tensor, b: Tensor | None = None) -> Tensor:
    """As the kernels multiply: sums in float32, the result in bfloat16, to which the bias is added in float32."""
    with torch.autocast(left.device.type, enabled=False):
        made = (left.float() @ right.float()).bfloat16().float()
    return (made if b is None else made + b.float()).to(left.dtype)


def _sparse(weight: Tensor, kept: Tensor | None, scheme: Scheme) -> Tensor:
    on_weight = weight_scheme(scheme)
    return weight if on_weight is None else _masked(weight, kept) * on_weight.factor


def _masked(values: Tensor, kept: Tensor | None) -> Tensor:
    return values if kept is None else torch.where(kept, values, 0)


def _multiplied(x: Tensor, block: Block, scheme: Scheme, match: Match, name: str) -> Tensor:
    """What `Block.multiply` gives, whatever its way."""
    fc, way, on_weight = block.fc, block.layer.way, weight_scheme(scheme)
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    weight, kept = fc.weight.to(dtype), None
    if on_weight is not None:
        kept = sp.mask24(fc.weight, on_weight.mask)
    if is_float8(scheme):
        # In the dtype of the parameter, by the scale of all of it.
        scale = scale_by_hand(fc.weight, 1 if on_weight is None else on_weight.factor)
        structured = match.float8.known(_sparse(fc.weight.detach(), kept, scheme), scale).to(dtype)
    else:
        structured = _sparse(weight.detach(), kept, scheme)
    if way == "Conv1D":
        weight, structured, kept = weight.T, structured.T, None if kept is None else kept.T
    rows, halves = x.to(dtype).reshape(-1, x.shape[-1]), 2 if way == "halves" else 1
    weights, structureds = weight.chunk(halves), structured.chunk(halves)
    kepts = [None] * len(weights) if kept is None else kept.chunk(halves)
    added = fc.bias
    own = added is not None and way in ("module", "F.linear", "Conv1D")
    added = added.to(dtype) if own else added
    at_once = own and (way == "Conv1D" or _adds_at_once(x.to(dtype), weight, added))
    on_input = input_scheme(scheme)
    # A sparse kernel takes a 2:4 input wherever it can, as a rule, and adds no bias.
    apart = on_input is not None and on_input.mask != "rowwise"
    at_once &= not (apart and has_kernel(on_input, dtype, weight.shape, (16, 64), x.device.type))
    inside = added if at_once else None
    parts = [
        Product.apply(rows, w, inside, s, k, scheme, match, name)
        for w, s, k in zip(weights, structureds, kepts, strict=True)
    ]
    y = torch.cat(parts, -1).view(*x.shape[:-1], weight.shape[0])
    return y if added is None or at_once else y + added


def has_kernel(
    scheme: sp.WeightSparsity | sp.ActivationSparsity | sp.GradientSparsity | None,
    dtype: torch.dtype,
    sizes: Sequence[int],
    multiples: Sequence[int],
    device_type: str,
) -> bool:
    """Whether a scheme asks for a sparse kernel, and dtype and sizes [N, K] are such that there may be one."""
    asked = scheme is not None and (scheme.backend == "cusparselt" or (device_type, scheme.backend) == ("cuda", "auto"))
    fits = not any(at % by for at, by in zip(sizes, multiples, strict=True))
    return asked and fits and dtype in (torch.float16, torch.bfloat16)


class _Ops(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(function)
        return function(*args, **(kwargs or {}))


def _adds_at_once(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether torch makes an addmm of this linear, which rounds once, or a product and a sum: that of an input of many
    dims or of odd strides. A relu of what is nearly zero can tell."""
    with _Ops() as ops, torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        F.linear(x, weight, bias)
    return torch.ops.aten.addmm.default in ops.called


def reference_of(network: Network, schemes: Mapping[str, Scheme], match: Match) -> Network:
    """A copy: weights that are only masked by a parametrization, all else by `Product`."""
    masked = {
        name: scheme
        for name, scheme in schemes.items()
        if isinstance(scheme, sp.WeightSparsity) and scheme.grad_weight != "mvue" and not is_float8(scheme)
    }
    reference = ste_reference(network, masked)
    decayed = set()
    for name, scheme in schemes.items():
        if name in masked:
            continue
        block = reference.get_submodule(name.removesuffix(".fc"))
        block.multiply = partial(_multiplied, block=block, scheme=scheme, match=match, name=name)
        weight, on_weight = block.fc.weight, weight_scheme(scheme)
        if on_weight is not None and on_weight.decay and weight.requires_grad and id(weight) not in decayed:
            decayed.add(id(weight))
            weight.register_hook(lambda gradient, w=weight, s=on_weight: gradient + decay_of(w, s))
    return reference
