"""What the gradient of a weight is a sum of."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Node

from .gemms import aten, is_move, packet_name, weight_places
from .reads import Numbers

_SUMS = frozenset({"add", "sub", "cat", "stack", "slice_scatter", "select_scatter", "constant_pad_nd"})
_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})
_SUMS_AND_PRODUCTS = (aten.addmm.default, aten.baddbmm.default, aten.addmv.default)


class Shares:
    """The products of grad_output and input in the gradient of one weight.

    Attributes:
        products: those that calls of the weight give.
        whole: whether the gradient is a sum of these and of nothing else, such as the gradient of a norm of the weight
            or of looking up its rows.
    """

    def __init__(
        self,
        gradient: Node,
        calls: Collection[Node],
        reads: Collection[Node],
        later: Collection[Node],
        numbers: Numbers,
    ) -> None:
        """Walk back from the gradient.

        Args:
            gradient: as the graph returns it.
            calls: the forward GEMMs of the weight.
            reads: the GEMMs that read the weight: none of them gives a part of its gradient.
            later: nodes that only the backward needs.
        """
        self.products: set[Node] = set()
        self._calls, self._reads, self._later, self._numbers = calls, reads, later, numbers
        self._known: dict[Node, bool] = {}
        self.whole = self._is_ours(gradient) and bool(self.products)

    def _is_ours(self, node: Node) -> bool:
        if node not in self._known:
            self._known[node] = self._look(node)
        return self._known[node]

    def _look(self, node: Node) -> bool:
        if weight_places(node) or (node.target is aten.mul.Tensor and self._is_exactly_a_calls(node)):
            added = node.args[:1] if node.target in _SUMS_AND_PRODUCTS else ()
            ours = node in self._later and node not in self._reads and not self._calls_of(node).isdisjoint(self._calls)
            if ours:
                self.products.add(node)
            return all([ours, *(self._is_ours(one) for one in added if isinstance(one, Node))])
        if packet_name(node) in _ZEROS or (packet_name(node) in ("full", "full_like") and node.args[1] == 0):
            return True
        parts = [self._is_ours(one) for one in node.all_input_nodes] if node in self._later else []
        # Any other op is that of a part of the gradient and of factors.
        return bool(parts) and (all(parts) if packet_name(node) in _SUMS and not is_move(node) else any(parts))

    def _calls_of(self, node: Node) -> set[Node]:
        return set(self._numbers.callers(node))

    def _is_exactly_a_calls(self, product: Node) -> bool:
        """Whether it is the product of a GEMM of one row: then it has the number of that call."""
        seq = product.meta.get("seq_nr")
        return any(one.meta.get("seq_nr") == seq for one in self._calls_of(product) & set(self._calls)) and not any(
            self._is_ours(one) for one in product.all_input_nodes
        )
