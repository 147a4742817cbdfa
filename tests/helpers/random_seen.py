"""What the operators of a compiled random network were given, and what its reference takes of it.

What is chosen from numbers that rounding may change is not chosen twice: a near tie of two magnitudes has either mask,
a last bit of grad_output draws another element, and a number next to the middle of two of float8 becomes either. So the
operators of the compiled network are watched, and the reference masks by what they saw, draws with their seeds, and
rounds what they rounded. That they saw what it has itself is compared too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from float8_by_hand import scale_by_hand
from random_float8 import MatchFloat8, SeenFloat8
from torch import Tensor

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
GRADS = ("mvue24", "sparsify_mvue", "sparsify_mvue_sum", "sparsify_mvue_float8")


class Seen:
    """What the operators of one call of a compiled network were given."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        """As a matrix, after the activation function that is fused."""
        self.grads: list[tuple[Tensor, Tensor]] = []
        """grad_output, and the seed."""
        self.packed_float8: set[int] = set()
        """Which of these are packed in float8."""
        self.float8 = SeenFloat8()

    @contextmanager
    def watching(self) -> Iterator[None]:
        modules: list[Any] = [compiled]  # what Inductor's code calls, beside the operators
        if torch.cuda.is_available():
            from sparse_pass.kernels import compiled as compiled_for_gpus

            modules.append(compiled_for_gpus)
        library = torch.library.Library("sparse_pass", "IMPL")
        with ExitStack() as stack:
            stack.callback(library._destroy)
            for name in (*INPUTS, *GRADS, *self.float8.watched):
                for module in modules:
                    if hasattr(module, name):
                        watched = self._watched(getattr(module, name), name)
                        stack.enter_context(mock.patch.object(module, name, watched))
                kernels = getattr(definitions, name.upper(), None)
                if kernels is None:
                    continue  # for Inductor's code alone
                library.impl(name, self._watched(kernels.cpu, name), "CPU", allow_override=True)
                library.impl(name, self._watched(kernels.cuda, name), "CUDA", allow_override=True)
            yield

    def _watched(self, kernel: Callable[..., Any], name: str) -> Callable[..., Any]:
        note = self._input if name in INPUTS else self._grad if name in GRADS else self.float8.watched[name]

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

    def _grad(self, grad: Tensor, seed: Tensor, scale: Tensor | None = None) -> None:
        if grad.numel():
            if scale is not None:
                self.packed_float8.add(len(self.grads))
                self.float8.round(grad, scale)
            self.grads.append((grad.detach().clone(), seed.clone()))


class Match:
    """What a run of the reference takes of `Seen`.

    A call takes the nearest that was seen, as there are calls that no operator sees and operators that run again in a
    backward.

    Args:
        like: another run of the reference, the choices of which are repeated.
    """

    def __init__(self, seen: Seen, like: Match | None = None) -> None:
        self.seen, self.like = seen, like
        self.inputs: list[int] = []
        self.grads: list[int | None] = []
        self.drawn: dict[tuple[str, str], set[bool]] = defaultdict(set)
        """By the name of a place and of a GEMM: whether what it reads was drawn."""
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self.float8 = MatchFloat8(seen.float8, like and like.float8)

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """What was seen, and beside it what the reference has in its place: they must agree."""
        return [*self._pairs, *self.float8.pairs]

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
        self._pairs.append((self.seen.inputs[at].to(x.dtype), x.detach()))
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
        self._pairs.append((self.seen.grads[at][0].to(grad.dtype), grad))
        return reference_gradients.mvue24(*self.seen.grads[at]).to(grad.dtype)

    def grad_float8(self, grad: Tensor, name: str, gemm: str) -> tuple[Tensor, bool] | None:
        """The estimate rounded to float8, and whether it was packed; None if it stayed dense, or is empty.

        It may be twice as large as what it estimates, so it has half the scale of that.
        """
        estimate = self.grad(grad, name, gemm)
        at = self.grads[-1] if grad.numel() else None
        if at is None:
            return None
        given, _ = self.seen.grads[at]
        scale = scale_by_hand(given)
        self.float8.known(given, scale)  # by the kernel that packs the estimate, also where nothing reads it
        return self.float8.known(estimate, scale / 2), at in self.seen.packed_float8

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
        self.float8.check_all_taken(tolerance)


def _distance(one: Tensor, two: Tensor) -> float:
    return float((one.detach().double() - two.detach().double()).norm())


def _nearest(x: Tensor, among: Mapping[int, Tensor]) -> int | None:
    fitting = {at: _distance(one, x) for at, one in among.items() if one.shape == x.shape}
    return min(fitting, key=lambda at: fitting[at], default=None)
