"""Decide for a whole graph: from what was found, what a device can do, and what it costs, to one frozen plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..fqn import Pattern, choose
from ..graph.find import Found
from .calls import call_of
from .costs import Costs
from .dense_float8 import plan_dense_float8
from .float8 import rounded_reads
from .gradients import plan_gradients
from .halves import without_halves
from .inputs import plan_inputs
from .limits import AskLimits
from .refusals import plan_others, refuse, why_nothing_is_done
from .values import LinearPlan, Named, OtherPlan, Part, Plan
from .weights import plan_weights


def make_plan(
    found: Found,
    patterns: Sequence[Pattern],
    limits: AskLimits,
    costs: Costs | None,
    *,
    strict: bool = False,
    eager_backward: Collection[str] = (),
) -> Plan:
    """Decide what becomes of all that ``patterns`` name. Reads the graph, never edits it.

    Args:
        limits: asked for each linear.
        costs: asked where sparse kernels are legal; None takes them all, by their default algorithms.
        eager_backward: names of the parameters whose backward is in no graph.

    Raises:
        ValueError: an exactly named linear cannot be 2:4 sparse, or with ``strict`` any named one.
    """
    chosen = [
        Named(linear, pattern, pattern.scheme)
        for linear in found.linears
        if (pattern := choose(patterns, linear.names)) is not None and pattern.scheme is not None
    ]
    chosen = without_halves(found.linears, chosen, eager_backward)
    refuse(chosen, strict)
    others = plan_others(found.others, patterns, strict)
    skipped = {named: why_nothing_is_done(named.linear, named.scheme) for named in chosen}
    calls = {named: call_of(named, limits) for named in chosen if skipped[named] is None}
    several = tuple(calls.values())
    rounded = rounded_reads(several)
    inputs, weights = plan_inputs(several, costs), plan_weights(several, costs, rounded)
    weights = {**weights, **plan_dense_float8(several, rounded)}
    gradients = plan_gradients(several, costs, rounded)
    linears = []
    for named in chosen:
        call = calls.get(named)
        if call is None:
            linears.append(LinearPlan(named, skipped[named]))
        else:
            parts = (part.get(call, Part()) for part in (inputs, weights, gradients))
            linears.append(LinearPlan(named, None, *parts))
    notes = tuple(dict.fromkeys(call.limits.note for call in several if call.limits.note))
    return Plan(tuple(linears), others, _unmatched(found, patterns, others), notes)


def _unmatched(found: Found, patterns: Sequence[Pattern], others: Sequence[OtherPlan]) -> tuple[str, ...]:
    matched = {pattern.text for linear in found.linears for pattern in patterns if pattern.names(linear.names)}
    matched.update(other.pattern.text for other in others)
    return tuple(pattern.text for pattern in patterns if pattern.text not in matched)
