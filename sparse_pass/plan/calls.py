"""One call that is rewritten, as the parts of the plan see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..config import (
    ActivationSparsity,
    GradientSparsity,
    WeightSparsity,
    gradient_scheme,
    input_scheme,
    is_float8,
    weight_scheme,
)
from ..graph.gemms import GemmName, Linear, Role, Use
from ..vocabulary import FLOAT8
from .limits import AskLimits, Limits
from .table import estimated, structured_operands
from .values import Named


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call of a linear, what its scheme says, and what its device can do."""

    linear: Linear
    weight: WeightSparsity | None
    input: ActivationSparsity | None
    gradient: WeightSparsity | GradientSparsity | None
    structured: Mapping[GemmName, Role | None]
    estimated: Mapping[GemmName, str]
    """The estimator of grad_output, by the GEMM that reads it."""
    limits: Limits
    """For GEMMs of the captured dtype."""
    weight_limits: Limits
    """For those in the precision of the scheme: of the weight, and of a 2:4 grad_weight in float8."""
    is_float8: bool
    """Whether the GEMMs of the weight are to multiply in float8, and a 2:4 grad_weight with them."""

    def weight_uses(self) -> Iterator[tuple[GemmName, Use]]:
        """The GEMMs that read the weight."""
        for use in (self.linear.output, *self.linear.again):
            yield "output", use
        for use in self.linear.grad_input:
            yield "grad_input", use

    @property
    def kernel(self) -> str:
        """The name of the sparse kernels, for the report."""
        return self.limits.kernel if self.limits.device == "cuda" else "reference"


def call_of(named: Named, limits: AskLimits) -> Call:
    """The call as the parts of the plan see it."""
    linear, scheme = named.linear, named.scheme
    device, dtype = linear.weight.meta["val"].device, linear.output.operand.meta["val"].dtype
    weight, asked = weight_scheme(scheme), limits(device, dtype)
    return Call(
        linear=linear,
        weight=weight,
        input=input_scheme(scheme),
        gradient=gradient_scheme(scheme),
        structured=structured_operands(scheme),
        estimated=estimated(scheme),
        limits=asked,
        weight_limits=limits(device, FLOAT8) if is_float8(scheme) else asked,
        is_float8=is_float8(scheme),
    )
