"""Decide which tensors are rounded to float8: one answer for all GEMMs that read one, or an estimate of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..config import Scheme, is_float8
from ..graph.gemms import GradientGemm, Linear, Use, operand_of
from ..graph.inputs import OperandRead, dense_read, operand_read
from .calls import Call
from .values import Reason, Rounded


@dataclass(frozen=True, slots=True)
class RoundedReads:
    """Where GEMMs read what is rounded to float8, and which of them share it."""

    reads: Mapping[tuple[Node, int], tuple[OperandRead, Rounded]]
    """By GEMM and place of its operand."""

    def of_weight(self, use: Use) -> tuple[OperandRead, Rounded] | None:
        """What a GEMM multiplies by the weight."""
        found = dense_read(use)
        return None if found is None else self.reads.get((use.gemm, found[1].place))

    def of_gradient(self, made: GradientGemm) -> tuple[tuple[OperandRead, Rounded], ...]:
        """grad_output and the operand beside it; empty if they are not rounded."""
        found = [self.reads.get((made.gemm, place)) for place in (made.place, 1 - made.place)]
        return tuple(one for one in found if one is not None) if None not in found else ()


def rounded_reads(calls: Sequence[Call]) -> RoundedReads:
    """All of a graph. Of output it is the input, of grad_input grad_output, and of a 2:4 grad_weight both."""
    reads = {(read.gemm, read.place): (source, read) for call in calls for source, read in _reads(call)}
    first: dict[Node, Node] = {}
    for (gemm, _), (source, _) in reads.items():
        first[source] = min(gemm, first.get(source, gemm))
    shared = {source: Rounded(gemm) for source, gemm in first.items()}
    # Of nothing there is no largest magnitude.
    filled = {key: pair for key, pair in reads.items() if not _is_empty(pair[0]) and not _is_empty(operand_of(*key))}
    return RoundedReads({key: (read, shared[source]) for key, (source, read) in filled.items()})


def _is_empty(node: Node) -> bool:
    return any(statically_known_true(size == 0) for size in node.meta["val"].shape)


def _reads(call: Call) -> Iterator[tuple[Node, OperandRead]]:
    if not call.is_float8:
        return
    for _, use in call.weight_uses():
        if (found := dense_read(use)) is not None:
            yield found
    made = call.linear.grad_weight
    if "grad_weight" in call.estimated and made is not None:
        yield from (operand_read(made.gemm, place) for place in (0, 1))


def why_no_float8(linear: Linear, scheme: Scheme) -> str | None:
    """Why a layer cannot multiply in float8, where its scheme says so."""
    if not is_float8(scheme):
        return None
    remedy = "use precision='captured'"
    if linear.computes or linear.readers:
        return f"precision='float8' rounds the weight, but the graph computes something else from it; {remedy}"
    if dense_read(linear.output) is None:
        return f"the graph has it as {linear.output.gemm.target}, which is not rounded to float8; {remedy}"
    return None


def why_not_rounded(call: Call) -> Iterator[Reason]:
    """What stays in the captured precision of a call that is otherwise in float8."""
    for name, use in call.weight_uses() if call.is_float8 else ():
        if dense_read(use) is None:
            what = "the input" if name == "output" else "grad_output"
            text = f"{what} is not rounded to float8: the graph has it as {use.gemm.target}"
            yield Reason(None if name == "output" else name, text)
