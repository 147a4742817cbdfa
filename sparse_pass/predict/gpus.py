"""The measurements that are shipped, and what lies between them: GEMM times by shape, on the GPUs that were measured.

They plan for a GPU from a machine without one. Where there is a GPU nothing here decides: kernels are measured.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, TypeAlias

Shape: TypeAlias = "tuple[int, int, int]"
"""M, K, N."""

_SAME = 0.05
"""Distance in the logarithm of sizes, below which a shape counts as one that was measured by itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """What was measured on one GPU, bfloat16. Times are microseconds."""

    key: str
    """As it is asked for: ``"h100"``."""
    name: str
    """As torch calls it."""
    capability: tuple[int, int]
    copy: float
    """Bytes a microsecond of a copy, read and written."""
    linears: tuple[tuple[Shape, tuple[float, float]], ...]
    """One GEMM of a linear, the mean of its three: shape, dense and 2:4 time."""
    gemms: tuple[tuple[str, Shape, tuple[float, float]], ...]
    """GEMMs that were timed by themselves: form, shape, dense and 2:4 time."""
    preparations: tuple[tuple[tuple[str, str, str], int, float, float | None], ...]
    """Of a structured operand: what it is, its mask and how it is stored; elements; packed time, dense time."""

    def gemm(self, form: str, m: int, n: int, k: int) -> tuple[float, float]:
        """Dense and 2:4 time of a GEMM of a linear [M, N, K].

        Measured at this shape by itself, or else interpolated between whole linears, as microseconds a multiplication:
        by the logarithm of M for each size of weight, and by nearness among these. Sizes beyond all of them take the
        nearest rate; fewer rows than all take as long as the fewest.
        """
        alone = [(shape, times) for known, shape, times in self.gemms if known == form]
        for shape, times in alone:
            if _distance(shape, (m, k, n)) < _SAME:
                scale = m * n * k / math.prod(shape)
                return times[0] * scale, times[1] * scale
        by_weight: dict[tuple[int, int], list[tuple[int, tuple[float, float]]]] = {}
        for (rows, cols, features), times in self.linears:
            by_weight.setdefault((cols, features), []).append((rows, times))
        near = {weight: 1 / (_between(weight, (k, n)) ** 2 + 1e-4) for weight in by_weight}
        total = sum(near.values())
        found = [0.0, 0.0]
        for weight, points in by_weight.items():
            rates = [[(rows, times[which] / (rows * math.prod(weight))) for rows, times in points] for which in (0, 1)]
            at = max(m, min(rows for rows, _ in points))
            for which in (0, 1):
                found[which] += near[weight] / total * _interpolated(rates[which], at) * at * n * k
        if form == "linear" or not alone:
            return found[0], found[1]
        # Of another form what 2:4 saves differs, and the nearest of its kind tells how much.
        _, times = min(alone, key=lambda one: _distance(one[0], (m, k, n)))
        return found[0], found[0] * times[1] / times[0]

    def preparation(self, operand: str, mask: str, stored: str, elements: int) -> tuple[float, float | None] | None:
        """Time to make a structured operand, packed and dense; None for one that was not measured."""
        rows = [
            (size, packed, dense) for key, size, packed, dense in self.preparations if key == (operand, mask, stored)
        ]
        if not rows:
            return None
        packed = _interpolated([(size, us / size) for size, us, _ in rows], elements) * elements
        of_dense = [(size, dense / size) for size, _, dense in rows if dense is not None]
        return packed, _interpolated(of_dense, elements) * elements if of_dense else None


@functools.cache
def _shipped() -> dict[str, Gpu]:
    data = json.loads((files(__package__) / "measurements.json").read_text())
    return {key: _gpu(key, one) for key, one in data["gpus"].items()}


def known_gpus() -> tuple[str, ...]:
    """The names that `gpu` knows."""
    return tuple(_shipped())


def gpu(name: str) -> Gpu:
    """The measurements of a GPU. ValueError for one that has none, with the names of those that have."""
    if not isinstance(name, str) or name.lower() not in _shipped():
        raise ValueError(f"device={name!r}: measurements are shipped for {', '.join(map(repr, _shipped()))}")
    return _shipped()[name.lower()]


def _gpu(key: str, data: dict[str, Any]) -> Gpu:
    slower = float(data["preparations_slower"])
    return Gpu(
        key=key,
        name=data["name"],
        capability=(data["capability"][0], data["capability"][1]),
        copy=data["copy_gb_s"] * 1e3,
        linears=tuple(((m, k, n), (dense, sparse)) for m, k, n, dense, sparse in data["linears"]),
        gemms=tuple((form, (m, k, n), (dense, sparse)) for form, m, n, k, dense, sparse in data["gemms"]),
        preparations=tuple(
            ((operand, mask, stored), size, packed * slower, None if dense is None else dense * slower)
            for operand, mask, stored, size, packed, dense in data["preparations"]
        ),
    )


def _distance(one: Shape, other: Shape) -> float:
    return max(abs(math.log(a / b)) for a, b in zip(one, other, strict=True))


def _between(one: tuple[int, int], other: tuple[int, int]) -> float:
    """How far two weights are apart: above all by the shorter side, which is what 2:4 kernels gain by."""
    short, long = (math.log(side(one) / side(other)) for side in (min, max))
    return math.hypot(short, long / 2)


def _interpolated(points: Iterable[tuple[int, float]], at: float) -> float:
    """Linear in the logarithm of both; beyond the points the nearest one."""
    grouped: dict[int, list[float]] = {}
    for size, value in points:
        grouped.setdefault(size, []).append(value)
    known = sorted((size, sum(values) / len(values)) for size, values in grouped.items())
    below = [point for point in known if point[0] <= at]
    above = [point for point in known if point[0] >= at]
    if not below or not above:
        return (above or below)[0 if above else -1][1]
    (low, first), (high, second) = below[-1], above[0]
    share = 0.0 if high == low else math.log(at / low) / math.log(high / low)
    return float(first ** (1 - share) * second**share)
