"""What a graph computes from its inputs before any matmul, such as a quantized weight. Reads the graph only.

A weight is masked at its root: the ops that compute something from it read the masked weight instead, wherever what
they compute reaches a matmul, in the forward and in the backward. For a fake-quantized linear, before and after::

    s  = amax(abs(w));  q = round(w / s) * s        y = mm(x, permute(q))          dx = mm(dy, q)

    v  = where(mask24(w), w, 0)
    s  = amax(abs(v));  q = round(v / s) * s        y = mm(x, permute(q))          dx = mm(dy, q)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from .backward import reached, unwrapped
from .gemms import Use, is_move, packet_name, weight_places

# What they give holds rows of the weight for each token, not the weight.
_LOOKUPS = frozenset({"embedding", "embedding_bag", "_embedding_bag", "index", "index_select", "gather", "take"})


@dataclass(frozen=True, slots=True)
class Derived:
    """What the nodes of a graph are computed from."""

    sources: Mapping[Node, frozenset[Node]]
    """The inputs of the graph that a node is computed from; absent where a matmul or a gradient from outside is
    among what it is computed from."""
    holds: Mapping[Node, frozenset[Node]]
    """Of the sources those whose elements the node holds, changed or not, and not only a norm or a scale of them:
    tensors of two dims that could be weights."""
    masked: frozenset[Node]
    """What is computed from a weight that an earlier pass has masked."""
    matmuls: Mapping[Node, None]
    """The matmuls themselves, in graph order: those of the forward and of the backward."""


def derive(graph: Graph, backward: Collection[Node]) -> Derived:
    """Follow the inputs of a graph up to the first matmuls.

    Args:
        backward: placeholders among them are gradients from outside.
    """
    sources: dict[Node, frozenset[Node]] = {}
    holds: dict[Node, frozenset[Node]] = {}
    masked: set[Node] = set()
    matmuls: dict[Node, None] = {}
    nothing: frozenset[Node] = frozenset()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            if node not in backward:
                sources[node] = frozenset([node])
                holds[node] = frozenset([node]) if _could_be_weight(node.meta.get("val")) else nothing
        elif weight_places(node):
            matmuls[node] = None
        elif node.op == "call_function":
            inputs = node.all_input_nodes
            if not inputs or (inputs[0] in sources and all(one in sources for one in inputs)):
                sources[node] = nothing.union(*(sources[one] for one in inputs))
                if str(node.target).startswith("sparse_pass.") or not masked.isdisjoint(inputs):
                    masked.add(node)
                held = nothing.union(*(holds[one] for one in inputs))
                holds[node] = held if held and (is_move(node) or _keeps_elements(node)) else nothing
    return Derived(sources, holds, frozenset(masked), matmuls)


def _could_be_weight(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.is_floating_point() and value.itemsize > 1


def _keeps_elements(node: Node) -> bool:
    """Whether an op gives at least as many elements as it takes of what may be a weight."""
    if packet_name(node) in _LOOKUPS:
        return False
    taken = [value.numel() for one in node.all_input_nodes if isinstance(value := one.meta.get("val"), torch.Tensor)]
    given = [leaf.numel() for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
    sizes = [*taken, *given]
    return bool(taken and given) and all(isinstance(size, int) for size in sizes) and max(given) >= max(taken)


def computing_reads(
    weight: Node,
    ends: Iterable[Node],
    derived: Derived,
    numbered: Mapping[Any, Sequence[Node]],
    later: Collection[Node],
) -> tuple[Use, ...]:
    """The ops that compute something from a weight on the way to what its matmuls read, each as a `Use` of the weight.

    With them those that compute its gradient back from there, as the backward of ``abs`` reads the sign of the weight.

    Args:
        ends: what the matmuls read.
        numbered: the calls of the graph by sequence number, in graph order.
        later: nodes that only the backward needs.
    """
    leading: set[Node] = set()
    pending = [end for end in ends if weight in derived.sources.get(end, ())]
    while pending:
        node = pending.pop()
        if node not in leading and node is not weight:
            leading.add(node)
            pending += [one for one in node.all_input_nodes if weight in derived.sources[one]]
    # An op under no_grad carries the number of the op before it, whose backward is not meant.
    numbers = {
        number for number, calls in numbered.items() if next((n for n in calls if n not in later), None) in leading
    }
    return tuple(
        use
        for use in reads_of(weight)
        if use.gemm in leading
        or (use.gemm in later and not weight_places(use.gemm) and use.gemm.meta.get("seq_nr") in numbers)
    )


def scales_of(gemm: Node, derived: Derived) -> Iterator[Node]:
    """The factors, computed from inputs of the graph, by which a matmul's result or its operands are multiplied or
    divided: such as the scale of a quantized weight, which may be computed once more for it."""
    for following in (lambda node: list(node.users), lambda node: node.all_input_nodes):
        pending, seen = list(following(gemm)), set()
        while pending:
            node = pending.pop()
            scaled = packet_name(node) in ("mul", "div")
            if node not in seen and node not in derived.sources and (scaled or is_move(node)):
                seen.add(node)
                yield from (one for one in node.all_input_nodes if one in derived.sources)
                pending += following(node)


def reads_of(weight: Node) -> Iterator[Use]:
    """All calls that read a weight, through moves or directly, which are no moves themselves."""
    pending: list[tuple[Node, tuple[Node, ...]]] = [(weight, ())]
    while pending:
        node, chain = pending.pop()
        for user in node.users:
            if user.op != "call_function":
                continue
            if is_move(user):
                pending.append((user, (*chain, user)))
            else:
                yield Use(user, node, chain)


def needed_by_outputs(graph: Graph) -> set[Node] | None:
    """What the outputs of a joint graph that are no gradients are computed from: the forward without what is only
    computed for the backward. None if the graph does not tell which outputs are gradients, or has none."""
    output = graph.output_node()
    descriptors, values = output.meta.get("desc"), output.args[0]
    if descriptors is None or not isinstance(values, (list, tuple)):
        return None
    gradients = [hasattr(unwrapped(one)[0], "grad_of") for one in descriptors]
    if not any(gradients):
        return None
    outputs = [
        value for value, gradient in zip(values, gradients, strict=False) if isinstance(value, Node) and not gradient
    ]
    return reached(outputs, lambda node: node.all_input_nodes)
