"""The input of a linear: where its GEMMs read it, and where its gradient stands. Reads the graph only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .gemms import Linear, Use, aten, is_flip, is_move, made_by, operand_of, strip_moves, weight_place


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
    first = gemm.target in (aten.addmm.default, aten.baddbmm.default, aten.addmv.default)  # the bias
    other = (3 if first else 1) - place
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
class InputRead:
    """Where the GEMM of grad_weight reads the input: operand ``place`` of ``gemm``, ``moves`` views after the input."""

    gemm: Node
    place: int
    moves: int

    def resolved(self) -> tuple[Node, tuple[Node, ...]]:
        """The input as the graph has it now, and the views that make the operand of it."""
        root, chain = strip_moves(operand_of(self.gemm, self.place))
        first = len(chain) - self.moves
        return (root, *chain)[first], chain[first:]


def input_reads(linear: Linear, input: Node) -> Iterator[InputRead]:
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
                yield InputRead(gemm, place, len(chain) - found)


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
