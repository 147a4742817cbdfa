"""The input of a linear: where its GEMMs read it, and where its gradient stands. Reads the graph only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .gemms import (
    MOVES,
    Linear,
    Use,
    aten,
    is_flip,
    is_move,
    made_by,
    operand_of,
    other_place,
    packet_name,
    strip_moves,
    weight_place,
    weight_places,
)

_PARTS = frozenset(["slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind"])
_CASTS = frozenset(["convert_element_type", "_to_copy", "to", "lift_fresh_copy"])
_COPIES = frozenset(["clone", "contiguous"])
_WHOLE = MOVES - _PARTS - _CASTS
"""Moves after which all values are there, and no others."""


@dataclass(frozen=True, slots=True)
class Input:
    """The input of a forward GEMM: operand number ``place``, which ``chain`` made from ``node``."""

    node: Node
    place: int
    chain: tuple[Node, ...]
    k_last: bool
    """Whether K is the last dim of ``node``; it is the last but one if not."""


def input_of(use: Use) -> Input | None:
    """The input of the GEMM that reads a weight, as the graph has it now."""
    gemm = use.gemm
    place = weight_place(use)
    other = other_place(gemm, place)
    operand = gemm.args[other]
    if not isinstance(operand, Node):
        return None
    product = gemm.target is aten.mul.Tensor
    right = not product and place > other
    if right or operand.meta["val"].dim() == 1:
        narrow = _narrow(operand) if product else None
        return Input(narrow or operand, other, (operand,) if narrow else (), True)
    # Of a product and a sum, what became a column is the input.
    source = operand.args[0] if product and is_move(operand) else None
    if isinstance(source, Node) and source.meta["val"].shape[-1] == operand.meta["val"].shape[-2]:
        return Input(source, other, (operand,), True)
    return Input(operand, other, (), False)


def _narrow(node: Node) -> Node | None:
    """The 16-bit tensor that a node is in float32, or None: the gradient of the weight reads that, and not the cast."""
    source = node.args[0] if is_move(node) else None
    if not isinstance(source, Node) or node.meta["val"].dtype != torch.float32:
        return None
    return source if source.meta["val"].dtype in (torch.float16, torch.bfloat16) else None


@dataclass(frozen=True, slots=True)
class OperandRead:
    """Where a GEMM reads a tensor, such as the input: operand ``place`` of ``gemm``, ``moves`` views after it."""

    gemm: Node
    place: int
    moves: int

    def resolved(self) -> tuple[Node, tuple[Node, ...]]:
        """The tensor as the graph has it now, and the views that make the operand of it."""
        root, chain = strip_moves(operand_of(self.gemm, self.place))
        first = len(chain) - self.moves
        return (root, *chain)[first], chain[first:]


def input_reads(linear: Linear, input: Node) -> Iterator[OperandRead]:
    """The operands of the GEMM of grad_weight that are the input, or views of it.

    Or of what is the same: after an op in place each that reads it makes views anew.
    """
    if linear.grad_operand is None:
        return
    gemm = made_by(linear.grad_operand)
    for place, operand in enumerate(gemm.args):
        if isinstance(operand, Node):
            root, chain = strip_moves(operand)
            made = (root, *chain)
            found = next((at for at, node in enumerate(made) if _is_same(node, input)), None)
            if found is not None:
                yield OperandRead(gemm, place, len(chain) - found)


def dense_read(use: Use) -> tuple[Node, OperandRead] | None:
    """The tensor that a GEMM multiplies by the weight, before views of all of it, and where it is read.

    None if the GEMM is none that is known, or multiplies 8-bit values already.
    """
    gemm = use.gemm
    places = [at for at, _ in weight_places(gemm) if gemm.args[at] is use.operand]
    if not places or gemm.target in (aten._scaled_mm.default, aten._int_mm.default):
        return None
    place = other_place(gemm, places[0])
    return operand_read(gemm, place) if isinstance(gemm.args[place], Node) else None


def operand_read(gemm: Node, place: int) -> tuple[Node, OperandRead]:
    """The tensor that is operand ``place`` of a GEMM, before views of all of it, and where it is read.

    A copy is a tensor of its own: what is read in another order than it lies in memory is copied for the GEMM.
    """
    root, chain = strip_moves(operand_of(gemm, place))
    views = 0
    for node in reversed(chain):
        if packet_name(node) not in _WHOLE - _COPIES:
            break
        views += 1
    return (root, *chain)[len(chain) - views], OperandRead(gemm, place, views)


def _is_same(one: object, other: object) -> bool:
    """Whether two nodes are one, or the same moves of one."""
    if one is other or not isinstance(one, Node) or not isinstance(other, Node):
        return one is other
    alike = is_move(one) and one.target == other.target and one.kwargs == other.kwargs
    return alike and one.args[1:] == other.args[1:] and _is_same(one.args[0], other.args[0])


def gradient_of(input: Input, gemm: Node) -> tuple[Node, bool] | None:
    """The gradient of the input that a GEMM gives, or of what its moves made of it; and whether it is the latter.

    Of a product and a sum the sum has the shape. Of an operand stored column by column the GEMM may give the transpose,
    which the shape of a square one does not tell.
    """
    moved = input.chain[-1] if input.chain else input.node
    shapes = [input.node.meta["val"].shape, moved.meta["val"].shape]
    node, seq = gemm, gemm.meta.get("seq_nr")
    while True:
        following = [user for user in node.users if user.meta.get("seq_nr") == seq]
        found = any(_is_shape(node, shape) for shape in shapes)
        only = following[0] if following and len(node.users) == 1 else None
        if only is None or (found and (seq is None or not is_flip(only))):
            break
        node = only
    return (node, not _is_shape(node, shapes[0])) if found else None


def _is_shape(node: Node, shape: torch.Size) -> bool:
    """Whether a node has this shape, as far as is known without a guard."""
    own = node.meta["val"].shape
    return len(own) == len(shape) and all(statically_known_true(a == b) for a, b in zip(own, shape, strict=True))
