"""The edits that every rewrite of a graph is made of: new calls with the right metadata, in the right place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from .gemms import aten, is_flip, is_move

# Values of one node, not of what replaces it; all other metadata (module stack, seq_nr, partitioner and
# recompute tags) must come along, or the partitioner and checkpointing misplace the new node.
_OWN_META = frozenset({"val", "tensor_meta", "eager_input_vals", "desc"})


class Editor:
    """Inserts calls into one graph; what several linears share is made once."""

    def __init__(self, graph: Graph, mode: FakeTensorMode) -> None:
        self.graph = graph
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        """Places in the graph as it was captured."""
        self.made: dict[Any, Node] = {}
        """What was made once, by what it is."""
        self.outdated: list[Node] = []
        """Nodes of the captured graph that may have lost their users."""
        self._mode = mode

    def once(self, key: Any, make: Callable[[], Node]) -> Node:
        """The node of this key, made if there is none yet."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def call_before(
        self,
        before: Node,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        like: Node | None = None,
    ) -> Node:
        """Insert a call before ``before``, with the metadata of ``like`` (default: of ``before``)."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs or {})
        source = before if like is None else like
        node.meta = {key: value for key, value in source.meta.items() if key not in _OWN_META}
        values, named = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with self._mode, torch.no_grad():
            node.meta["val"] = target(*values, **named)
        return node

    def is_after(self, node: Node, other: Node) -> bool:
        """Whether a node of the captured graph stands after another one."""
        return self.order.get(node, -1) > self.order[other]

    def zero(self, value_like: Node, before: Node, *, like: Node) -> Node:
        """A zero of the dtype and device of ``value_like``."""
        value = value_like.meta["val"]
        kwargs = {
            "dtype": value.dtype,
            "layout": torch.strided,
            "device": value.device,
            "pin_memory": False,
        }
        return self.call_before(before, aten.full.default, ([], 0), kwargs, like=like)

    def flipped(self, matrix: Node, before: Node) -> Node:
        """The transpose of a matrix; of one that is a transpose itself, what it was made from."""
        source = matrix.args[0] if is_flip(matrix) else None
        if isinstance(source, Node):
            return source
        return self.call_before(before, aten.permute.default, (matrix, [1, 0]))

    def replay(self, chain: Sequence[Node], old: Node, new: Node, before: Node) -> Node:
        """Run the moves of ``chain``, the first of which reads ``old``, on ``new``."""
        for node in chain:
            source, target = old, new
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: target if n is source else n)  # noqa: B023
            old, new = node, self.call_before(before, node.target, args, kwargs, like=node)
        return new

    def laid_out(self, mask: Node, value: Node, before: Node, *, like: Node) -> Node:
        """The mask in the memory order of ``value``.

        The first operand of ``where`` decides the strides of its result, and what reads the result was
        captured with those of ``value``: a ``view`` of other strides fails or makes a tensor of other strides.
        """
        sizes, order = value.meta["val"].shape, _memory_order(value.meta["val"])
        dense, numel = {}, 1
        for dim in reversed(order):
            dense[dim], numel = numel, numel * sizes[dim]
        strides = mask.meta["val"].stride()
        if all(_is_one(sizes[dim]) or statically_known_true(strides[dim] == dense[dim]) for dim in order):
            return mask
        inverse = [order.index(dim) for dim in range(len(order))]
        for target, args, kwargs in (
            (aten.permute.default, (order,), {}),
            (aten.clone.default, (), {"memory_format": torch.contiguous_format}),
            (aten.permute.default, (inverse,), {}),
        ):
            mask = self.call_before(before, target, (mask, *args), kwargs, like=like)
        return mask

    def mask_gradient(self, gradient: Node, mask: Node) -> None:
        """Give all that reads a gradient the one that is zero where the mask is False."""
        users, after = list(gradient.users), gradient.next
        zero = self.zero(gradient, after, like=gradient)
        # With dynamic sizes a size of the mask may be a symbol where that of the gradient is an int, as what reads it
        # was captured with: of the two `where` would give its result the symbol.
        sizes = [size if isinstance(size, int) else -1 for size in gradient.meta["val"].shape]
        if any(isinstance(b, torch.SymInt) and a != -1 for a, b in zip(sizes, mask.meta["val"].shape, strict=True)):
            mask = self.call_before(after, aten.expand.default, (mask, sizes), like=gradient)
        mask = self.laid_out(mask, gradient, after, like=gradient)
        kept = self.call_before(after, aten.where.self, (mask, gradient, zero), like=gradient)
        for user in users:
            user.replace_input_with(gradient, kept)

    def finish_gemm(self, gemm: Node, rows: Node, bias: object, sizes: Sequence[Any]) -> None:
        """Put a product [M, N] in the place of a GEMM whose input has these sizes, and add the bias if there is one."""
        if bias is not None:
            rows = self.call_before(gemm, aten.add.Tensor, (rows, bias))
        if len(sizes) != 2:
            input = gemm.args[0]
            leading = [
                size if isinstance(size, int) else self.call_before(gemm, aten.sym_size.int, (input, dim))
                for dim, size in enumerate(sizes[:-1])
            ]
            features = rows.meta["val"].shape[-1]
            rows = self.call_before(gemm, aten.reshape.default, (rows, [*leading, features]))
        gemm.replace_all_uses_with(rows)
        self.graph.erase_node(gemm)

    def erase_dead(self, node: Node) -> None:
        """Erase a call that nothing reads any more, and what that leaves unread in turn."""
        if node.op != "call_function" or node.users or node._erased:
            return
        sources = node.all_input_nodes
        self.graph.erase_node(node)
        for source in sources:
            self.erase_dead(source)

    def erase_unused(self, node: object) -> None:
        """Erase a call that nothing reads any more, and the moves that led to it alone."""
        while isinstance(node, Node) and is_move(node) and not node.users:
            source = node.args[0]
            self.graph.erase_node(node)
            node = source

    def clean(self) -> None:
        """Erase what the rewrites left without users, of what is outdated and of what was made once, all its calls."""
        for node in reversed(list(dict.fromkeys([*self.outdated, *self.made.values()]))):
            self.erase_dead(node)


def _memory_order(value: torch.Tensor) -> list[int]:
    """Its dims, the outermost in memory first; as they are for one that is expanded.

    An expanded one has no order of its own, and Inductor would choose another than this sorts: what it saves for the
    backward of a graph with sizes that are symbols must have the strides of the captured graph, or torch takes them to
    be fixed.
    """
    sizes, strides = value.shape, value.stride()
    if any(statically_known_true(strides[dim] == 0) and not _is_one(size) for dim, size in enumerate(sizes)):
        return list(range(value.dim()))

    def compared(one: int, other: int) -> int:  # strides may be symbols
        a, b = strides[one], strides[other]
        return int(statically_known_true(a < b)) - int(statically_known_true(a > b))

    return sorted(range(value.dim()), key=functools.cmp_to_key(compared))


def _is_one(size: int | torch.SymInt) -> bool:
    return statically_known_true(size == 1)
