"""Decide for the 2:4 estimates of grad_output: each call draws one of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch.fx import Node

from ..config import WeightSparsity
from ..graph.gemms import GradWeightGemm, aten, is_flip, operand_of
from .calls import Call
from .costs import Costs, Preparation, Product, why_slower
from .legal import why_dense_gradient, why_not_sparse_gradient
from .table import ESTIMATORS, Estimator
from .values import Gemm, GemmPlan, Packed, Part, Prepared, Reason


def plan_gradients(calls: Sequence[Call], costs: Costs | None) -> Mapping[Call, Part]:
    """What a 2:4 grad_output means for each call whose scheme has one."""
    parts: dict[Call, Part] = {}
    summed: set[Node] = set()  # of a grad_output that several linears have, the first one sums
    for call in calls:
        if call.weight is None or call.structured["grad_weight"] != "grad_output" or not call.linear.has_gradient:
            continue
        if (made := call.linear.grad_weight) is None:
            parts[call] = Part(reasons=tuple(filter(None, [why_dense_gradient(call.linear)])))
            continue
        part = _plan_gradient(call, call.weight, made, costs, summed)
        summed.update(part.prepared.sums if part.prepared is not None else ())
        parts[call] = part
    return parts


def _plan_gradient(
    call: Call, scheme: WeightSparsity, made: GradWeightGemm, costs: Costs | None, summed: Set[Node]
) -> Part:
    estimator = ESTIMATORS[scheme.grad_weight]
    value, operand = made.gemm.meta["val"], operand_of(made.gemm, made.place)
    text, measured = why_not_sparse_gradient(made, scheme, estimator, call.limits), False
    if text is None and costs is not None and scheme.backend == "auto":
        text = _why_slower(made, estimator, costs)
        measured = text is not None
    gemm = Gemm("grad_weight", made.gemm, {"grad_output": made.place, "input": 1 - made.place})
    if text is not None:
        reason = Reason("grad_weight", text, measured)
        prepared = Prepared("grad_output", operand, scheme.grad_weight, made.gemm, dense=True)
        plan = GemmPlan(gemm, prepared, None, "masked_dense", False, reason)
        return Part(prepared, (plan,), reasons=(reason,))
    sums: tuple[Node, ...] = ()
    if estimator.packed_and_sum:
        # The gradient of the bias, where the graph sums grad_output for it afterwards.
        grad_output = operand_of(operand, 0) if made.place == 0 and is_flip(operand) else operand
        after = [node for node in grad_output.users if _is_bias_gradient(node) and node > made.gemm]
        sums = tuple(node for node in after if node not in summed) if made.place == 1 or is_flip(operand) else ()
    packed = Packed(value.dtype, True, made.gemm, together=False)
    prepared = Prepared("grad_output", operand, scheme.grad_weight, made.gemm, packed=(packed,), sums=sums)
    plan = GemmPlan(gemm, prepared, packed, call.kernel, tuned=costs is not None and value.is_cuda)
    return Part(prepared, (plan,))


def _why_slower(made: GradWeightGemm, estimator: Estimator, costs: Costs) -> str | None:
    value = made.gemm.meta["val"]
    n, k = value.shape[made.place], value.shape[1 - made.place]
    m = operand_of(made.gemm, made.place).meta["val"].numel() // n
    product = Product(form="grad_weight", device=value.device, dtype=value.dtype, m=m, n=n, k=k)
    preparation = Preparation(
        operand=estimator.measured_as, device=value.device, shape=(m, n), stored=value.dtype, dtype=value.dtype
    )
    return why_slower(costs, "grad_output", [product], preparation)


def _is_bias_gradient(node: Node) -> bool:
    return node.target is aten.sum.dim_IntList and node.args[1:] in (([0],), ([0], True)) and not node.kwargs
