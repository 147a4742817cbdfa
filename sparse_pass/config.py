"""The schemes a user can name for a linear layer, and the mapping that names them.

A leaf of the import graph: frozen values and their validation, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, get_args

Mask: TypeAlias = Literal["optimal", "greedy"]
GradWeight: TypeAlias = Literal["dense", "masked", "mvue"]
Backend: TypeAlias = Literal["auto", "cusparselt", "masked_dense"]

Tune: TypeAlias = Literal["auto", "off"]

_CHOICES = {
    "mask": get_args(Mask),
    "grad_weight": get_args(GradWeight),
    "backend": get_args(Backend),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSparsity:
    """2:4 sparse weights with a straight-through gradient.

    For ``output = input @ weight.T + bias`` with input [M, K] and weight [N, K], the named linear computes::

        output      = input @ S(weight).T + bias       [M, N]
        grad_input  = grad_output @ S(weight)          [M, K]
        grad_weight = grad_output.T @ input            [N, K]   (see ``grad_weight``)

    S keeps 2 of every 4 weights along rows and along columns (one mask per 4x4 tile) and is computed
    from the live weight in every forward. The mask is chosen on the parameter as it is stored, before
    any autocast, so that training, :func:`sparse_pass.prune_` and deployment agree on it.

    Raises:
        ValueError: a field has a value outside its choices; the message names field and value.
    """

    mask: Mask = "optimal"
    """``"optimal"``: the 4x4 mask of largest sum of magnitudes of the 90 that keep 2 per row and column.
    ``"greedy"``: largest magnitudes first (torch core's ``largest_abs_values_greedy``), may keep fewer."""

    grad_weight: GradWeight = "dense"
    """``"dense"``: straight-through. ``"masked"``: the gradient of masked-out weights is zero. ``"mvue"``:
    straight-through with a 2:4 ``grad_output.T``, drawn anew in every step so that the expectation is the dense
    gradient and the variance is the least possible (Chmiel et al. 2023); ``torch.manual_seed`` reproduces it."""

    decay: float = 0.0
    """Masked decay of SR-STE (Zhou et al. 2021): adds ``decay * weight`` to the gradient of the weights
    that the mask drops, once per weight and compiled graph. It is part of the gradient: a loss scaler
    scales it down with the rest, so multiply it by the scale or train in bfloat16. 0 turns it off."""

    backend: Backend = "auto"
    """``"auto"``: cuSPARSELt where it can run, else masked_dense. ``"cusparselt"``: the same, and on a CPU
    the slow reference kernels (for tests). ``"masked_dense"``: dense matmuls with the masked weight."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                listed = ", ".join(map(repr, choices))
                raise ValueError(f"WeightSparsity({name}={value!r}): expected one of {listed}")
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)):
            raise ValueError(f"WeightSparsity(decay={self.decay!r}): expected a number >= 0")
        if not 0.0 <= self.decay < float("inf"):
            raise ValueError(f"WeightSparsity(decay={self.decay!r}): expected a finite number >= 0")

    def __str__(self) -> str:
        """The fields that differ from their defaults, for tables: ``w24(mask=greedy)``."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"w24({', '.join(changed)})" if changed else "w24"


Scheme: TypeAlias = WeightSparsity
Config: TypeAlias = Mapping[str, Scheme | None]
