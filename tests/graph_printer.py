"""Graphs as text for golden tests, and a way to capture them without compiling.

One line per call, in the names of the ops, without shapes and paths::

    mm = aten.mm(primals_2, permute)  # up
    mm_1 = aten.mm(tangents_1, permute_1)  # up, backward

The comment is the node's metadata: the layer of its module stack, ``backward`` if the partitioner is
told so, ``recompute`` if activation checkpointing is.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from sparse_pass.backend import graph_names
from sparse_pass.capture import copy_graph, report_graph
from sparse_pass.fqn import parse_config
from sparse_pass.graph_pass import rewrite_graph
from sparse_pass.report import Report

# Their lists are shapes.
SHAPED = frozenset({"view", "reshape", "_unsafe_view", "expand", "full", "unsqueeze"})


def printed(graph: Graph) -> str:
    """The calls of a graph in order, then what it returns. Inputs show where they are used."""
    names: dict[Node, str] = {}
    taken: Counter[str] = Counter()
    lines = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            names[node] = node.name
        elif node.op == "call_function":
            op = _op(node)
            short = op.rpartition(".")[2]
            names[node] = short + (f"_{taken[short]}" if taken[short] else "")
            taken[short] += 1
            comment = _comment(node)
            lines.append(
                f"{names[node]} = {op}({_arguments(node, names)})" + (f"  # {comment}" if comment else "")
            )
        elif node.op == "output":
            values = node.args[0] if isinstance(node.args[0], (list, tuple)) else (node.args[0],)
            lines.append("return " + ", ".join(_argument(value, names) for value in values))
    return "\n".join(lines)


def _op(node: Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(node.target, "__name__", str(node.target))


def _arguments(node: Node, names: Mapping[Node, str]) -> str:
    shaped = _op(node).rpartition(".")[2] in SHAPED
    shown = [_argument(arg, names) for arg in node.args if not (shaped and isinstance(arg, (list, tuple)))]
    shown += [f"{key}={_argument(value, names)}" for key, value in node.kwargs.items() if not shaped]
    return ", ".join(shown)


def _argument(value: Any, names: Mapping[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(one, names) for one in value) + "]"
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else repr(value)


def _comment(node: Node) -> str:
    layer = layer_of(node)
    backward = "backward" if node.meta.get("partitioner_tag") == "is_backward" else ""
    recompute = "recompute" if node.meta.get("recompute") is not None else ""
    return ", ".join(part for part in (layer, backward, recompute) if part)


def layer_of(node: Node) -> str:
    """The innermost module of a node, as a user spells it."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return re.sub(r"^[LG]\['\w+'\]\.?", "", path)


@dataclass(frozen=True)
class Captured:
    """One graph before and after the pass."""

    before: GraphModule
    after: GraphModule
    report: Report

    @property
    def text(self) -> str:
        return printed(self.after.graph)


def capture_all(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    config: Mapping[str, Any],
    *,
    root: nn.Module | None = None,
    **compile_options: Any,
) -> list[Captured]:
    """Every graph that torch.compile captures from ``model``, as Inductor would show it to the pass.

    The model runs op by op, so that a graph break or a second shape reaches its graph too.
    """
    captured: list[Captured] = []

    def backend(graph_module: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        def rewrite_copy(graph: Graph) -> None:
            before, after = (_copied(graph) for _ in range(2))
            report = rewrite_graph(after.graph, parse_config(config), graph_names(graph_module, root))
            captured.append(Captured(before, after, report))

        report_graph(copy_graph(graph_module), rewrite_copy)  # type: ignore[arg-type]  # any callable on a graph
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, **compile_options)(*inputs)
    return captured


def capture(
    model: Callable[..., Any], inputs: Sequence[Any], config: Mapping[str, Any], **options: Any
) -> Captured:
    """The one graph of a model."""
    (only,) = capture_all(model, inputs, config, **options)
    return only


def _copied(graph: Graph) -> GraphModule:
    copied = Graph()
    nodes: dict[Node, Node] = {}
    copied.output(copied.graph_copy(graph, nodes))
    copied.output_node().meta = dict(graph.output_node().meta)
    return GraphModule(graph.owning_module or nn.Module(), copied)


def check_invariants(captured: Captured) -> None:
    """What must hold of every rewritten graph; see each assertion."""
    before, after = captured.before.graph, captured.after.graph
    after.lint()
    assert _signature(after) == _signature(before)
    old = {node.name for node in before.nodes}
    new = [node for node in after.nodes if node.name not in old]
    dead = {node.name for node in before.nodes if not node.users}
    left = [node.name for node in after.nodes if not node.users and node.op == "call_function"]
    assert [name for name in left if name not in dead] == [], "dead nodes"
    _check_values(captured.after)
    _check_metadata(before, new)


def _signature(graph: Graph) -> tuple[Any, ...]:
    """Inputs and outputs as the caller of the graph sees them."""
    inputs = [(node.name, node.target, str(node.meta.get("desc"))) for node in graph.nodes if node.op == "placeholder"]
    output = graph.output_node()
    values: list[Any] = []
    map_arg(output.args, lambda node: values.append(_described(node.meta["val"])))
    return inputs, len(output.args[0]), values, str(output.meta.get("desc"))  # type: ignore[arg-type]


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (list(map(str, value.shape)), list(map(str, value.stride())), value.dtype, value.device)
    if isinstance(value, (list, tuple)):
        return [_described(one) for one in value]
    return str(value)


def _check_values(graph_module: GraphModule) -> None:
    """Run the graph again on its fake inputs: each node gives what its ``meta["val"]`` says."""
    left: dict[str, Any] = {node.name: _described(node.meta["val"]) for node in graph_module.graph.nodes if "val" in node.meta}
    inputs = [node.meta["val"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    calls = {node.name for node in graph_module.graph.nodes if node.op == "call_function"}
    assert calls <= left.keys(), "nodes without meta['val']"
    mode = torch._guards.detect_fake_mode(inputs)
    found: dict[str, Any] = {}

    class Recording(torch.fx.Interpreter):
        def run_node(self, node: Node) -> Any:
            result = super().run_node(node)
            if node.name in calls:
                found[node.name] = _described(result)
            return result

    with mode:
        Recording(graph_module).run(*inputs)
    assert {name: left[name] for name in calls} == found


# Values of one node, not of what it was replaced with.
OWN_META = frozenset({"val", "tensor_meta", "eager_input_vals", "desc"})


def _check_metadata(before: Graph, new: Sequence[Node]) -> None:
    """Each new node bears the metadata of one old node, so that partitioner and checkpointing place it as that one."""
    known = [_tags(node) for node in before.nodes if node.op == "call_function"]
    lost = [node.name for node in new if _tags(node) not in known]
    assert lost == [], "nodes whose metadata is no copy of a captured node's"


def _tags(node: Node) -> dict[str, Any]:
    return {key: value for key, value in node.meta.items() if key not in OWN_META}
