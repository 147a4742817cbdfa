"""The backward of a linear in a joint graph.

grad_input is the backward GEMM that reads the same weight; grad_weight is what the gradient output of the
weight is made of. AOTAutograd gives the GEMMs of one call the same ``seq_nr``, which tells calls apart where
several share a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from .gemms import (
    MOVES,
    GradientGemm,
    Linear,
    Use,
    aten,
    is_flip,
    is_move,
    made_by,
    packet_name,
    strip_moves,
    weight_place,
    weight_places,
)
from .inputs import input_of

# What stands between a GEMM's gradient and the gradient output of its weight.
_GRAD_MOVES = MOVES | frozenset(
    [
        "add",
        "cat",
        "slice_backward",
        "select_backward",
        "slice_scatter",
        "select_scatter",
        "constant_pad_nd",
        "sum",
    ]
)


def tangent_dependent(graph: Graph) -> set[Node]:
    """The backward: the nodes that need a gradient from outside, and those that AOTAutograd tags as backward.

    A zero gradient, such as that of ``sign``, or of anything without rows, can be a constant.
    """
    return reached([node for node in graph.nodes if _is_of_backward(node)], lambda node: node.users)


def reached(start: Iterable[Node], following: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """The nodes to start from, and all that follow them, one step after another."""
    pending, found = list(start), set[Node]()
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += following(node)
    return found


def _is_of_backward(node: Node) -> bool:
    if node.op == "call_function":
        return node.meta.get("partitioner_tag") == "is_backward"
    tangent = type(node.meta.get("desc")).__name__.startswith("Tangent") or str(node.target).startswith("tangents")
    return node.op == "placeholder" and tangent


def unwrapped(descriptor: Any) -> tuple[Any, tuple[object, ...]]:
    """What AOTAutograd says of a tensor; of an inner one, as of a DTensor, that of the whole, and the way in."""
    way = []
    while hasattr(descriptor, "base"):
        way.append(getattr(descriptor, "attr", None))
        descriptor = descriptor.base
    return descriptor, tuple(way)


def gradient_outputs(graph: Graph) -> dict[Any, int] | None:
    """Position of each gradient output by its input, as `unwrapped` gives it; None if outputs are not described."""
    output = graph.output_node()
    descriptors = output.meta.get("desc")
    values = output.args[0]
    if descriptors is None or not isinstance(values, (list, tuple)):
        return None
    described = [(value, *unwrapped(descriptor)) for value, descriptor in zip(values, descriptors, strict=False)]
    return {
        (whole.grad_of, way): index
        for index, (value, whole, way) in enumerate(described)
        if isinstance(value, Node) and hasattr(whole, "grad_of")
    }


@dataclass(frozen=True)
class Backward:
    """What is known of the backward of a graph."""

    graph: Graph
    nodes: Set[Node]
    """Those that need a gradient from outside."""
    grad_outputs: Mapping[Any, int] | None
    """As `gradient_outputs` gives them."""

    @functools.cached_property
    def numbered(self) -> Mapping[Any, Sequence[Node]]:
        """The calls of the graph by sequence number, in graph order."""
        numbered: dict[Any, list[Node]] = {}
        for node in self.graph.nodes:
            if node.op == "call_function" and node.meta.get("seq_nr") is not None:
                numbered.setdefault(node.meta["seq_nr"], []).append(node)
        return numbered


def with_backward(
    linear: Linear, calls: Sequence[Linear], grad_input: Sequence[Use], stray: Sequence[Use], backward: Backward
) -> Linear:
    """Add the backward GEMMs of one call.

    Args:
        calls: all calls of its weight, in graph order.
        grad_input: the backward reads of the weight that `assign_reads` gave to this call.
        stray: those that it gave to nobody.
    """
    unplaced = "a backward GEMM of the weight may belong to any of its calls" if stray else ""
    gradient = _gradient(linear, calls, backward)
    return replace(linear, grad_input=tuple(grad_input), stray=tuple(stray), unplaced_grad_input=unplaced, **gradient)


def _gradient(linear: Linear, calls: Sequence[Linear], backward: Backward) -> dict[str, Any]:
    """The fields of a linear that are about the gradient of its weight; empty if the weight has none of this call."""
    if backward.grad_outputs is None:
        return {"unplaced_grad_weight": "the graph does not describe its outputs; left as captured"}
    index = _position_of_gradient(linear.weight, backward.grad_outputs)
    computed = linear.weight.op == "call_function" and _reaches_gradient(linear.weight, backward.grad_outputs)
    if index is None and not computed:
        return {}
    if index is None or linear.computes:
        operand, missing = _gradient_of_computed(linear, backward), _COMPUTED
    else:
        gradient: Node = linear.weight.graph.output_node().args[0][index]  # type: ignore[index,assignment]
        operands = {one.output.gemm: _gradient_of_operand(gradient, one) for one in calls if not one.computes}
        # An op under no_grad carries the number of the op before it: of calls with one number the first has the
        # gradient.
        seq = linear.output.gemm.meta.get("seq_nr")
        first = next(one.output.gemm for one in calls if one.output.gemm.meta.get("seq_nr") == seq)
        operand, missing = operands[linear.output.gemm] if first is linear.output.gemm else None, NOT_FOUND
        if operand is None and any(found is not None for found in operands.values()):
            return {}  # a call without a gradient, beside one that has it
    if operand is None:
        return {"grad_output": index, "unplaced_grad_weight": missing}
    made = _grad_weight(operand, backward.nodes)
    return {"grad_output": index, "grad_operand": operand, "grad_weight": made}


NOT_FOUND = "not found in the graph; left as captured"
_COMPUTED = "that of a weight which the graph computes; left as captured"


def _position_of_gradient(weight: Node, grad_outputs: Mapping[Any, int]) -> int | None:
    """Position of a weight's gradient among the outputs. That of a subclass of one inner tensor may be plain."""
    whole, way = unwrapped(weight.meta.get("desc"))
    index = grad_outputs.get((whole, way))
    if index is None and way:
        index = grad_outputs.get((whole, ()))
        if index is not None:
            gradient: Node = weight.graph.output_node().args[0][index]  # type: ignore[index,assignment]
            index = index if gradient.meta["val"].shape == weight.meta["val"].shape else None
    return index


