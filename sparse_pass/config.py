"""The schemes a user can name for a linear layer, and the mapping that names them.

A leaf of the import graph: frozen values and their validation, nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import isfinite
from typing import Literal, TypeAlias, TypeVar, get_args

Mask: TypeAlias = Literal["optimal", "greedy"]
GradWeight: TypeAlias = Literal["dense", "masked", "mvue"]
Precision: TypeAlias = Literal["captured", "float8"]
Backend: TypeAlias = Literal["auto", "cusparselt", "masked_dense"]

Estimate: TypeAlias = Literal["dense", "mvue"]

InputMask: TypeAlias = Literal["optimal", "greedy", "rowwise"]
GradInput: TypeAlias = Literal["dense", "masked"]

Tune: TypeAlias = Literal["auto", "off"]
Require: TypeAlias = Literal["sparse"]

NORM_SCALE = 1.105
"""|W| / |S(W)| of normally distributed weights: 1.1053 for the optimal masks, 1.1047 for the greedy ones."""

_WEIGHT_CHOICES = {
    "mask": get_args(Mask),
    "grad_weight": get_args(GradWeight),
    "precision": get_args(Precision),
    "backend": get_args(Backend),
}
_INPUT_CHOICES = {"mask": get_args(InputMask), "grad_input": get_args(GradInput), "backend": get_args(Backend)}
_GRADIENT_CHOICES = {
    "grad_weight": get_args(Estimate),
    "grad_input": get_args(Estimate),
    "precision": get_args(Precision),
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

    scale: float | Literal["norm"] = 1.0
    """A factor of S(weight), which is then ``scale * weight`` where the mask keeps it, rounded to the dtype of the
    parameter; the gradient stays straight-through. ``"norm"``: 1.105, which keeps the norm of normally distributed
    weights, of which the masks keep 0.82 of the sum of squares (a fixed factor, as S-STE's, arXiv 2409.09099)."""

    precision: Precision = "captured"
    """``"captured"``: GEMMs multiply in the dtype that the graph has. ``"float8"``: those of output and grad_input
    multiply values rounded to float8_e4m3fn, the input, grad_output and S(weight), each times a power of two: the
    largest at which the largest magnitude of the tensor is at most 448 (of all of the stored weight, masked or not).
    A 2:4 product is rounded to bfloat16 and then divided by the scales; results have the captured dtype. Tensor cores
    add float8 in somewhat less than float32. ``grad_weight="mvue"`` is in float8 as well, with the values of
    the input that output multiplies; ``"dense"`` and ``"masked"`` stay in the captured precision. Kernels need compute
    capability 9.0, 16-bit GEMMs, and N and K to be multiples of 64. Other GEMMs of output and grad_input go to
    ``torch._scaled_mm`` (8.9 and newer, multiples of 16, not with ``backend="masked_dense"``), or are dense matmuls of
    the same numbers."""

    backend: Backend = "auto"
    """``"auto"``: cuSPARSELt where it can run, else masked_dense. ``"cusparselt"``: the same, and on a CPU
    the slow reference kernels (for tests). ``"masked_dense"``: dense matmuls with the masked weight."""

    @property
    def factor(self) -> float:
        """``scale`` as a number."""
        return NORM_SCALE if self.scale == "norm" else float(self.scale)

    def __post_init__(self) -> None:
        _check_choices(self, _WEIGHT_CHOICES)
        number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if self.scale != "norm" and not (number and isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"WeightSparsity(scale={self.scale!r}): expected a finite number > 0 or 'norm'")
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
    is ``grad_output``, and the input is dense there. In a tuple with a :class:`GradientSparsity` the input is sparse in
    ``output``, and in ``grad_weight`` unless that is estimated from a sparse ``grad_output``.

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


@dataclass(frozen=True, kw_only=True, slots=True)
class GradientSparsity:
    """Dense weights and inputs, and a backward whose matmuls read a 2:4 ``grad_output``, unbiased.

    For ``output = input @ weight.T + bias`` with input [M, K] and weight [N, K], the named linear computes::

        output      = input @ weight.T + bias            [M, N]   as captured
        grad_input  = grad_output @ weight               [M, K]   (see ``grad_input``)
        grad_weight = E(grad_output.T) @ input           [N, K]   (see ``grad_weight``)

    E keeps two of every four numbers along the dim that the matmul contracts over and scales them, at random: the
    expectation is ``grad_output``, and the variance is the least possible (Chmiel et al. 2023, "Minimum Variance
    Unbiased N:M Sparsity for the Neural Gradients", arXiv 2203.10991). The backward is linear in ``grad_output``, so
    that all gradients of the model are right in expectation. Each matmul and each backward draws anew, from torch's
    generator: ``torch.manual_seed`` reproduces it. The trained model is a dense one: evaluation, checkpoints and
    :func:`sparse_pass.prune_` leave it dense.

    ``grad_weight="mvue"`` is that of :class:`WeightSparsity`, without 2:4 weights. A tuple with a
    :class:`WeightSparsity` is refused: that scheme has the field itself, and its 2:4 operand of grad_input is the
    weight. In a tuple with an :class:`ActivationSparsity` the input is 2:4 in ``output``, and in ``grad_weight`` where
    that is dense here. The sparse kernels need N to be a multiple of 64, K of 16, and 16 bits.

    Raises:
        ValueError: a field has a value outside its choices, or all is dense; the message names field and value.
    """

    grad_weight: Estimate = "mvue"
    """``"mvue"``: from a 2:4 ``grad_output.T``, two of every four rows of each feature. ``"dense"``: as captured."""

    grad_input: Estimate = "dense"
    """``"dense"``: as captured. ``"mvue"``: from a 2:4 ``grad_output``, two of every four features of each row. What it
    adds to the variance reaches all layers before this one, other than that of ``grad_weight``."""

    precision: Precision = "captured"
    """``"float8"``: all three matmuls in float8, as of :class:`WeightSparsity`: output and grad_input by
    ``torch._scaled_mm`` (compute capability 8.9 and newer; elsewhere dense matmuls of the same numbers), grad_weight by
    2:4 kernels. Needs ``grad_input="dense"`` and ``grad_weight="mvue"``."""

    backend: Backend = "auto"
    """``"auto"``: cuSPARSELt where it can run, else dense matmuls of the same estimate. ``"cusparselt"``: the same, and
    on a CPU the slow reference kernels (for tests). ``"masked_dense"``: dense matmuls of the estimate."""

    def __post_init__(self) -> None:
        _check_choices(self, _GRADIENT_CHOICES)
        if self.grad_weight == self.grad_input == "dense":
            raise ValueError(
                "GradientSparsity(grad_weight='dense', grad_input='dense'): one of them must be 'mvue'; to leave a"
                " layer dense map it to None"
            )

        if self.precision == "float8" and self.grad_input != "dense":
            raise ValueError(
                f"GradientSparsity(precision='float8', grad_input={self.grad_input!r}): an estimate along N has no"
                " float8 kernels; use grad_input='dense' or precision='captured'"
            )

    def __str__(self) -> str:
        """The fields that differ from their defaults, for tables: ``grad24(grad_input=mvue)``."""
        return _short("grad24", self)


Single: TypeAlias = "WeightSparsity | ActivationSparsity | GradientSparsity"


def _check_choices(scheme: Single, fields: Mapping[str, tuple[str, ...]]) -> None:
    for name, choices in fields.items():
        value = getattr(scheme, name)
        if value not in choices:
            listed = ", ".join(map(repr, choices))
            raise ValueError(f"{type(scheme).__name__}({name}={value!r}): expected one of {listed}")


def _short(name: str, scheme: Single) -> str:
    changed = [f"{f.name}={getattr(scheme, f.name)}" for f in fields(scheme) if getattr(scheme, f.name) != f.default]
    return f"{name}({', '.join(changed)})" if changed else name


_WithWeights: TypeAlias = "tuple[WeightSparsity, ActivationSparsity] | tuple[ActivationSparsity, WeightSparsity]"
_WithGradients: TypeAlias = "tuple[GradientSparsity, ActivationSparsity] | tuple[ActivationSparsity, GradientSparsity]"
Scheme: TypeAlias = "Single | _WithWeights | _WithGradients"
Config: TypeAlias = Mapping[str, "Scheme | None"]


def weight_scheme(scheme: Scheme | None) -> WeightSparsity | None:
    """What is said of the weight."""
    return _part(scheme, WeightSparsity)


def input_scheme(scheme: Scheme | None) -> ActivationSparsity | None:
    """What is said of the input."""
    return _part(scheme, ActivationSparsity)


def gradient_scheme(scheme: Scheme | None) -> WeightSparsity | GradientSparsity | None:
    """What is said of grad_output: that of a 2:4 weight is a matter of its ``grad_weight``."""
    return _part(scheme, GradientSparsity) or _part(scheme, WeightSparsity)


def is_float8(scheme: Scheme | None) -> bool:
    """Whether the matmuls of output and grad_input are to be in float8."""
    said = weight_scheme(scheme) or gradient_scheme(scheme)
    return said is not None and said.precision == "float8"


_Part = TypeVar("_Part")


def _part(scheme: Scheme | None, kind: type[_Part]) -> _Part | None:
    parts = scheme if isinstance(scheme, tuple) else (scheme,)
    return next((part for part in parts if isinstance(part, kind)), None)


_KINDS = frozenset({WeightSparsity, ActivationSparsity, GradientSparsity})


def why_no_scheme(value: object) -> str | None:
    """Why a value of a config is no scheme, and what to write instead; None if it is one."""
    parts = value if isinstance(value, tuple) else (value,)
    kinds = {type(part) for part in parts}
    if kinds <= _KINDS and {WeightSparsity, GradientSparsity} <= kinds:
        return (
            "a WeightSparsity and a GradientSparsity cannot be together: the 2:4 operand of grad_input is the weight,"
            " and for grad_weight write WeightSparsity(grad_weight='mvue') instead of the two"
        )
    pair = len(parts) == len(kinds) == 2 and ActivationSparsity in kinds
    if kinds <= _KINDS and (pair or not isinstance(value, tuple)):
        return None
    hint = f"; instantiate it: {value.__name__}()" if isinstance(value, type) and value in _KINDS else ""
    return (
        "expected a WeightSparsity or None (leave dense), an ActivationSparsity, a GradientSparsity, or a tuple of an"
        f" ActivationSparsity and one of the others{hint}"
    )


def scheme_text(scheme: Scheme) -> str:
    """For tables: ``w24 + act24``."""
    return " + ".join(map(str, scheme)) if isinstance(scheme, tuple) else str(scheme)
