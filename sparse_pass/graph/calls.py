"""The whole of each call of a linear: what of the backward, and of the ops before its GEMMs, belongs to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import replace

from torch.fx import Graph, Node

from .backward import NOT_FOUND, Backward, gradient_outputs, with_backward
from .derived import Derived, computing_reads, needed_by_outputs, reads_of, scales_of
from .gemms import Linear, Use, is_flip, may_multiply, strip_moves
from .inputs import input_of
from .reads import Numbers, assign_reads, backward_reads
from .shares import Shares

_COMPUTED_ANEW = "the backward multiplies by what it computes anew, and not by the weight that output reads"


def complete(
    graph: Graph,
    linears: Sequence[Linear],
    others: Mapping[Node, Sequence[Use]],
    backward: set[Node],
    derived: Derived,
) -> list[Linear]:
    """Add to the forward of each call what else is part of it.

    Args:
        linears: in graph order, as their forward GEMM tells.
        others: forward GEMMs that read a weight and are no linears, by weight.
        backward: the nodes that need a gradient from outside.
    """
    needed = needed_by_outputs(graph)
    later = backward if needed is None else {n for n in graph.nodes if n.op == "call_function" and n not in needed}
    calls: dict[Node, list[Linear]] = {}
    for linear in linears:
        calls.setdefault(linear.weight, []).append(linear)
    if needed is not None:
        calls = {weight: _merged(several, needed) for weight, several in calls.items()}
    known = Backward(graph, backward, gradient_outputs(graph))
    reads = _backward_reads(calls, backward, derived)
    numbers = Numbers(derived.matmuls, backward)
    whole: dict[Node, Linear] = {}
    for weight, several in calls.items():
        if backward:
            given, stray = assign_reads(reads.get(weight, ()), several, others.get(weight, ()), numbers)
            several = [
                with_backward(one, several, [*one.grad_input, *given[one.output.gemm]], stray, known) for one in several
            ]
            anew = _computed_anew(weight, several, reads, derived, numbers)
            several = [replace(one, half=_COMPUTED_ANEW) if one.output.gemm in anew else one for one in several]
        gemms = [use for one in several for use in (one.output, *one.again, *one.grad_input, *one.stray)]
        ends = [root for use in gemms if (root := strip_moves(use.operand)[0]) is not weight]
        if ends:
            ends += [factor for use in gemms for factor in scales_of(use.gemm, derived)]
            readers = computing_reads(weight, ends, derived, known.numbered, later)
            several = [_with_readers(one, readers) for one in several]
        if known.grad_outputs:
            multiplied = {use.gemm for use in (*gemms, *reads_of(weight))}
            several = _with_shares(several, multiplied, later, numbers)
        whole.update({one.output.gemm: one for one in several})
    return [whole[one.output.gemm] for one in linears if one.output.gemm in whole]


def _backward_reads(weights: Collection[Node], backward: Set[Node], derived: Derived) -> dict[Node, list[Use]]:
    """What in the backward reads a weight, or what is computed from it, by the weight."""
    readers = backward
    if all(weight in derived.sources for weight in weights):  # none is made by a matmul, as with a LoRA product
        readers = {user for node in derived.sources for user in node.users if user in backward}
    reads: dict[Node, list[Use]] = {}
    for node in sorted(readers):
        if node not in derived.matmuls and node in derived.sources:
            continue  # computes something for a GEMM, or a zero gradient
        for use, root in backward_reads(node):
            reads.setdefault(root, []).append(use)
            held = derived.holds.get(root, frozenset()) - {root}
            for weight in held if held and may_multiply(node) else ():
                reads.setdefault(weight, []).append(use)
    return reads


def _with_readers(linear: Linear, readers: Sequence[Use]) -> Linear:
    """Not twice: what computes something from the weight is no GEMM of its backward."""
    computing = {use.gemm for use in readers}
    grad_input = tuple(use for use in linear.grad_input if use.gemm not in computing)
    return replace(linear, readers=tuple(readers), grad_input=grad_input)


def _computed_anew(
    weight: Node, calls: Sequence[Linear], reads: Mapping[Node, Sequence[Use]], derived: Derived, numbers: Numbers
) -> set[Node]:
    """The calls of a computed weight whose backward reads something else that is computed from the same tensors."""
    held = derived.holds.get(weight, frozenset()) - {weight}
    gemms = {one.output.gemm for one in calls}
    again = {use.gemm for source in held for use in reads.get(source, ()) if strip_moves(use.operand)[0] is not weight}
    return {call for gemm in again if may_multiply(gemm) for call in numbers.callers(gemm) if call in gemms}


def _merged(calls: list[Linear], needed: Collection[Node]) -> list[Linear]:
    """Give what is only computed for the backward to the calls that it is of: gradients that a function computes in its
    forward, as of a linear fused with its loss, and outputs that it computes once more."""
    kept = [one for one in calls if one.output.gemm in needed]
    if not kept:
        return calls
    for extra in calls:
        if extra.output.gemm in needed:
            continue
        fed = _feeding(extra, [one.output.gemm for one in kept])
        place = fed[-1] if fed else len(kept) - 1
        call = kept[place]
        if _is_gradient(extra, call, bool(fed)):
            kept[place] = replace(call, grad_input=(*call.grad_input, extra.output))
        else:
            kept[place] = replace(call, again=(*call.again, extra.output))
    return kept


def _feeding(linear: Linear, gemms: Sequence[Node]) -> list[int]:
    """Which of the GEMMs, by place, the input of a linear depends on."""
    input = input_of(linear.output)
    pending, seen = [] if input is None else [input.node], set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
    return [place for place, gemm in enumerate(gemms) if gemm in seen]


def _is_gradient(extra: Linear, call: Linear, fed: bool) -> bool:
    """Whether a GEMM multiplies by the weight the other way round than a call does."""
    (_, n, k), (_, rows, columns) = extra.shape, call.shape
    if n != k or rows != columns:
        return (n, k) == (columns, rows)
    if extra.computes or call.computes:
        return fed
    return _flips(extra) != _flips(call)


def _flips(linear: Linear) -> bool:
    return (sum(map(is_flip, linear.output.chain)) % 2 == 1) == (linear.layout == "kn")


def _with_shares(
    calls: list[Linear], reads: Collection[Node], later: Collection[Node], numbers: Numbers
) -> list[Linear]:
    """Say whether a masked gradient is to be masked as a whole, where the graph returns it.

    So it is where not each product in it was found by itself, if the gradient is nothing else than these products.
    """
    index = next((one.grad_output for one in calls if one.grad_output is not None), None)
    if index is None:
        return calls
    weight = calls[0].weight
    gradient: Node = weight.graph.output_node().args[0][index]  # type: ignore[index,assignment]
    shares = Shares(gradient, {one.output.gemm for one in calls}, reads, later, numbers)
    placed = [one for one in calls if one.grad_operand is not None]
    if len(placed) < len(shares.products):
        calls = [one if one.has_gradient else replace(one, unplaced_grad_weight=NOT_FOUND) for one in calls]
    all_placed = len(placed) == len(shares.products) and not any(
        one.computes or one.unplaced_grad_weight for one in calls
    )
    return [replace(one, whole_gradient=True) for one in calls] if shares.whole and not all_placed else calls
