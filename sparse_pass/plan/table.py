"""The table of schemes: which operand of which GEMM is 2:4, and how a 2:4 grad_output is estimated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..config import Scheme, input_scheme, weight_scheme
from ..graph.gemms import GemmName, Role


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimator:
    """A 2:4 estimate of grad_output [M, N], along M. Operators are named as ``library::name``.

    Each takes ``(grad_output)``, and after it a seed, an int64 tensor of one element, if the estimate is random.
    """

    dense: str
    """Gives the estimate as a dense tensor [M, N]."""
    packed: str = ""
    """Gives its transpose [N, M] packed, for `sparse_pass::grad_weight`. Empty: there is no such kernel."""
    packed_and_sum: str = ""
    """Gives the same, and what sums to the gradient of a bias. Empty: there is no such kernel."""
    random: bool = False
    measured_as: str = ""
    """The operand that `Costs` times for it. Empty: what it costs is not counted."""


ESTIMATORS: dict[str, Estimator] = {
    "mvue": Estimator(
        dense="sparse_pass::mvue24",
        packed="sparse_pass::sparsify_mvue",
        packed_and_sum="sparse_pass::sparsify_mvue_sum",
        random=True,
        measured_as="MVUE(dY)",
    )
}
"""By the value of ``WeightSparsity.grad_weight``."""


def structured_operands(scheme: Scheme) -> Mapping[GemmName, Role | None]:
    """The operand of each GEMM that is 2:4, or None where the GEMM stays as it is captured.

    ==============================  ========  ============  =============
    scheme                          output    grad_input    grad_weight
    ==============================  ========  ============  =============
    weights                         weight    weight        -
    weights, with an estimator      weight    weight        grad_output
    inputs                          input     -             input
    inputs and weights              input     weight        input
    the same, with an estimator     input     weight        grad_output
    ==============================  ========  ============  =============
    """
    weight, input = weight_scheme(scheme), input_scheme(scheme)
    estimated = weight is not None and weight.grad_weight in ESTIMATORS
    return {
        "output": "weight" if input is None else "input",
        "grad_input": None if weight is None else "weight",
        "grad_weight": "grad_output" if estimated else None if input is None else "input",
    }