def _gradient_of_operand(gradient: Node, linear: Linear) -> Node | None:
    """Walk back from the weight's gradient to where this call's share of it leaves its GEMM."""
    seq = linear.output.gemm.meta.get("seq_nr")
    if seq is None:
        return None
    shape = linear.output.operand.meta["val"].shape
    turned = sum(map(is_flip, linear.output.chain)) % 2
    pending, seen = [(gradient, 0)], set()
    while pending:
        node, flips = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        # In the autograd node of the GEMM the last node has the operand's own layout. The sum of several
        # gradients is no part of it, although it gets the number of the node that ran last. An autograd function
        # gives the gradient in the layout of the weight, which the shape of a square one does not tell.
        value = node.meta.get("val")
        same = node.meta.get("seq_nr") == seq and isinstance(value, torch.Tensor) and value.shape == shape
        if same and packet_name(node) != "add" and flips % 2 == turned:
            return node
        if packet_name(node) in _GRAD_MOVES:
            pending += [(one, flips + is_flip(node)) for one in node.all_input_nodes]
    return None


def _reaches_gradient(computed: Node, grad_outputs: Mapping[Any, int]) -> bool:
    """Whether something that a weight is computed from has a gradient."""
    pending, seen = [computed], set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            if unwrapped(node.meta.get("desc")) in grad_outputs:
                return True
            pending += node.all_input_nodes
    return False


def _gradient_of_computed(linear: Linear, backward: Backward) -> Node | None:
    """The product of grad_output and input in the backward of a call, of whose weight no output is the gradient.

    It has the number of the call, which is that of no op before it: an op under no_grad carries the number of the op
    before it, and so do the ops inside of an autograd function. Their products are not looked for.
    """
    gemm, input = linear.output.gemm, input_of(linear.output)
    calls = backward.numbered.get(gemm.meta.get("seq_nr"), ())
    first = next((node for node in calls if node not in backward.nodes and not is_move(node)), None)
    if input is None or first is not gemm:
        return None
    root, _ = strip_moves(input.node)

    def multiplies(node: Node) -> bool:
        sources = [strip_moves(operand)[0] for operand in node.args if isinstance(operand, Node)]
        return root in sources and any(source in backward.nodes for source in sources)

    found = [node for node in calls if node in backward.nodes and _is_product(node) and multiplies(node)]
    return found[0] if len(found) == 1 else None


def _is_product(node: Node) -> bool:
    return bool(weight_places(node)) or node.target is aten.mul.Tensor


def _grad_weight(operand: Node, backward: Set[Node]) -> GradientGemm | None:
    """The matmul that made a gradient, if it is one of something from outside and something of the forward."""
    gemm = made_by(operand)
    if gemm.target is not aten.mm.default:
        return None
    # By what they were made from: moves of the input that stand in the backward are tagged as backward too.
    left, right = (isinstance(source, Node) and strip_moves(source)[0] in backward for source in gemm.args)
    return None if left == right else GradientGemm("grad_weight", gemm, 0 if left else 1)


def grad_input_gemm(linear: Linear, use: Use) -> GradientGemm | None:
    """A GEMM of ``linear.grad_input`` as one matmul of grad_output and weight.

    None for another op, and for one that contracts over the dim of the weight that output contracts over: it computes
    the output anew, as an autograd function may in its backward.
    """
    if use.gemm.target is not aten.mm.default or _contracted(use) == _contracted(linear.output):
        return None
    return GradientGemm("grad_input", use.gemm, 0 if weight_place(use) == 1 else 1)


def _contracted(use: Use) -> int:
    """Which of its two dims a GEMM contracts the weight over, as that is stored."""
    layout = next(layout for at, layout in weight_places(use.gemm) if use.gemm.args[at] is use.operand)
    return (sum(map(is_flip, use.chain)) + (layout == "nk")) % 2
