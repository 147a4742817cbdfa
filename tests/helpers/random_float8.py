"""What a compiled random network rounded to float8, and what its reference rounds in its place.

A number next to the middle of two of float8 becomes either of them, depending on a last bit, and then differs by up to
an eighth. So the reference rounds the numbers that the operators of the compiled network were given, by its own hand.
A network rounds a tensor before the views that bring it to a matmul, so its dims may be in another order there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import permutations
from typing import Any, NamedTuple

import torch
from float8_by_hand import rounded, scale_by_hand
from torch import Tensor


class Rounding(NamedTuple):
    """A tensor that is rounded."""

    tensor: Tensor
    scale: float

    def gives(self, scaled: Tensor) -> bool:
        """Whether these are its float8 numbers, times the scale."""
        return _far(rounded(self.tensor.float(), self.scale) * self.scale, scaled) == 0


class SeenFloat8:
    """What the float8 operators of one call of a compiled network were given."""

    def __init__(self) -> None:
        self.rounded: list[Rounding] = []
        self.multiplied: set[int] = set()
        """Which of these float8 products read."""
        self.others: list[Tensor] = []
        """What such products read beside, times its scale: Inductor rounds in kernels that nobody sees."""
        self.watched: Mapping[str, Callable[..., None]] = {
            "round_float8": self.round,
            "quantize_float8": self.round,
            "sparsify_float8": self._pack,
            "linear": self._multiply,
            "linear_into": self._multiply,
        }

    def round(self, tensor: Tensor, scale: Tensor) -> None:
        if tensor.numel():
            self.rounded.append(Rounding(tensor.detach().clone(), float(scale)))

    def _pack(self, weight: Tensor, scale: Tensor, mask: str, factor: float = 1.0) -> None:
        assert float(scale) == scale_by_hand(weight, factor), "another scale of a packed weight"

    def _multiply(self, x: Tensor, *rest: Any, **kwargs: Any) -> None:
        if x.dtype == torch.float8_e4m3fn and x.numel():
            made = {at for at, one in enumerate(self.rounded) if one.gives(x.float())}
            self.multiplied |= made
            self.others += [] if made else [x.float()]


class _Made(NamedTuple):
    """What the reference rounds in one place."""

    given: Tensor
    """As the network has it."""
    is_rounded: bool
    """Whether that is rounded already, see `SeenFloat8.others`."""
    result: Tensor
    multiplied: bool


class MatchFloat8:
    """What a run of the reference takes of `SeenFloat8`, as `random_seen.Match`."""

    def __init__(self, seen: SeenFloat8, like: MatchFloat8 | None = None) -> None:
        self._seen, self._like = seen, like
        self._made: list[_Made] = []
        self._taken: list[Rounding] = []
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def operand(self, x: Tensor) -> tuple[Tensor, bool]:
        """What a matmul reads of an input or a grad_output, in the dtype of that; and whether it is a product of float8
        numbers, which gives bfloat16. An empty tensor stays as it is."""
        if x.numel() == 0:
            return x, False
        made = self._nearest(x) if self._like is None else self._like._made[len(self._made)]
        self._made.append(made)
        own = rounded(x, scale_by_hand(x)) if made.is_rounded else x.detach()
        self.pairs.append((made.given.to(x.dtype), own))
        return made.result.to(x.dtype), made.multiplied

    def known(self, tensor: Tensor, scale: float) -> Tensor:
        """What becomes of a tensor that the network must have with the same bits."""
        if tensor.numel():
            self._taken.append(Rounding(tensor, scale))
        return rounded(tensor, scale)

    def _nearest(self, x: Tensor) -> _Made:
        scale = scale_by_hand(x)
        far, at = _nearest(x, [one.tensor for one in self._seen.rounded])
        other_far, other_at = _nearest(rounded(x.float(), scale) * scale, self._seen.others)
        assert min(far, other_far) < 0.5, f"no input or grad_output like this {list(x.shape)} was rounded"
        if other_far < far:
            given = _in_the_order_of(x, self._seen.others[other_at] / scale)
            return _Made(given, True, given, True)
        self._taken.append(taken := self._seen.rounded[at])
        given = _in_the_order_of(x, taken.tensor)
        assert taken.scale == scale_by_hand(given), f"rounded times {taken.scale}"
        return _Made(given, False, rounded(given, taken.scale), at in self._seen.multiplied)

    def check_all_taken(self, tolerance: float) -> None:
        """Nothing was rounded that the reference has not, and nothing by another scale."""
        for one in self._seen.rounded:
            found = any(
                one.scale == other.scale and _far(one.tensor, other.tensor) <= tolerance for other in self._taken
            )
            assert found, f"{list(one.tensor.shape)} was rounded, times {one.scale}, that the reference has not"


def _sorted(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().sort().values


def _far(one: Tensor, other: Tensor) -> float:
    """Relative distance of the numbers in two tensors, in whatever order. The other one may be expanded."""
    if other.numel() % one.numel():
        return float("inf")
    expected = _sorted(other).double()
    difference = _sorted(one).double().repeat_interleave(other.numel() // one.numel()) - expected
    norm = expected.norm()
    return float(difference.norm() / norm) if norm else float(difference.norm())


def _nearest(x: Tensor, among: list[Tensor]) -> tuple[float, int]:
    """How far it is, and its number; of those as far, as zeros are, the largest."""
    distances = ((_far(one, x), -one.numel(), at) for at, one in enumerate(among))
    far, _, at = min(distances, default=(float("inf"), 0, -1))
    return far, at


def _in_the_order_of(x: Tensor, tensor: Tensor) -> Tensor:
    """What is given of a tensor, as the tensor has it.

    That is by some order of dims; else, as of what is expanded afterwards, by rank: the smallest number goes where that
    has its smallest. Two that are nearly alike may be exchanged by that.
    """
    x = x.detach()
    if tensor.numel() == x.numel():
        for dims in permutations(range(tensor.dim())):
            moved = tensor.permute(dims).reshape(x.shape)
            if (moved.double() - x.double()).norm() <= 0.1 * x.double().norm():
                return moved
    result = tensor.new_empty(x.numel())
    result[x.flatten().argsort()] = _sorted(tensor).repeat_interleave(x.numel() // tensor.numel())
    return result.view(x.shape)
