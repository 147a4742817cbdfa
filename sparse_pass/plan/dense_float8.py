"""Decide for dense weights that multiply in float8, beside a 2:4 grad_weight: output and grad_input, no mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch.fx import Node

from ..graph.gemms import GemmName, Use
from .calls import Call
from .float8 import RoundedReads, why_not_rounded
from .legal import has_scaled_mm
from .values import Gemm, GemmPlan, Part, Prepared, Reason


def plan_dense_float8(calls: Sequence[Call], rounded: RoundedReads) -> Mapping[Call, Part]:
    """What float8 means for the weight of each call whose weight is dense. Calls of one weight share its values."""
    several: dict[Node, list[Call]] = {}
    for call in calls:
        if call.is_float8 and call.weight is None:
            several.setdefault(call.linear.weight, []).append(call)
    return {call: part for group in several.values() for call, part in _plan_weight(group, rounded)}


def _plan_weight(calls: Sequence[Call], rounded: RoundedReads) -> Iterator[tuple[Call, Part]]:
    uses = {
        call: [(name, use) for name, use in call.weight_uses() if rounded.of_weight(use) is not None] for call in calls
    }
    scaled = {use.gemm: _has_scaled_mm(call, use) for call in calls for _, use in uses[call]}
    if not scaled:
        return
    prepared = Prepared(
        "weight",
        calls[0].linear.weight,
        "",
        min(call.linear.output.gemm for call in calls),
        precision="float8",
        dense=not all(scaled.values()),
        dense_float8=any(scaled.values()),
    )
    for call in calls:
        plans = tuple(_plan(name, use, prepared, rounded, scaled[use.gemm]) for name, use in uses[call])
        reasons = {plan.reason for plan in plans if plan.reason is not None}
        yield call, Part(gemms=plans, prepared=prepared, reasons=(*reasons, *why_not_rounded(call)))


def _has_scaled_mm(call: Call, use: Use) -> bool:
    asked_not_to = call.gradient is not None and call.gradient.backend == "masked_dense"
    return not asked_not_to and has_scaled_mm(use, call.linear, call.weight_limits)


def _plan(name: GemmName, use: Use, prepared: Prepared, rounded: RoundedReads, scaled: bool) -> GemmPlan:
    found = rounded.of_weight(use)
    assert found is not None
    dense_read, shared = found
    gemm = Gemm(name, use.gemm, weight_read=use, dense_read=dense_read)
    if scaled:
        return GemmPlan(gemm, prepared, None, "float8", False, rounded=shared, scaled_mm=True)
    text = "no float8 matmul there: dense ones of the same numbers"
    reason = Reason(None if name == "output" else name, text)
    return GemmPlan(gemm, prepared, None, "dense", False, reason, rounded=shared)
