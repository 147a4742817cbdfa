"""What of a scheme cannot be done: skipped with a reason, or refused before anything is edited."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..config import Scheme, input_scheme, scheme_text, weight_scheme
from ..fqn import Pattern, choose
from ..graph.find import OtherWeight
from ..graph.gemms import Linear
from .inputs import why_no_masked_grad_weight, why_no_masked_gradient
from .legal import why_dense_grad_input, why_dense_gradient, why_dims_skipped, why_skipped
from .table import estimated, structured_operands
from .values import Named, OtherPlan, Reason


def refuse(chosen: Sequence[Named], strict: bool) -> None:
    """Raise for what was asked and cannot be done.

    Raises:
        ValueError: names every linear that is refused, with the reason.
    """
    refused = []
    for named in chosen:
        pattern, name = named.pattern, named.linear.names[0]
        if reason := why_nothing_is_done(named.linear, named.scheme):
            if strict or pattern.exact:
                how = "exactly" if pattern.exact else f"by {pattern.text!r}"
                refused.append(f"{name!r} (named {how}): {reason}")
        elif reason := _why_refused(named.linear, named.scheme, strict):
            refused.append(f"{name!r}: {scheme_text(named.scheme)} changes {reason.gemm}, but {reason}")
    _raise_for(refused)


def why_nothing_is_done(linear: Linear, scheme: Scheme) -> Reason | None:
    """Why a scheme cannot be done at all: by its rules, or as a GEMM that it changes is not found.

    A 2:4 input of output alone would be other mathematics in silence: the gradient of another function.
    """
    if text := why_skipped(linear, scheme) or linear.half:
        return Reason(None, text)
    return why_no_masked_grad_weight(linear) if structured_operands(scheme)["grad_weight"] == "input" else None


def _why_refused(linear: Linear, scheme: Scheme, strict: bool) -> Reason | None:
    """Why a scheme would leave a gradient as it is that it has to change."""
    weight, input = weight_scheme(scheme), input_scheme(scheme)
    if weight is not None and (weight.grad_weight == "masked" or weight.decay):
        if linear.unplaced_grad_weight and not linear.whole_gradient:
            return Reason("grad_weight", linear.unplaced_grad_weight)
        if linear.has_gradient and linear.grad_output is None:
            if linear.weight.op == "call_function":
                return Reason("grad_weight", "that of a weight which the graph computes; left as captured")
            if weight.decay:  # of a whole training step, whose optimizer is in the graph
                return Reason("grad_weight", "the graph does not return it: add the decay in the optimizer")
        if linear.computes and linear.has_gradient and not linear.whole_gradient:
            return Reason("grad_weight", "the gradient of the weight has other parts; left as captured")
    if input is not None and input.grad_input == "masked" and (reason := why_no_masked_gradient(linear)):
        return reason
    estimates = estimated(scheme) if strict else {}
    if "grad_input" in estimates and (reason := why_dense_grad_input(linear)):
        return reason
    return why_dense_gradient(linear) if "grad_weight" in estimates and linear.has_gradient else None


def plan_others(others: Sequence[OtherWeight], patterns: Sequence[Pattern], strict: bool) -> tuple[OtherPlan, ...]:
    """The rows of named weights of which no matmul was found.

    Raises:
        ValueError: an exactly named one has more than two dims, or with ``strict`` there is any.
    """
    rows = [
        OtherPlan(other, pattern, pattern.scheme, _why_no_linear(other))
        for other in others
        if (pattern := choose(patterns, other.names)) is not None and pattern.scheme is not None
    ]
    _raise_for(
        f"{row.weight.names[0]!r}: {row.reason}"
        for row in rows
        if strict or (row.pattern.exact and row.weight.node.meta["val"].dim() > 2)
    )
    return tuple(rows)


def _why_no_linear(other: OtherWeight) -> str:
    shape, readers = other.node.meta["val"].shape, ", ".join(other.readers)
    if len(shape) > 2:
        return f"{why_dims_skipped(shape)}; it is read by {readers}"
    if other.as_input:
        names = ", ".join(map(repr, other.as_input))
        return f"it is multiplied by another weight, {names}, and counts as the input of that one"
    return f"no matmul of this weight was found: it is read by {readers}"


def _raise_for(refused: Iterable[str]) -> None:
    if told := "; ".join(refused):
        raise ValueError(f"sparse_pass cannot sparsify {told}")
