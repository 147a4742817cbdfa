"""Regions of a model that Dynamo captures once for all that are alike (``torch.compiler.nested_compile_region``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import GraphModule, Node

from ..fqn import Pattern, choose


def sharing_parameters(
    graph_module: GraphModule, names: Mapping[int, tuple[str, ...]], patterns: Sequence[Pattern]
) -> list[tuple[tuple[str, ...], ...]]:
    """The names of parameters that stand in one place of the calls of one region, which has one graph for all of them.

    Args:
        graph_module: as Dynamo hands it to a backend.
        names: by position of the input.
        patterns: must treat such parameters alike.

    Raises:
        ValueError: they do not; names the parameters.
    """
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    known = {placeholders[index]: several for index, several in names.items() if several}
    calls: dict[str, list[Node]] = {}
    for node in graph_module.graph.nodes:
        if str(node.target) == "invoke_subgraph" and isinstance(node.args[0], Node):
            calls.setdefault(str(node.args[0].target), []).append(node)
    groups = []
    for several in calls.values():
        for operands in zip(*(call.args[2:] for call in several), strict=True):
            found = dict.fromkeys(known[one] for one in operands if isinstance(one, Node) and one in known)
            if len(found) > 1:
                _check_alike(tuple(found), patterns)
                groups.append(tuple(found))
    return groups


def _check_alike(several: Sequence[tuple[str, ...]], patterns: Sequence[Pattern]) -> None:
    schemes = [
        (pattern := choose(patterns, (names[0].removesuffix(".weight"), *names))) and pattern.scheme
        for names in several
    ]
    if any(scheme != schemes[0] for scheme in schemes):
        told = ", ".join(repr(names[0]) for names in several)
        raise ValueError(
            f"sparse_pass: {told} share one graph (torch.compiler.nested_compile_region), and the config treats them"
            " differently: name all of them with one scheme, or take the region's decorator away"
        )
