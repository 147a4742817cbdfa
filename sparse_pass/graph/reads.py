"""To which call of a linear a backward GEMM belongs."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence, Set

from torch.fx import Node

from .gemms import Linear, Use, is_move, may_multiply, operands, strip_moves, weight_places


class Numbers:
    """To which forward GEMM a backward one belongs, by sequence numbers."""

    def __init__(self, matmuls: Iterable[Node], backward: Set[Node]) -> None:
        gemms = [node for node in matmuls if node not in backward]
        numbered = [(node.meta["seq_nr"], place, node) for place, node in enumerate(gemms) if "seq_nr" in node.meta]
        self._forward = sorted((one for one in numbered if one[0] is not None), key=lambda one: one[:2])

    def callers(self, node: Node) -> list[Node]:
        """The forward GEMMs of a node's number, in graph order.

        The backward of an autograd function carries the number of the function. Its GEMM has a higher one where it
        calls another function before; then they are those of the next number that is a GEMM's.
        """
        seq = node.meta.get("seq_nr")
        if seq is None:
            return []
        place = bisect.bisect_left(self._forward, seq, key=lambda one: one[0])
        following = itertools.islice(self._forward, place, None)
        first = self._forward[place][0] if place < len(self._forward) else None
        return [gemm for _, _, gemm in itertools.takewhile(lambda one: one[0] == first, following)]


def assign_reads(
    reads: Sequence[Use],
    calls: Sequence[Linear],
    others: Sequence[Use],
    numbers: Numbers,
) -> tuple[dict[Node, list[Use]], list[Use]]:
    """Give each backward read of a weight to the one forward GEMM whose gradient it computes.

    A backward GEMM reads what the forward one read: the forward operand is in its chain. Where several
    forward GEMMs read the very same node, the sequence number decides, and of equal numbers the first,
    since an op under no_grad carries the number of the op before it.

    Args:
        calls: the linears of the weight. others: forward GEMMs that read it and are no linears.

    Returns:
        The reads of each linear's GEMM, and the GEMMs that were left over.
    """
    candidates = sorted([*(one.output for one in calls), *others], key=lambda use: use.gemm)
    root = calls[0].weight
    given: dict[Node, list[Use]] = {one.output.gemm: [] for one in calls}
    stray = []
    for read in reads:
        seq = read.gemm.meta.get("seq_nr")
        numbered = [use for use in candidates if seq is not None and use.gemm.meta.get("seq_nr") == seq]
        if may_multiply(read.gemm):
            same = [use for use in candidates if use.operand in read.chain]
            same = same or [use for use in candidates if use.operand is root] or candidates
            callers = numbers.callers(read.gemm)
            numbered = numbered or [use for use in candidates if use.gemm in callers]
            found = [use for use in same if use in numbered] or (same if len(same) == 1 else numbered)
            if not found:
                stray.append(read)
        else:
            found = numbered  # no matmul: only its number says what it is
        if found and found[0].gemm in given:
            given[found[0].gemm].append(read)
    # The backward of several calls of an autograd function may carry the number of the last.
    crowded = [gemm for gemm, several in given.items() if sum(may_multiply(read.gemm) for read in several) > 1]
    if crowded and not all(given.values()):
        stray += [read for gemm in crowded for read in given[gemm]]
        given.update({gemm: [] for gemm in crowded})
    return given, stray


def backward_reads(node: Node) -> Iterator[tuple[Use, Node]]:
    """What a backward node reads, each with the node that it was made from.

    Of a GEMM the operands that may be a weight; of another op all, since what is a product and a sum in the
    forward (`weight_places`) can have a grad_input of another form.
    """
    if weight_places(node):
        yield from ((use, root) for use, root, _ in operands(node))
    elif node.op == "call_function" and not is_move(node):
        for operand in node.all_input_nodes:
            root, chain = strip_moves(operand)
            yield Use(node, operand, chain), root
