"""Decide for the 2:4 estimates of grad_output: each GEMM that reads one draws one of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set

import torch
from torch.fx import Node

from ..config import GradientSparsity, WeightSparsity
from ..graph.backward import grad_input_gemm
from ..graph.gemms import GradientGemm, Role, aten, is_flip, operand_of
from ..vocabulary import FLOAT8
from .calls import Call
from .costs import Costs, Preparation, Product, why_slower
from .float8 import RoundedReads
from .legal import why_dense_grad_input, why_dense_gradient, why_not_sparse_gradient
from .table import ESTIMATORS
from .values import Gemm, GemmPlan, Packed, Part, Prepared, Reason

_NO_GRADIENT = Reason(None, "the graph computes no gradient that the scheme changes")


def plan_gradients(calls: Sequence[Call], costs: Costs | None, rounded: RoundedReads) -> Mapping[Call, Part]:
    """What a 2:4 grad_output means for each call whose scheme has one."""
    parts: dict[Call, Part] = {}
    summed: set[Node] = set()  # of a grad_output that several linears have, the first one sums
    for call in calls:
        if call.gradient is None or not call.estimated:
            continue
        plans = []
        for made in _gemms(call):
            plans.append(_plan_gradient(call, call.gradient, made, costs, summed, rounded))
            summed.update(plans[-1].prepared.sums)
        declined = tuple(_declined(call))
        reasons = (*declined, *(plan.reason for plan in plans if plan.reason is not None))
        if not plans and not declined and call.weight is None and call.input is None:
            reasons = (_NO_GRADIENT,)
        parts[call] = Part(gemms=tuple(plans), reasons=reasons)
    return parts


def _gemms(call: Call) -> Iterator[GradientGemm]:
    """The GEMMs that are to read an estimate, where they are single matmuls."""
    linear = call.linear
    if "grad_input" in call.estimated:
        yield from filter(None, (grad_input_gemm(linear, use) for use in linear.grad_input))
    if "grad_weight" in call.estimated and linear.grad_weight is not None:
        yield linear.grad_weight


def _declined(call: Call) -> Iterator[Reason]:
    """Why others stay dense."""
    if "grad_input" in call.estimated and (reason := why_dense_grad_input(call.linear)):
        yield reason
    if "grad_weight" in call.estimated and call.linear.has_gradient and (reason := why_dense_gradient(call.linear)):
        yield reason


def _plan_gradient(
    call: Call,
    scheme: WeightSparsity | GradientSparsity,
    made: GradientGemm,
    costs: Costs | None,
    summed: Set[Node],
    rounded: RoundedReads,
) -> GemmPlan:
    name = call.estimated[made.name]
    value, operand = made.gemm.meta["val"], operand_of(made.gemm, made.place)
    reads = rounded.of_gradient(made) if call.is_float8 else ()
    dtype = FLOAT8 if reads else value.dtype
    text, measured = why_not_sparse_gradient(made, name, scheme, call.weight_limits if reads else call.limits), False
    if text is None and reads and not ESTIMATORS[name].packed_float8:
        text = f"{made.name}={name!r} has no 2:4 kernel in float8"
    if text is None and costs is not None and scheme.backend == "auto":
        text = _why_slower(made, name, costs, dtype)
        measured = text is not None
    other: Role = "weight" if made.name == "grad_input" else "input"
    (structured_read, estimated), (dense_read, beside) = reads or ((None, None), (None, None))
    places: dict[Role, int] = {"grad_output": made.place, other: 1 - made.place}
    gemm = Gemm(made.name, made.gemm, places, dense_read=dense_read, structured_read=structured_read)
    if text is not None:
        prepared = Prepared("grad_output", operand, name, made.gemm, dense=True)
        reason = Reason(made.name, text, measured)
        return GemmPlan(gemm, prepared, None, "masked_dense", False, reason, beside, estimated)
    packed = Packed(dtype, True, made.gemm, together=False)
    sums = _sums(made, summed) if ESTIMATORS[name].packed_and_sum and not reads else ()
    prepared = Prepared("grad_output", operand, name, made.gemm, packed=(packed,), sums=sums)
    tuned = costs is not None and value.is_cuda
    return GemmPlan(gemm, prepared, packed, call.kernel, tuned, None, beside, estimated)


def _why_slower(made: GradientGemm, name: str, costs: Costs, dtype: torch.dtype) -> str | None:
    value = made.gemm.meta["val"]
    m, n, k = made.shape
    form = "grad_weight_t" if dtype == FLOAT8 else made.name
    product = Product(form=form, device=value.device, dtype=dtype, m=m, n=n, k=k)
    preparation = Preparation(
        operand=ESTIMATORS[name].measured_as.get(made.name, ""),
        device=value.device,
        shape=(m, n),
        stored=value.dtype,
        dtype=dtype,
    )
    return why_slower(costs, "grad_output", [product], preparation)


def _sums(made: GradientGemm, summed: Set[Node]) -> tuple[Node, ...]:
    """The gradients of biases that are sums over the rows of grad_output, where the graph sums them afterwards."""
    operand = operand_of(made.gemm, made.place)
    if made.name != "grad_weight" or (made.place == 0 and not is_flip(operand)):
        return ()
    grad_output = operand_of(operand, 0) if made.place == 0 else operand
    after = [node for node in grad_output.users if _is_bias_gradient(node) and node > made.gemm]
    return tuple(node for node in after if node not in summed)


def _is_bias_gradient(node: Node) -> bool:
    return node.target is aten.sum.dim_IntList and node.args[1:] in (([0],), ([0], True)) and not node.kwargs
