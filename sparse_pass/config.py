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

InputMask: TypeAlias = Literal["optimal", "greedy", "rowwise"]
GradInput: TypeAlias = Literal["dense", "masked"]

Tune: TypeAlias = Literal["auto", "off"]
Require: TypeAlias = Literal["sparse"]

_WEIGHT_CHOICES = {"mask": get_args(Mask), "grad_weight": get_args(GradWeight), "backend": get_args(Backend)}
_INPUT_CHOICES = {"mask": get_args(InputMask), "grad_input": get_args(GradInput), "backend": get_args(Backend)}


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSparsity:
    """2:4 sparse weights with a straight-through gradient.

    For ``output = input @ weight.T + bias`` with input [M, K] and weight [N, K], the named linear computes::

        output      = input @ S(weight).T + bias       [M, N]
        grad_input  = grad_output @ S(weight)          [M, K]
        grad_weight = grad_output.T @ input            [N, K]   (see ``grad_weight``)

    S keeps 2 of every 4 weights along rows and along columns (one mask per 4x4 tile) and is computed
    from the live weight in every forward. The mask is chosen on the parameter as the compiled code is given it: as it
    is stored, before any autocast, so that training, :func:`sparse_pass.prune_` and deployment agree on it. FSDP2 with
    ``MixedPrecisionPolicy(param_dtype=...)`` gives it rounded: ``prune_`` asks the policy, or its ``dtype``.

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
    that the mask drops, once per weight and compiled graph, in each backward. It is part of the gradient: where
    several micro-steps accumulate one, each of n adds it, so divide it by n, as the loss; a loss scaler scales it
    down with the rest, so multiply it by the scale or train in bfloat16. 0 turns it off."""

    backend: Backend = "auto"
    """``"auto"``: cuSPARSELt where it can run, else masked_dense. ``"cusparselt"``: the same, and on a CPU
    the slow reference kernels (for tests). ``"masked_dense"``: dense matmuls with the masked weight."""

    def __post_init__(self) -> None:
        _check_choices(self, _WEIGHT_CHOICES)
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)):
            raise ValueError(f"WeightSparsity(decay={self.decay!r}): expected a number >= 0")
        if not 0.0 <= self.decay < float("inf"):
            raise ValueError(f"WeightSparsity(decay={self.decay!r}): expected a finite number >= 0")

    def __str__(self) -> str:
        """The fields that differ from their defaults, for tables: ``w24(mask=greedy)``."""
        return _short("w24", self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationSparsity:
    """2:4 sparse inputs with a straight-through gradient.

    For ``output = input @ weight.T + bias`` with input [M, K] and weight [N, K], the named linear computes::

        output      = S(input) @ weight.T + bias       [M, N]
        grad_input  = grad_output @ weight             [M, K]   (see ``grad_input``)
        grad_weight = grad_output.T @ S(input)         [N, K]

    S keeps 2 of every 4 numbers of the input, which suits inputs that are mostly zeros, such as after a squared
    ReLU. The mask is chosen on what the matmul reads, that is after any autocast. Leading dims are flattened into
    M; a last tile of fewer than four rows is filled with zeros. K must be a multiple of 4; the sparse kernels need a
    multiple of 64, N of 16, and 16 bits. Where a squared ReLU, a GELU or a SiLU times a gate makes the input, and
    nothing else reads its result, the kernel computes it too, in float32 and rounded once (``Site.fused``).

    In a tuple with a :class:`WeightSparsity`, one operand of each matmul is sparse: in ``output`` and
    ``grad_weight`` the input, in ``grad_input`` the weight. With ``grad_weight="mvue"`` that of ``grad_weight``
    is ``grad_output``, and the input is dense there.

    Raises:
        ValueError: a field has a value outside its choices; the message names field and value.
    """

    mask: InputMask = "optimal"
    """``"optimal"`` and ``"greedy"``: 2 of 4 along rows and along columns, by tiles of 4x4 as for weights; what
    is kept of a row depends on the other rows of its tile, so not for a model that must not look at later tokens.
    ``"rowwise"``: the 2 largest of every 4 features of a row, whatever the other rows are; not 2:4 along M, over
    which ``grad_weight`` contracts, so that its matmul can never be a sparse one: always masked_dense."""

    grad_input: GradInput = "dense"
    """``"dense"``: straight-through. ``"masked"``: the gradient of masked-out inputs is zero."""

    backend: Backend = "auto"
    """As of :class:`WeightSparsity`."""

    def __post_init__(self) -> None:
        _check_choices(self, _INPUT_CHOICES)

    def __str__(self) -> str:
        """The fields that differ from their defaults, for tables: ``act24(mask=rowwise)``."""
        return _short("act24", self)


def _check_choices(scheme: WeightSparsity | ActivationSparsity, fields: Mapping[str, tuple[str, ...]]) -> None:
    for name, choices in fields.items():
        value = getattr(scheme, name)
        if value not in choices:
            listed = ", ".join(map(repr, choices))
            raise ValueError(f"{type(scheme).__name__}({name}={value!r}): expected one of {listed}")


def _short(name: str, scheme: WeightSparsity | ActivationSparsity) -> str:
    changed = [f"{f.name}={getattr(scheme, f.name)}" for f in fields(scheme) if getattr(scheme, f.name) != f.default]
    return f"{name}({', '.join(changed)})" if changed else name


Both: TypeAlias = "tuple[WeightSparsity, ActivationSparsity] | tuple[ActivationSparsity, WeightSparsity]"
Scheme: TypeAlias = "WeightSparsity | ActivationSparsity | Both"
Config: TypeAlias = Mapping[str, "Scheme | None"]


def weight_scheme(scheme: Scheme | None) -> WeightSparsity | None:
    """What is said of the weight."""
    parts = scheme if isinstance(scheme, tuple) else (scheme,)
    return next((part for part in parts if isinstance(part, WeightSparsity)), None)


def input_scheme(scheme: Scheme | None) -> ActivationSparsity | None:
    """What is said of the input."""
    parts = scheme if isinstance(scheme, tuple) else (scheme,)
    return next((part for part in parts if isinstance(part, ActivationSparsity)), None)


def scheme_text(scheme: Scheme) -> str:
    """For tables: ``w24 + act24``."""
    return " + ".join(map(str, scheme)) if isinstance(scheme, tuple) else str(scheme)
