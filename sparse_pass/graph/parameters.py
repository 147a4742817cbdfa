"""The parameters of a captured graph: their names, and who reads them besides the matmuls of linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..fqn import normalize
from ..shards import Sharding
from .backward import unwrapped
from .gemms import is_move, may_multiply


@dataclass(frozen=True, kw_only=True, eq=False)
class Names:
    """Parameter names by position of the graph input, from the graph that Dynamo captured."""

    by_input: Mapping[int, tuple[str, ...]]
    by_attribute: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of parameters that are attributes of the graph, not inputs."""
    read: frozenset[str] = frozenset()
    """Names of the parameters that the graph does more with than look up rows."""
    eager_backward: frozenset[str] = frozenset()
    """Names of the parameters that are in the hands of an autograd.Function whose backward runs eagerly."""
    of_model: bool = True
    """False where the parameters are those of a copy of the model that names are names in."""
    sharing: Sequence[tuple[tuple[str, ...], ...]] = ()
    """Names of parameters that are multiplied in one graph of a region, which bears the names of one of them."""
    with_gradients: bool = True
    """Whether gradients were enabled when the graph was captured."""
    ours: bool = True
    """False for the step of an optimizer, whose parameters are not multiplied by anything, and for a backward that
    compiled autograd captured, whose GEMMs were rewritten with their forward."""
    last_graph: bool = True
    """False where a graph break follows: what is not named here may be named in the next graph."""
    shardings: Mapping[int, Sharding] = field(default_factory=dict)
    """How ranks share parameters that are DTensors, by position of the graph input."""
    checked: bool = False
    """Whether the config was checked against the model: then an absent layer is no surprise."""


def parameter_nodes(
    graph: Graph,
    names_by_input: Mapping[int, tuple[str, ...]] | None = None,
    names_by_attribute: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[Node, tuple[str, ...]]:
    """Names of the nodes that hold parameters.

    Args:
        names_by_input: names by position of the graph input before AOTAutograd, as Dynamo numbers them.
        names_by_attribute: names of parameters that were attributes of Dynamo's graph, where not their own.
    """
    found: dict[Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(node.target, str):
            found[node] = (normalize(node.target),)
        elif node.op == "placeholder":
            names = _input_names(node.meta.get("desc"), names_by_input or {}, names_by_attribute or {})
            if names is not None:
                found[node] = names
    return found


def sharding_of_nodes(graph: Graph, by_input: Mapping[int, Sharding]) -> dict[Node, Sharding]:
    """Of the nodes that hold a shard of a parameter: how ranks share it.

    Args:
        by_input: by position of the graph input before AOTAutograd.
    """
    found = {}
    for node in graph.nodes:
        descriptor, way = unwrapped(node.meta.get("desc"))
        if way and type(descriptor).__name__ == "PlainAOTInput" and descriptor.idx in by_input:
            found[node] = by_input[descriptor.idx]
    return found


def _input_names(
    descriptor: Any, names_by_input: Mapping[int, tuple[str, ...]], names_by_attribute: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...] | None:
    descriptor, _ = unwrapped(descriptor)
    kind = type(descriptor).__name__
    if kind == "PlainAOTInput":
        return names_by_input.get(descriptor.idx)
    if kind == "ParamAOTInput":
        return names_by_attribute.get(descriptor.target, (normalize(descriptor.target),))
    return None


def has_backward(graph: Graph) -> bool:
    """Whether a graph holds a backward, as the joint graph of a training step does."""
    return any(
        str(node.target).startswith("tangents") or node.meta.get("partitioner_tag") == "is_backward"
        for node in graph.nodes
    )


def other_readers(parameter: Node, backward: Set[Node]) -> list[str]:
    """Forward ops that read a parameter, directly or through moves: why a named weight may have no linear.

    Looking up rows, as of an embedding that a linear shares, is not counted, nor are regions that are compiled by
    themselves: those come to the pass as graphs of their own.
    """
    pending, readers = [parameter], []
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in backward or user.op != "call_function":
                continue
            if is_move(user):
                pending.append(user)
            elif not any(word in str(user.target) for word in ("embedding", "invoke_subgraph")):
                readers.append(str(user.target))
    return list(dict.fromkeys(readers))


def multiplying_readers(parameter: Node) -> list[str]:
    """Ops that multiply by a parameter, or may do so, as one of another library does: through moves, and through what
    is computed from it and smaller tensors, such as scales.

    Regions that are compiled by themselves come to the pass as graphs of their own.
    """
    pending, seen, readers = [parameter], {parameter}, []
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in seen or user.op != "call_function" or "invoke_subgraph" in str(user.target):
                continue
            seen.add(user)
            if is_move(user) or _is_larger_than_the_rest(node, user):
                pending.append(user)
            elif may_multiply(user):
                readers.append(str(user.target))
    return list(dict.fromkeys(readers))


def _is_larger_than_the_rest(node: Node, user: Node) -> bool:
    if torch.Tag.pointwise not in getattr(user.target, "tags", ()):
        return False
    others = [value for one in user.all_input_nodes if one is not node and hasattr(value := one.meta["val"], "numel")]
    return all(statically_known_true(other.numel() < node.meta["val"].numel()) for other in others)
