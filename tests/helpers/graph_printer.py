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
from functorch.compile import default_partition, make_boxed_func
from support import GraphFacts, check_invariants, graph_facts
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.fx import Graph, GraphModule, Node

from sparse_pass.capture import copy_graph, report_graph
from sparse_pass.captured import captured as look
from sparse_pass.fqn import parse_config
from sparse_pass.one_graph import rewrite_graph
from sparse_pass.plan.costs import Costs, Preparation, Product, Times
from sparse_pass.plan.limits import AskLimits, Limits, device_limits
from sparse_pass.report import Report

# Their lists are shapes.
SHAPED = frozenset({"view", "reshape", "_unsafe_view", "expand", "full", "unsqueeze"})
# Where a tensor is made: the same in all graphs of a test.
PLACED = frozenset({"layout", "device", "pin_memory"})

HOPPER = Limits(device="cuda", capability=(9, 0))


def printed(graph: Graph) -> str:
    """The calls of a graph in order, then what it returns. Inputs show where they are used."""
    names: dict[Node, str] = {}
    taken: Counter[str] = Counter()
    lines = []
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            names[node] = node.name
        elif node.op == "call_function":
            short = _op(node).rpartition(".")[2]
            names[node] = short + (f"_{taken[short]}" if taken[short] else "")
            taken[short] += 1
            comment = _comment(node)
            lines.append(f"{names[node]} = {_call(node, names)}" + (f"  # {comment}" if comment else ""))
        elif node.op == "output":
            values = node.args[0] if isinstance(node.args[0], (list, tuple)) else (node.args[0],)
            lines.append("return " + ", ".join(_argument(value, names) for value in values))
    return "\n".join(lines)


def _op(node: Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet) if packet is not None else getattr(node.target, "__name__", str(node.target))


def _call(node: Node, names: Mapping[Node, str]) -> str:
    if node.target is operator.getitem:
        return f"{_argument(node.args[0], names)}[{node.args[1]}]"
    shaped = _op(node).rpartition(".")[2] in SHAPED
    shown = [_argument(arg, names) for arg in node.args if not (shaped and isinstance(arg, (list, tuple)))]
    shown += [f"{key}={_argument(value, names)}" for key, value in node.kwargs.items() if not shaped | (key in PLACED)]
    return f"{_op(node)}({', '.join(shown)})"


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
    facts: GraphFacts
    report: Report

    @property
    def text(self) -> str:
        return printed(self.after.graph)

    def check_invariants(self) -> None:
        check_invariants(self.after, self.facts)


def capture_all(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    config: Mapping[str, Any],
    *,
    root: nn.Module | None = None,
    limits: AskLimits = device_limits,
    costs: Costs | None = None,
    **compile_options: Any,
) -> list[Captured]:
    """Every graph that torch.compile captures from ``model``, as Inductor would show it to the pass.

    The model runs op by op, so that a graph break or a second shape reaches its graph too.
    """
    captured: list[Captured] = []

    def backend(graph_module: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        def rewrite_copy(graph: Graph) -> None:
            before, after = (_copied(graph) for _ in range(2))
            facts = graph_facts(after)
            names = look(graph_module, root).names
            report = rewrite_graph(after.graph, parse_config(config), names, limits=limits, costs=costs)
            captured.append(Captured(before, after, facts, report))

        report_graph(copy_graph(graph_module), rewrite_copy)  # type: ignore[arg-type]  # any callable on a graph
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, **compile_options)(*inputs)
    return captured


def capture(model: Callable[..., Any], inputs: Sequence[Any], config: Mapping[str, Any], **options: Any) -> Captured:
    """The one graph of a model."""
    (only,) = capture_all(model, inputs, config, **options)
    return only


@dataclass(frozen=True)
class Fixed:
    """Microseconds, sparse and dense, of each GEMM (by M, if a mapping) and of making the operand."""

    gemm: Times | Mapping[int, Times]
    operand: Times

    def product(self, product: Product) -> Times:
        return self.gemm[product.m] if isinstance(self.gemm, Mapping) else self.gemm

    def preparation(self, preparation: Preparation) -> Times:
        return self.operand


def device(limits: Limits) -> AskLimits:
    """A device with these limits, whatever tensors are on."""
    return lambda *_: limits


def trains_as(
    limits: Limits, model: nn.Module, config: Mapping[str, Any], costs: Costs | None = None
) -> tuple[Callable[..., Any], list[Report]]:
    """A backend of torch.compile for a device with these limits, whose graphs run op by op; and its reports."""
    reports: list[Report] = []

    def backend(graph_module: GraphModule, inputs: Sequence[Any]) -> Any:
        def partitioned(joint: GraphModule, *args: Any, **kwargs: Any) -> Any:
            names, patterns = look(graph_module, model).names, parse_config(config)
            reports.append(rewrite_graph(joint.graph, patterns, names, limits=device(limits), costs=costs))
            joint.recompile()
            return default_partition(joint, *args, **kwargs)

        return aot_autograd(fw_compiler=lambda traced, _: make_boxed_func(traced), partition_fn=partitioned)(
            graph_module, inputs
        )

    return backend, reports


def _copied(graph: Graph) -> GraphModule:
    copied = Graph()
    nodes: dict[Node, Node] = {}
    copied.output(copied.graph_copy(graph, nodes))
    copied.output_node().meta = dict(graph.output_node().meta)
    return GraphModule(graph.owning_module or nn.Module(), copied)
