"""The backward of a linear in a joint graph.

grad_input is the backward GEMM that reads the same weight; grad_weight is what the gradient output of the
weight is made of. AOTAutograd gives the GEMMs of one call the same ``seq_nr``, which tells calls apart where
several share a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from .gemms import MOVES, Linear, Use, is_move, operands, packet_name, trace, weight_places

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
    """The nodes that need a gradient from outside: the backward, whatever the tags say."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            described = type(node.meta.get("desc")).__name__
            if described.startswith("Tangent") or str(node.target).startswith("tangents"):
                found.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def gradient_outputs(graph: Graph) -> dict[Any, int] | None:
    """Position of each gradient output by the descriptor of its input; None if outputs are not described."""
    output = graph.output_node()
    descriptors = output.meta.get("desc")
    values = output.args[0]
    if descriptors is None or not isinstance(values, (list, tuple)):
        return None
    return {
        descriptor.grad_of: index
        for index, (value, descriptor) in enumerate(zip(values, descriptors, strict=False))
        if isinstance(value, Node) and hasattr(descriptor, "grad_of")
    }


def with_backward(
    linear: Linear, sharing: list[Linear], reads: list[Use], grad_outputs: Mapping[Any, int] | None
) -> Linear:
    """Add the backward GEMMs. ``sharing`` are all calls of its weight, ``reads`` all backward GEMMs that read it."""
    seq = linear.output.gemm.meta.get("seq_nr")
    grad_input = tuple(use for use in reads if _belongs(use, linear, sharing))
    unplaced = ""
    gemms = [use for use in reads if weight_places(use.gemm)]
    if any(not any(_belongs(use, one, sharing) for one in sharing) for use in gemms):
        unplaced = "grad_input: a backward GEMM of the shared weight belongs to none of its calls; left dense"
    index = grad_operand = None
    if grad_outputs is None:
        unplaced = unplaced or "grad_weight: the graph does not describe its outputs; left as captured"
    else:
        index = grad_outputs.get(linear.weight.meta.get("desc"))
        if index is not None:
            gradient = linear.weight.graph.output_node().args[0][index]  # type: ignore[index]
            grad_operand = _gradient_of_operand(gradient, linear, seq)  # type: ignore[arg-type]
            if grad_operand is None:
                unplaced = unplaced or "grad_weight: not found in the graph; left as captured"
        elif linear.weight.op == "call_function":
            unplaced = unplaced or "grad_weight: that of a weight which the graph computes; left as captured"
    return replace(
        linear,
        grad_input=grad_input,
        grad_operand=grad_operand,
        grad_output=index,
        unplaced=unplaced,
    )


def backward_reads(node: Node) -> Iterator[tuple[Use, Node]]:
    """What a backward node reads, each with the node that it was made from.

    Of a GEMM the operands that may be a weight; of another op all, since what is a product and a sum in the
    forward (`weight_places`) can have a grad_input of another form.
    """
    if weight_places(node):
        yield from ((use, root) for use, root, _ in operands(node))
    elif node.op == "call_function" and not is_move(node):
        for operand in node.all_input_nodes:
            root, chain = trace(operand)
            yield Use(node, operand, chain), root


def _belongs(use: Use, linear: Linear, sharing: list[Linear]) -> bool:
    """Whether a backward node that reads the weight is the grad_input of this call."""
    seq = use.gemm.meta.get("seq_nr")
    if not weight_places(use.gemm):
        return seq is not None and bool(linear.output.gemm.meta.get("seq_nr") == seq)
    if len(sharing) == 1:
        return True
    if seq is not None and any(one.output.gemm.meta.get("seq_nr") == seq for one in sharing):
        return bool(linear.output.gemm.meta.get("seq_nr") == seq)
    return not set(linear.output.chain).isdisjoint(use.chain)


def _gradient_of_operand(gradient: Node, linear: Linear, seq: int | None) -> Node | None:
    """Walk back from the weight's gradient to where this call's share of it leaves its GEMM."""
    if seq is None:
        return None
    shape = linear.output.operand.meta["val"].shape
    pending, seen = [gradient], set()
    while pending:
        node = pending.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        # In the autograd node of the GEMM the last node has the operand's own layout. The sum of several
        # gradients is no part of it, although it gets the number of the node that ran last.
        value = node.meta.get("val")
        same = node.meta.get("seq_nr") == seq and isinstance(value, torch.Tensor) and value.shape == shape
        if same and packet_name(node) != "add":
            return node
        if packet_name(node) in _GRAD_MOVES:
            pending += [n for n in node.all_input_nodes if n not in seen]
    return None
