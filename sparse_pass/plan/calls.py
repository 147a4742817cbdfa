"""One call that is rewritten, as the parts of the plan see it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..config import ActivationSparsity, WeightSparsity, input_scheme, weight_scheme
from ..graph.gemms import GemmName, Linear, Role
from .limits import AskLimits, Limits
from .table import structured_operands
from .values import Named


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call of a linear, what its scheme says, and what its device can do."""

    linear: Linear
    weight: WeightSparsity | None
    input: ActivationSparsity | None
    structured: Mapping[GemmName, Role | None]
    limits: Limits

    @property
    def kernel(self) -> str:
        """The name of the sparse kernels, for the report."""
        return "cusparselt" if self.limits.device == "cuda" else "reference"


def call_of(named: Named, limits: AskLimits) -> Call:
    """The call as the parts of the plan see it."""
    linear, scheme = named.linear, named.scheme
    device, dtype = linear.weight.meta["val"].device, linear.output.operand.meta["val"].dtype
    structured = structured_operands(scheme)
    return Call(linear, weight_scheme(scheme), input_scheme(scheme), structured, limits(device, dtype))
