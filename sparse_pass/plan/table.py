"""The table of schemes: which operand of which GEMM is 2:4, and how a 2:4 grad_output is estimated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..config import GradientSparsity, Scheme, gradient_scheme, input_scheme, weight_scheme
from ..graph.gemms import GemmName, Role


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimator:
    """A 2:4 estimate of a matrix along its first dim. Operators are named as ``library::name``.

    Each takes the matrix, and after it a seed, an int64 tensor of one element, if the estimate is random. That dim is
    the one that the GEMM contracts over: of grad_weight the matrix is grad_output [M, N], of grad_input its transpose.
    """

    dense: str
    """Gives the estimate as a dense tensor of the same shape."""
    packed: str = ""
    """Gives its transpose packed, both dims padded to whole tiles, for `sparse_pass::grad_weight` and
    `sparse_pass::grad_input`. Empty: there is no such kernel."""
    packed_float8: str = ""
    """Gives it rounded to float8 by a scale, its third argument, for `sparse_pass::grad_weight_t`. Empty: there is no
    such kernel."""
    packed_and_sum: str = ""
    """Gives the same, and what sums to the gradient of a bias. Empty: there is no such kernel."""
    random: bool = False
    measured_as: Mapping[GemmName, str] = field(default_factory=dict)
    """The operand that `Costs` times for it, by GEMM. Of one that is missing what it costs is not counted."""


ESTIMATORS: dict[str, Estimator] = {
    "mvue": Estimator(
        dense="sparse_pass::mvue24",
        packed="sparse_pass::sparsify_mvue",
        packed_float8="sparse_pass::sparsify_mvue_float8",
        packed_and_sum="sparse_pass::sparsify_mvue_sum",
        random=True,
        measured_as={"grad_weight": "MVUE(dY)", "grad_input": "MVUE(dY^T)"},
    )
}
"""By the value of ``grad_weight`` of a `WeightSparsity`, and of both fields of a `GradientSparsity`."""


def estimated(scheme: Scheme) -> Mapping[GemmName, str]:
    """The estimator of grad_output, by the GEMM that reads the estimate. Each GEMM draws one of its own."""
    said = gradient_scheme(scheme)
    names: dict[GemmName, str] = {} if said is None else {"grad_weight": said.grad_weight}
    if isinstance(said, GradientSparsity):
        names["grad_input"] = said.grad_input
    return {gemm: name for gemm, name in names.items() if name in ESTIMATORS}


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
    gradients                       -         -             grad_output
    gradients of inputs             -         grad_output   -
    gradients of both               -         grad_output   grad_output
    inputs and any of these         input     the same      the same, or input
    ==============================  ========  ============  =============
    """
    weight, input = weight_scheme(scheme), input_scheme(scheme)
    roles: dict[GemmName, Role | None] = {
        "output": "input" if input is not None else "weight" if weight is not None else None,
        "grad_input": None if weight is None else "weight",
        "grad_weight": None if input is None else "input",
    }
    return roles | dict.fromkeys(estimated(scheme), "grad_output")
