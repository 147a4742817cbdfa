"""The straight-through reference of a random network: what the schemes say, eager.

What is chosen from numbers that rounding may change is not chosen twice: a near tie of two magnitudes has either mask,
and a last bit of grad_output draws another element. So the operators of the compiled network are watched, and the
reference masks by what they saw and draws with their seeds. That they saw what it has itself is compared too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from random_networks import Block, Network, Scheme
from support import decay_of, mask_by_hand, ste_reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_pass as sp
from sparse_pass.config import gradient_scheme, input_scheme, weight_scheme
from sparse_pass.ops import definitions
from sparse_pass.ops.reference import compiled
from sparse_pass.ops.reference import gradients as reference_gradients

FUSED: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x) ** 2,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu_gate": lambda x, gate: F.silu(x) * gate,
}
INPUTS = ("input_mask24", "sparsify_input")
GRADS = ("mvue24", "sparsify_mvue", "sparsify_mvue_sum")


class Seen:
    """What the operators of one call of a compiled network were given."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        """As a matrix, after the activation function that is fused."""
        self.grads: list[tuple[Tensor, Tensor]] = []
        """grad_output, and the seed."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        modules: list[Any] = [compiled]  # what Inductor's code calls, beside the operators
        if torch.cuda.is_available():
            from sparse_pass.kernels import compiled as compiled_for_gpus

            modules.append(compiled_for_gpus)
        library = torch.library.Library("sparse_pass", "IMPL")
        with ExitStack() as stack:
            stack.callback(library._destroy)
            for name in (*INPUTS, *GRADS):
                for module in modules:
                    if hasattr(module, name):
                        watched = self._watched(getattr(module, name), name)
                        stack.enter_context(mock.patch.object(module, name, watched))
                kernels = getattr(definitions, name.upper())
                library.impl(name, self._watched(kernels.cpu, name), "CPU", allow_override=True)
                library.impl(name, self._watched(kernels.cuda, name), "CUDA", allow_override=True)
            yield

    def _watched(self, kernel: Callable[..., Any], name: str) -> Callable[..., Any]:
        note = self._input if name in INPUTS else self._grad

        def call(*args: Any, **kwargs: Any) -> Any:
            note(*args)
            return kernel(*args, **kwargs)

        return call

    def _input(self, x: Tensor, *rest: Any) -> None:
        if x.numel() == 0:
            return
        gate, activation = (rest[0], rest[2]) if len(rest) == 3 else (None, "none")
        sources = [x] if gate is None else [x, gate]
        made = x if activation == "none" else FUSED[activation](*(one.float() for one in sources)).to(x.dtype)
        self.inputs.append(made.detach().clone().reshape(-1, x.shape[-1]))

    def _grad(self, grad: Tensor, seed: Tensor) -> None:
        if grad.numel():
            self.grads.append((grad.detach().clone(), seed.clone()))


