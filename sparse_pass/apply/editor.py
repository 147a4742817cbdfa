"""The edits that a plan is carried out by: new calls with the right metadata, in the right place."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from ..graph.gemms import aten, is_flip, operand_of
from ..ops import definitions as _ops  # noqa: F401  (registers torch.ops.sparse_pass)

sparse_ops = torch.ops.sparse_pass

_SEEDS = 2**62
"""How many seeds there are: what torch.randint and Inductor's own random numbers can draw from."""

# Values of one node, not of what replaces it; all other metadata (module stack, seq_nr, partitioner and
# recompute tags) must come along, or the partitioner and checkpointing misplace the new node.
_OWN_META = frozenset({"val", "tensor_meta", "eager_input_vals", "desc"})


class Editor:
    """Inserts calls into one graph. What they replace stays until `clean`, so that a plan can go on naming it.

    For use under the fake tensor mode of the graph, and under no_grad.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._layouts: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        """Of what operators give: shapes, strides, dtypes and devices, by what they take."""
        self._replaced: dict[Node, Node] = {}
        self._outdated: list[Node] = []

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
        node.meta["val"] = self._value(node)
        return node

    def _value(self, node: Node) -> Any:
        """The fake tensors that a call gives. Those of this package's operators are new, and of layouts known before
        made without asking the operator, which takes most of the time of an edit."""
        target: Any = node.target
        values, named = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        key = (target, *(part for value in (*values, *named.items()) for part in _described(value)))
        if getattr(target, "namespace", "") != "sparse_pass" or any(isinstance(part, torch.SymInt) for part in key):
            return target(*values, **named)
        if key not in self._layouts:
            given = target(*values, **named)
            several = given if isinstance(given, (tuple, list)) else (given,)
            self._layouts[key] = [(one.shape, one.stride(), one.dtype, one.device) for one in several]
            return given
        made = [
            torch.empty_strided(shape, strides, dtype=dtype, device=device)
            for shape, strides, dtype, device in self._layouts[key]
        ]
        return made[0] if len(made) == 1 else tuple(made)

    def replace(self, node: Node, new: Node) -> None:
        """Give all that reads a node another one."""
        node.replace_all_uses_with(new)
        self._replaced[node] = new
        self._outdated.append(node)

    def current(self, node: Node) -> Node:
        """A node of the captured graph, or what has replaced it."""
        while node in self._replaced:
            node = self._replaced[node]
        return node

    def feed(self, reader: Node, old: Node, new: Node) -> None:
        """Give one call another tensor, wherever it reads the old one."""
        reader.replace_input_with(old, new)
        self._outdated.append(old)

    def feed_at(self, gemm: Node, place: int, new: Node) -> None:
        """Give a GEMM another operand."""
        self._outdated.append(operand_of(gemm, place))
        gemm.update_arg(place, new)

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

    def seed(self, before: Node) -> Node:
        """A seed of torch's generator of the device: int64 [1]."""
        kwargs = {
            "dtype": torch.int64,
            "layout": torch.strided,
            "device": before.meta["val"].device,
            "pin_memory": False,
        }
        return self.call_before(before, aten.randint.low, (0, _SEEDS, [1]), kwargs)

    def flipped(self, matrix: Node, before: Node) -> Node:
        """The transpose of a matrix; of one that is a transpose itself, what it was made from."""
        if is_flip(matrix):
            return operand_of(matrix, 0)
        return self.call_before(before, aten.permute.default, (matrix, [1, 0]))

    def copied(self, matrix: Node, before: Node) -> Node:
        """A copy that is stored row by row."""
        return self.call_before(before, aten.clone.default, (matrix,), {"memory_format": torch.contiguous_format})

    def flattened(self, input: Node, gemm: Node) -> Node:
        """The input of a GEMM as a matrix, [M, K]."""
        sizes = input.meta["val"].shape
        return input if len(sizes) == 2 else self.call_before(gemm, aten.reshape.default, (input, [-1, sizes[-1]]))

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
        self.replace(gemm, rows)

    def contracted_first(self, gemm: Node, place: int) -> Node:
        """An operand of a matmul with the dim first that is contracted over, as its second operand has it.

        Of the grad_output of grad_weight it is [M, N], of that of grad_input [N, M].
        """
        operand = operand_of(gemm, place)
        return self.flipped(operand, gemm) if place == 0 else operand

    def finish_gradient(self, gemm: Node, result: Node, *, turned: bool) -> None:
        """Put a product [N, K] or [M, K] in the place of the GEMM of a gradient; ``turned``: of one that gives its
        transpose."""
        if turned:
            # In the memory order of the GEMM that it replaces: what reads it was captured with that.
            result = self.call_before(gemm, aten.permute.default, (result, [1, 0]))
            result = self.copied(result, gemm)
        self.replace(gemm, result)

    def clean(self) -> None:
        """Erase what was replaced, and all that led to it alone."""
        for node in reversed(self._outdated):
            self._erase_dead(node)

    def _erase_dead(self, node: Node) -> None:
        if node.op != "call_function" or node.users or node._erased:
            return
        sources = node.all_input_nodes
        self.graph.erase_node(node)
        for source in sources:
            self._erase_dead(source)


def _described(value: Any) -> tuple[Any, ...]:
    if isinstance(value, torch.Tensor):
        return (value.dim(), *value.shape, *value.stride(), value.dtype, value.device)
    return (value,)


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
