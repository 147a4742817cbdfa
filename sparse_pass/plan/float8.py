"""Decide which dense operands are rounded to float8: one answer for all GEMMs of the graph that read a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch.fx import Node

from ..config import Scheme, weight_scheme
from ..graph.gemms import Linear, Use
from ..graph.inputs import OperandRead, dense_read
from .calls import Call
from .values import Reason, Rounded


def rounded_operands(calls: Sequence[Call]) -> Mapping[Node, tuple[OperandRead, Rounded]]:
    """By GEMM: how it reads the operand that is rounded. Of output that is the input, of grad_input grad_output."""
    reads = {use.gemm: read for call in calls for use in _uses(call) if (read := dense_read(use)) is not None}
    first: dict[Node, Node] = {}
    for gemm, (source, _) in reads.items():
        first[source] = min(gemm, first.get(source, gemm))
    # Of nothing there is no largest magnitude.
    shared = {source: Rounded(gemm) for source, gemm in first.items() if 0 not in source.meta["val"].shape}
    return {gemm: (read, shared[source]) for gemm, (source, read) in reads.items() if source in shared}


def _uses(call: Call) -> Iterator[Use]:
    if call.weight is not None and call.weight.precision == "float8":
        yield from (call.linear.output, *call.linear.again, *call.linear.grad_input)


def why_no_float8(linear: Linear, scheme: Scheme) -> str | None:
    """Why a layer cannot multiply in float8, where its scheme says so."""
    weight = weight_scheme(scheme)
    if weight is None or weight.precision != "float8":
        return None
    remedy = "use precision='captured'"
    if linear.computes or linear.readers:
        return f"precision='float8' rounds the weight, but the graph computes something else from it; {remedy}"
    if dense_read(linear.output) is None:
        return f"the graph has it as {linear.output.gemm.target}, which is not rounded to float8; {remedy}"
    return None


def why_not_rounded(call: Call) -> Iterator[Reason]:
    """What stays in the captured precision of a call that is otherwise in float8."""
    for use in _uses(call):
        if dense_read(use) is None:
            text = f"grad_output is not rounded to float8: the graph has it as {use.gemm.target}"
            yield Reason("grad_input", text)