class Match:
    """What a run of the reference takes of `Seen`.

    A call takes the nearest that was seen, as there are calls that no operator sees and operators that run again in a
    backward. ``pairs`` has what was seen, and beside it what the reference has in its place: they must agree.

    Args:
        like: another run of the reference, the choices of which are repeated.
    """

    def __init__(self, seen: Seen, like: Match | None = None) -> None:
        self.seen, self.like = seen, like
        self.inputs: list[int] = []
        self.grads: list[int | None] = []
        self.drawn: dict[tuple[str, str], set[bool]] = defaultdict(set)
        """By the name of a place and of a GEMM: whether what it reads was drawn."""
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def input(self, x: Tensor) -> Tensor:
        """What was seen of an input, which Inductor may have in float32; itself if it is empty: nothing is computed."""
        if x.numel() == 0:
            return x
        if self.like is not None:
            at: int | None = self.like.inputs[len(self.inputs)]
        else:
            at = _nearest(x, dict(enumerate(self.seen.inputs)))
        assert at is not None, f"no input {list(x.shape)} was masked"
        self.inputs.append(at)
        self.pairs.append((self.seen.inputs[at].to(x.dtype), x.detach()))
        return self.seen.inputs[at]

    def grad(self, grad: Tensor, name: str, gemm: str) -> Tensor:
        """The estimate of a grad_output, or of its transpose, from what was seen and the seed.

        Itself if it stayed dense, or is empty: those are all alike.
        """
        if grad.numel() == 0:
            return grad
        if self.like is not None:
            at = self.like.grads[len(self.grads)]
        else:
            left = {index: one for index, (one, _) in enumerate(self.seen.grads) if index not in self.grads}
            at = _nearest(grad, left)
            if at is not None and _distance(left[at], grad) > 0.5 * float(grad.double().norm()):
                at = None
        self.grads.append(at)
        self.drawn[name, gemm].add(at is not None)
        if at is None:
            return grad
        self.pairs.append((self.seen.grads[at][0].to(grad.dtype), grad))
        return reference_gradients.mvue24(*self.seen.grads[at]).to(grad.dtype)

    def check_all_taken(self, tolerance: float) -> None:
        """Nothing was masked or drawn that the reference has not."""
        left = len(self.seen.grads) - len({at for at in self.grads if at is not None})
        assert not left, f"{left} gradients were drawn for no linear of the reference"
        taken = {at: self.seen.inputs[at] for at in self.inputs}
        for at, x in enumerate(self.seen.inputs):
            # A backward that runs the forward again masks the same input again.
            same = _nearest(x, taken)
            found = at in taken or (same is not None and _distance(taken[same], x) <= tolerance * float(x.norm()))
            assert found, f"an input {list(x.shape)} was masked that no linear of the reference has"


def _distance(one: Tensor, two: Tensor) -> float:
    return float((one.detach().double() - two.detach().double()).norm())


def _nearest(x: Tensor, among: Mapping[int, Tensor]) -> int | None:
    fitting = {at: _distance(one, x) for at, one in among.items() if one.shape == x.shape}
    return min(fitting, key=lambda at: fitting[at], default=None)


class Product(torch.autograd.Function):
    """x [M, K] times w^T [K, N] and b, by the table of docs/schemes.md."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, kept: Tensor | None, scheme: Scheme, match: Match, name: str
    ) -> Tensor:
        on_input = input_scheme(scheme)
        kept_x = None if on_input is None else mask_by_hand(match.input(x), on_input.mask)
        ctx.save_for_backward(x, w, kept, kept_x)
        ctx.scheme, ctx.match, ctx.name = scheme, match, name
        left, right = (x, _sparse(w, kept, scheme).T) if kept_x is None else (_masked(x, kept_x), w.T)
        # Rounded once, as by the graph, see `_adds_at_once`.
        return left @ right if b is None else torch.addmm(b, left, right)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, kept, kept_x = ctx.saved_tensors
        on_weight, on_input, on_grad = (of(ctx.scheme) for of in (weight_scheme, input_scheme, gradient_scheme))
        grad_weight = grad_input = None
        if ctx.needs_input_grad[0]:
            estimate = grad
            if isinstance(on_grad, sp.GradientSparsity) and on_grad.grad_input == "mvue":
                estimate = ctx.match.grad(grad.T, ctx.name, "grad_input").T
            grad_input = estimate @ _sparse(w, kept, ctx.scheme)
        if grad_input is not None and on_input is not None and on_input.grad_input == "masked":
            grad_input = _masked(grad_input, kept_x)
        if ctx.needs_input_grad[1]:
            if on_grad is not None and on_grad.grad_weight == "mvue":
                grad_weight = ctx.match.grad(grad, ctx.name, "grad_weight").T @ x
            else:
                grad_weight = grad.T @ _masked(x, kept_x)
            if on_weight is not None and on_weight.grad_weight == "masked":
                grad_weight = _masked(grad_weight, kept)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return grad_input, grad_weight, grad_bias, None, None, None, None


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
    if way == "Conv1D":
        weight, kept = weight.T, None if kept is None else kept.T
    rows, halves = x.to(dtype).reshape(-1, x.shape[-1]), 2 if way == "halves" else 1
    weights = weight.chunk(halves)
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
    parts = [Product.apply(rows, w, inside, k, scheme, match, name) for w, k in zip(weights, kepts, strict=True)]
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
        if isinstance(scheme, sp.WeightSparsity) and scheme.grad_weight != "mvue"
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
