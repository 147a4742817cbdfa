"""Rewrite the input of a linear to a 2:4 one.

Before, and after with dense matmuls::

    y  = addmm(b, x, permute(w))                 dw = mm(permute(dy), x)         dx = mm(dy, w)

    m  = sparse_pass.input_mask24(x, "optimal")
    s  = where(m, x, 0)
    y  = addmm(b, s, permute(w))                 dw = mm(permute(dy), s)         dx = mm(dy, w)

and with sparse ones, where x may be an activation function of h, which is then computed in the first op::

    packed, packed_t = sparse_pass.sparsify_input(x, None, "optimal", "none")
    y  = sparse_pass.input_linear(packed, w, M) + b
    dw = sparse_pass.input_grad_weight(packed_t, dy, K)                          dx = mm(dy, w)

With ``grad_input="masked"``, ``dx = where(m, mm(dy, w), 0)``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .editor import Editor
from .fusion import Activation, activation_of
from .gemms import Input, Linear, aten, bias_of, input_of, is_flip, is_move, made_by, trace
from .gradient import multiply_sparse

sparse_ops = torch.ops.sparse_pass


def why_no_masked_gradient(linear: Linear) -> str | None:
    """Why the gradient of the input cannot be masked, or None if it can be, or if there is none."""
    if linear.unplaced_grad_input:
        return linear.unplaced_grad_input
    input = _input(linear)
    if any(_gradient_of(input, use.gemm) is None for use in linear.grad_input):
        return "grad_input: not found in the layout of the input; left as captured"
    return None


def why_dense_grad_weight(linear: Linear) -> str | None:
    """Why grad_weight cannot be given the masked input, or None if it can be, or if there is none."""
    if not linear.has_gradient:
        return None
    if linear.grad_operand is None:
        return linear.unplaced_grad_weight
    if not any(True for _ in _reads(linear, _input(linear).node)):
        return "grad_weight: the GEMM that reads the input was not found; left as captured"
    return None


def mask_grad_input(edit: Editor, linear: Linear, mask: str) -> None:
    """Mask the gradient of the input, before anything else of the linear is rewritten."""
    if not linear.grad_input:
        return  # and no mask, which would read the input and leave no activation to fuse
    gemm, input = linear.output.gemm, _input(linear)
    made = _mask(edit, input, mask, gemm)
    for use in linear.grad_input:
        found = _gradient_of(input, use.gemm)
        assert found is not None
        gradient, moved = found
        edit.mask_gradient(gradient, edit.replay(input.chain, input.node, made, gemm) if moved else made)


def rewrite_input(edit: Editor, linear: Linear, mask: str, *, grad_weight: bool) -> None:
    """Give output, and grad_weight if asked, the masked input."""
    gemm, input = linear.output.gemm, _input(linear)
    made = _mask(edit, input, mask, gemm)
    kept = edit.once(
        ("input", made),
        lambda: edit.call_before(gemm, aten.where.self, (made, input.node, edit.zero(input.node, gemm, like=gemm))),
    )
    if grad_weight:
        for reader, at, read, chain in list(_reads(linear, input.node)):
            old = reader.args[at]
            reader.update_arg(at, edit.replay(chain, read, kept, reader))
            edit.erase_unused(old)
    operand = gemm.args[input.place]
    gemm.update_arg(input.place, edit.replay(input.chain, input.node, kept, gemm))
    edit.erase_unused(operand)


def fused_activation(linear: Linear, *, grad_weight: bool) -> Activation | None:
    """The activation function that the sparse kernel can compute by itself: none if something else reads its result.

    grad_weight: whether that GEMM is to read what the kernel made, too.
    """
    readers = {linear.output.gemm}
    input = _input(linear).node
    if grad_weight:
        # Through views and a transpose of their own.
        readers |= {one for reader, _, _, chain in _reads(linear, input) for one in (reader, *chain)}
    return activation_of(input, frozenset(readers))


def rewrite_input_sparse(
    edit: Editor, linear: Linear, mask: str, activation: Activation | None, *, grad_weight: bool, tuned: bool
) -> None:
    """Compute output, and grad_weight if asked, by sparse kernels. The last rewrite of a linear: its GEMMs are gone."""
    gemm, node = linear.output.gemm, _input(linear).node
    sizes, features = node.meta["val"].shape, linear.shape[2]
    source, gate = (node, None) if activation is None else (activation.source, activation.gate)
    name = "none" if activation is None else activation.name

    def rows_of(tensor: Node) -> Node:
        shape = tensor.meta["val"].shape
        # An activation may be viewed with other features; with dynamic sizes their number may be a symbol.
        if len(shape) == 2 and isinstance(shape[1], int) and shape[1] == features:
            return tensor
        return edit.call_before(gemm, aten.reshape.default, (tensor, [-1, features]))

    key = ("packed input", source, gate, mask, name)
    both = edit.once(
        key,
        lambda: edit.call_before(
            gemm,
            sparse_ops.sparsify_input.default,
            (rows_of(source), None if gate is None else rows_of(gate), mask, name),
        ),
    )
    packed = edit.once((*key, 0), lambda: edit.call_before(gemm, operator.getitem, (both, 0)))
    first = both.args[0]
    assert isinstance(first, Node)
    rows = first.meta["val"].shape[0]
    kwargs = {"tuned": True} if tuned and node.meta["val"].is_cuda else {}
    count = rows if isinstance(rows, int) else edit.call_before(gemm, aten.sym_size.int, (first, 0))
    weight = linear.output.operand
    if gemm.target is not aten.linear.default:
        weight = edit.flipped(weight, gemm)
    result = edit.call_before(gemm, sparse_ops.input_linear.default, (packed, weight, count), kwargs)
    edit.finish_gemm(gemm, result, bias_of(gemm), sizes)
    edit.erase_unused(linear.output.operand)
    if grad_weight:
        assert linear.grad_weight is not None
        packed_t = edit.once((*key, 1), lambda: edit.call_before(both.next, operator.getitem, (both, 1), like=both))
        multiply_sparse(
            edit,
            linear.grad_weight,
            lambda grad_output, before: edit.call_before(
                before, sparse_ops.input_grad_weight.default, (packed_t, grad_output, features), kwargs
            ),
        )
    edit.erase_dead(node)


def _input(linear: Linear) -> Input:
    input = input_of(linear.output)
    assert input is not None  # or `why_skipped` has said so
    return input


def _mask(edit: Editor, input: Input, mask: str, before: Node) -> Node:
    """The mask in the shape and the memory order of the input, whose K may be the last dim but one."""

    def make() -> Node:
        if input.k_last:
            made = edit.call_before(before, sparse_ops.input_mask24.default, (input.node, mask))
        else:
            # Not by transpose: Inductor lowers what its decompositions leave in a graph, and permute is left.
            *batch, k, last = range(input.node.meta["val"].dim())
            flip = [*batch, last, k]
            turned = edit.call_before(before, aten.permute.default, (input.node, flip))
            made = edit.call_before(before, sparse_ops.input_mask24.default, (turned, mask))
            made = edit.call_before(before, aten.permute.default, (made, flip))
        return edit.laid_out(made, input.node, before, like=before)

    return edit.once(("input mask", input.node, mask, input.k_last), make)


def _reads(linear: Linear, input: Node) -> Iterator[tuple[Node, int, Node, tuple[Node, ...]]]:
    """Where the GEMM of grad_weight reads the input: itself, which operand, the input, and the moves from it to there.

    The input, or what is the same: after an op in place each that reads it makes views anew.
    """
    # Or there is nothing to rewrite, or `why_dense_grad_weight` has said why not.
    assert linear.grad_operand is not None
    gemm = made_by(linear.grad_operand)
    for at, operand in enumerate(gemm.args):
        if not isinstance(operand, Node):
            continue
        root, chain = trace(operand)
        for place, node in enumerate((root, *chain)):
            if _is_same(node, input):
                yield gemm, at, node, chain[place:]
                break


def _is_same(one: object, other: object) -> bool:
    """Whether two nodes are one, or the same moves of one."""
    if one is other or not isinstance(one, Node) or not isinstance(other, Node):
        return one is other
    alike = is_move(one) and one.target == other.target and one.kwargs == other.kwargs
    return alike and one.args[1:] == other.args[1:] and _is_same(one.args[0], other.args[0])


def _gradient_of(input: Input, gemm: Node) -> tuple[Node, bool] | None:
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
