"""Rewrite the input of a linear to a 2:4 one, with dense matmuls.

Before and after::

    y  = addmm(b, x, permute(w))                 dw = mm(permute(dy), x)         dx = mm(dy, w)

    m  = sparse_pass.input_mask24(x, "optimal")
    s  = where(m, x, 0)
    y  = addmm(b, s, permute(w))                 dw = mm(permute(dy), s)         dx = mm(dy, w)

With ``grad_input="masked"``, ``dx = where(m, mm(dy, w), 0)``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from . import ops as _ops  # noqa: F401  (registers torch.ops.sparse_pass)
from .config import ActivationSparsity
from .editor import Editor
from .gemms import Input, Linear, aten, input_of, made_by, trace

sparse_ops = torch.ops.sparse_pass


def why_no_masked_gradient(linear: Linear) -> str | None:
    """Why the gradient of the input cannot be masked, or None if it can be, or if there is none."""
    if linear.unplaced.startswith("grad_input"):
        return linear.unplaced
    input = input_of(linear.output)
    if any(input is None or _gradient_of(input, use.gemm) is None for use in linear.grad_input):
        return "grad_input: not found in the layout of the input; left as captured"
    return None


def why_dense_grad_weight(linear: Linear) -> str | None:
    """Why grad_weight cannot be given the masked input, or None if it can be, or if there is none."""
    if linear.grad_output is None:
        return linear.unplaced if linear.unplaced.startswith("grad_weight") else None
    if linear.grad_operand is None:
        return "grad_weight: not found in the graph; left as captured"
    input = input_of(linear.output)
    if input is None or not any(True for _ in _reads(linear, input.node)):
        return "grad_weight: the GEMM that reads the input was not found; left as captured"
    return None


def rewrite_input(edit: Editor, linear: Linear, scheme: ActivationSparsity, *, grad_weight: bool) -> None:
    """Give output, and grad_weight if asked, the masked input, and mask its gradient if the scheme says so."""
    gemm = linear.output.gemm
    input = input_of(linear.output)
    assert input is not None
    mask = edit.once(
        ("input mask", input.node, scheme.mask, input.k_last), lambda: _mask(edit, input, scheme.mask, gemm)
    )
    kept = edit.once(
        ("input", mask),
        lambda: edit.call_before(gemm, aten.where.self, (mask, input.node, edit.zero(input.node, gemm, like=gemm))),
    )
    if grad_weight:
        for reader, at, chain in list(_reads(linear, input.node)):
            old = reader.args[at]
            reader.update_arg(at, edit.replay(chain, input.node, kept, reader))
            edit.erase_unused(old)
    if scheme.grad_input == "masked":
        for use in linear.grad_input:
            found = _gradient_of(input, use.gemm)
            assert found is not None
            gradient, moved = found
            edit.mask_gradient(gradient, edit.replay(input.chain, input.node, mask, gemm) if moved else mask)
    operand = gemm.args[input.place]
    gemm.update_arg(input.place, edit.replay(input.chain, input.node, kept, gemm))
    edit.erase_unused(operand)


def _mask(edit: Editor, input: Input, mask: str, before: Node) -> Node:
    """The mask in the shape and the memory order of the input, whose K may be the last dim but one."""
    if input.k_last:
        made = edit.call_before(before, sparse_ops.input_mask24.default, (input.node, mask))
    else:
        turned = edit.call_before(before, aten.transpose.int, (input.node, -1, -2))
        made = edit.call_before(before, sparse_ops.input_mask24.default, (turned, mask))
        made = edit.call_before(before, aten.transpose.int, (made, -1, -2))
    return edit.laid_out(made, input.node, before, like=before)


def _reads(linear: Linear, input: Node) -> Iterator[tuple[Node, int, tuple[Node, ...]]]:
    """Where the GEMM of grad_weight reads the input: itself, which operand, and the moves from the input to there."""
    if linear.grad_operand is None:
        return
    gemm = made_by(linear.grad_operand)
    for at, operand in enumerate(gemm.args):
        if not isinstance(operand, Node):
            continue
        root, chain = trace(operand)
        if root is input:
            yield gemm, at, chain
        elif input in chain:
            yield gemm, at, chain[chain.index(input) + 1 :]


def _gradient_of(input: Input, gemm: Node) -> tuple[Node, bool] | None:
    """The gradient of the input that a GEMM gives, or of what its moves made of it; and whether it is the latter.

    Of a product and a sum the sum has the shape.
    """
    moved = input.chain[-1] if input.chain else input.node
    shapes = [input.node.meta["val"].shape, moved.meta["val"].shape]
    node = gemm
    while node.meta["val"].shape not in shapes:
        following = [user for user in node.users if user.meta.get("seq_nr") == gemm.meta.get("seq_nr")]
        if len(node.users) != 1 or not following:
            return None
        (node,) = following
    return node, node.meta["val"].shape != shapes[0]
