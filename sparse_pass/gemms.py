"""What a linear is in a captured graph: a GEMM that reads a weight through moves. Reads single nodes only."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

aten = torch.ops.aten

Layout = Literal["kn", "nk"]

# Position of the operand that may hold the weight, and its layout as the op reads it: `kn` as in
# mm(input, weight.T), `nk` as in linear(input, weight) or in mv(weight, input).
GEMMS: dict[Any, tuple[tuple[int, Layout], ...]] = {
    aten.mm.default: ((1, "kn"), (0, "nk")),
    aten.addmm.default: ((2, "kn"), (1, "nk")),
    aten.bmm.default: ((1, "kn"), (0, "nk")),
    aten.baddbmm.default: ((2, "kn"), (1, "nk")),
    aten.mv.default: ((0, "nk"),),
    aten.addmv.default: ((1, "nk"),),
    aten.matmul.default: ((1, "kn"), (0, "nk")),
    aten.linear.default: ((1, "nk"),),
    # Inductor's CPU decomposition of mm with one row: (input.T * weight.T).sum(0, keepdim=True).
    aten.mul.Tensor: ((1, "kn"),),
}

# Ops that only move or round elements: a 2:4 mask commutes with re-running them on the masked weight.
MOVES = frozenset(
    [
        "permute",
        "t",
        "transpose",
        "numpy_T",
        "view",
        "_unsafe_view",
        "reshape",
        "flatten",
        "unflatten",
        "expand",
        "unsqueeze",
        "squeeze",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "lift_fresh_copy",
        "slice",
        "select",
        "narrow",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "convert_element_type",
        "_to_copy",
        "to",
    ]
)


@dataclass(frozen=True, slots=True)
class Use:
    """A GEMM that reads the weight: ``gemm`` reads ``operand``, which ``chain`` made from the weight.

    ``chain`` runs from the node after the weight to ``operand``; it is empty if they are the same.
    """

    gemm: Node
    operand: Node
    chain: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Linear:
    """One call of a linear layer. Names are in normal form, the best one first."""

    names: tuple[str, ...]
    weight: Node
    """The tensor whose 2:4 mask is meant: a parameter, or what a parametrization computed."""
    output: Use
    layout: Layout
    shape: tuple[Any, int, int]
    """(M, N, K); M is an int or a SymInt."""
    grad_input: tuple[Use, ...] = ()
    grad_operand: Node | None = None
    """Gradient of ``output.operand``, before it is brought to the layout of the weight."""
    grad_output: int | None = None
    """Position of the weight's gradient among the outputs of the graph."""
    unplaced: str = ""
    """What of the backward was expected and not found."""
    ambiguous: str = ""
    """Why the name may not mean this weight."""


def is_gemm(node: Node) -> bool:
    if node.op != "call_function" or node.target not in GEMMS:
        return False
    if node.target is not aten.mul.Tensor:
        return True
    # A one-row matmul in disguise: [K, 1] * [K, N], summed over K and nothing else.
    left, right = node.args
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return False
    a, b = left.meta.get("val"), right.meta.get("val")
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dim() == b.dim() == 2):
        return False
    return (
        a.shape[1] == 1
        and a.shape[0] == b.shape[0]
        and bool(node.users)
        and all(user.target is aten.sum.dim_IntList and list(user.args[1:]) == [[0], True] for user in node.users)
    )


def operands(gemm: Node) -> Iterator[tuple[Use, Node, Layout]]:
    for position, layout in GEMMS[gemm.target]:
        operand = gemm.args[position]
        if isinstance(operand, Node):
            root, chain = _trace(operand)
            yield Use(gemm, operand, chain), root, layout


def _trace(operand: Node) -> tuple[Node, tuple[Node, ...]]:
    """The node that ``operand`` was made from by moves alone, and the moves in order."""
    chain: list[Node] = []
    node = operand
    while node.op == "call_function" and (node.target is operator.getitem or packet_name(node) in MOVES):
        source = node.args[0]
        if not isinstance(source, Node):
            break
        if node.target is operator.getitem and packet_name(source) not in MOVES:
            break
        chain.append(node)
        node = source
    return node, tuple(reversed(chain))


def packet_name(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else ""
