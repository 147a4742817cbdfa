"""The plan of a graph, as frozen values: for each named linear its GEMMs, what each reads, by which kernel, and why.

Nodes in it are those of the captured graph. ``apply`` edits by it, and the report is made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from ..config import Precision, Scheme
from ..fqn import Pattern
from ..graph.activation_functions import ActivationFunction
from ..graph.find import OtherWeight
from ..graph.gemms import GemmName, Linear, Role, Use
from ..graph.inputs import OperandRead


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something is not done, or not by a sparse kernel."""

    gemm: GemmName | None
    """Of which GEMM it is told; None for that of the output, or for the layer as a whole."""
    text: str
    measured: bool = field(default=False, compare=False)
    """Whether a measurement has found dense matmuls of the masked operand faster."""

    def __str__(self) -> str:
        return f"{self.gemm}: {self.text}" if self.gemm else self.text


@dataclass(frozen=True, slots=True, eq=False)
class Named:
    """One call of a linear, and the config entry that names it."""

    linear: Linear
    pattern: Pattern
    scheme: Scheme


@dataclass(frozen=True, slots=True, eq=False)
class Gemm:
    """One GEMM of a linear in the captured graph."""

    name: GemmName
    node: Node
    places: Mapping[Role, int] = field(default_factory=dict)
    """Operand index by role, where they are known."""
    weight_read: Use | None = None
    """How it reads the weight, if it does."""
    input_reads: tuple[OperandRead, ...] = ()
    """How it reads the input, if that is to be 2:4."""
    dense_read: OperandRead | None = None
    """How it reads the operand beside the structured one, if that is to be rounded to float8."""
    structured_read: OperandRead | None = None
    """How it reads grad_output, if the estimate of it is to be rounded to float8."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """One packed tensor, made of a structured operand."""

    dtype: torch.dtype
    transposed: bool
    """Whether it is the transpose that is packed."""
    before: Node
    """The first GEMM that reads it."""
    together: bool
    """Whether one kernel packs the operand and its transpose, before anything reads either of them."""
    in_backward: bool = False
    """Whether only the backward reads it, so that nothing is kept for it from the forward."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """One structured operand, shared by all GEMMs of the graph that read it, and what is made of it."""

    role: Role
    source: Node
    """The weight, the input, or grad_output as its GEMM reads it."""
    structure: str
    """The mask of a weight or an input; the estimator of grad_output; empty for a dense weight in float8."""
    before: Node
    """The first GEMM, or op that computes something from a weight, that reads it: all is made before that."""
    scale: float = 1.0
    """Of a weight: a factor of the 2:4 one."""
    precision: Precision = "captured"
    """Of a weight: whether the 2:4 one is rounded to float8."""
    mask: bool = False
    dense: bool = False
    dense_float8: bool = False
    """Of a weight: the 2:4 one as a dense tensor of float8 values, for `GemmPlan.scaled_mm`."""
    packed: tuple[Packed, ...] = ()
    readers: tuple[Use, ...] = ()
    """Of a weight: ops that compute something from it, and read the dense one instead."""
    k_last: bool = True
    """Of an input: whether K is its last dim; else it is the last but one."""
    activation: ActivationFunction | None = None
    """Of an input: the function that the kernel computes while it packs."""
    sums: tuple[Node, ...] = ()
    """Of a grad_output: sums of it for the gradient of a bias, which the kernel gives on the way."""


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """A tensor that is rounded to float8, by one scale for all GEMMs of the graph that read it or an estimate of it."""

    before: Node
    """The first of them."""


@dataclass(frozen=True, slots=True, eq=False)
class GemmPlan:
    """What one GEMM becomes: a product by a sparse kernel if ``packed``, else the captured one of a masked operand."""

    gemm: Gemm
    prepared: Prepared
    """The structured operand that it reads."""
    packed: Packed | None
    kernel: str
    """As the report has it."""
    tuned: bool
    """Whether the sparse kernel may be the one that measures fastest."""
    reason: Reason | None = None
    """Why it is not sparse."""
    rounded: Rounded | None = None
    """The operand beside the structured one, if it is rounded to float8: the one that `Gemm.dense_read` reads."""
    estimated: Rounded | None = None
    """grad_output, if its estimate is rounded to float8: the one that `Gemm.structured_read` reads."""
    scaled_mm: bool = False
    """Of one that is not sparse: whether it multiplies float8 operands all the same, by ``torch._scaled_mm``."""

    @property
    def options(self) -> dict[str, bool]:
        """Keyword arguments of the operator of a sparse product."""
        return {"tuned": True} if self.tuned else {}


@dataclass(frozen=True, slots=True, eq=False)
class MaskedInputGradient:
    """A gradient of the input that is masked."""

    node: Node
    moved: bool
    """Whether it is that of the operand that a view makes of the input, and not of the input itself."""


@dataclass(frozen=True, slots=True, eq=False)
class MaskedGradients:
    """What the mask of a weight does to its gradient."""

    operand: Node | None
    """The gradient of the operand of output. The mask takes the way of the weight to the operand first."""
    returned: int | None
    """Which output of the graph, the gradient of the weight, is masked as a whole or gets a decay."""
    whole: bool
    decay: float


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one structured operand means for a call of a linear."""

    prepared: Prepared | None = None
    gemms: tuple[GemmPlan, ...] = ()
    """Those that read the structured operand."""
    masked: MaskedGradients | None = None
    masked_inputs: tuple[MaskedInputGradient, ...] = ()
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class LinearPlan:
    """What becomes of one call of a named linear. GEMMs that no part has stay as they are captured."""

    named: Named
    skipped: Reason | None = None
    """Why nothing at all is done."""
    input: Part = Part()
    weight: Part = Part()
    grad_output: Part = Part()

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Why not sparse, or what was not found."""
        parts = (self.input, self.weight, self.grad_output)
        return (self.skipped,) if self.skipped else tuple(reason for part in parts for reason in part.reasons)

    def kernel(self, name: GemmName) -> str | None:
        """The kernel of a GEMM as the report has it; None where the graph has no such GEMM."""
        gemms = (*self.input.gemms, *self.weight.gemms, *self.grad_output.gemms)
        plans = [plan for plan in gemms if plan.gemm.name == name]
        if plans:
            return next((plan.kernel for plan in plans if plan.packed is None), plans[0].kernel)
        linear = self.named.linear
        there = {"output": True, "grad_input": bool(linear.grad_input), "grad_weight": linear.has_gradient}
        return "dense" if there[name] else None


@dataclass(frozen=True, slots=True)
class OtherPlan:
    """A named weight of which no matmul was found."""

    weight: OtherWeight
    pattern: Pattern
    scheme: Scheme
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of all that is named in one graph."""

    linears: tuple[LinearPlan, ...]
    others: tuple[OtherPlan, ...]
    unmatched: tuple[str, ...]
    """Config keys that name nothing in it."""
    notes: tuple[str, ...] = ()
    """What is told of the devices."""
