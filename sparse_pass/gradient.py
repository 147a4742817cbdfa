"""Rewrite grad_weight with a 2:4 grad_output, drawn anew in every step.

Before and after (sparse)::

    dw = mm(permute(dy), x)

    seed   = randint(0, 2**62, [1])
    packed = sparse_pass.sparsify_mvue(dy, seed)
    dw     = sparse_pass.grad_weight(packed, x, N)

(with the gradient of the bias on the way, if the graph has ``db = sum(dy, [0])``)

and as masked_dense::

    seed = randint(0, 2**62, [1])
    dw   = mm(permute(sparse_pass.mvue24(dy, seed)), x)

Each call of a linear has a seed of its own, of torch's generator of the device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from .editor import Editor
from .gemms import GradWeight, aten

sparse_ops = torch.ops.sparse_pass

_SEEDS = 2**62
"""How many seeds there are: what torch.randint and Inductor's own random numbers can draw from."""


def rewrite_grad_weight(edit: Editor, grad_weight: GradWeight, *, sparse: bool, tuned: bool) -> None:
    """Rewrite the GEMM of one call, to the sparse kernel or to a dense matmul of the same numbers.

    tuned: whether the sparse kernel may be the one that measures fastest.
    """
    gemm, place = grad_weight.gemm, grad_weight.place
    operand = gemm.args[place]
    assert isinstance(operand, Node)
    grad_output = edit.flipped(operand, gemm) if place == 0 else operand
    kwargs = {
        "dtype": torch.int64,
        "layout": torch.strided,
        "device": operand.meta["val"].device,
        "pin_memory": False,
    }
    seed = edit.call_before(gemm, aten.randint.low, (0, _SEEDS, [1]), kwargs)
    if sparse:

        def multiply(grad_output: Node, before: Node) -> Node:
            packed = _sparsify(edit, grad_output, seed, before)
            other = before.args[1 - place]
            assert isinstance(other, Node)
            input = edit.flipped(other, before) if place == 1 else other
            kwargs = {"tuned": True} if tuned and before.meta["val"].is_cuda else {}
            arguments = packed, input, grad_output.meta["val"].shape[1]
            return edit.call_before(before, sparse_ops.grad_weight.default, arguments, kwargs)

        multiply_sparse(edit, grad_weight, multiply)
    else:
        kept = edit.call_before(gemm, sparse_ops.mvue24.default, (grad_output, seed))
        gemm.update_arg(place, edit.flipped(kept, gemm) if place == 0 else kept)
        edit.erase_unused(operand)


def _sparsify(edit: Editor, grad_output: Node, seed: Node, before: Node) -> Node:
    """Pack the estimate; where the graph sums grad_output for a bias afterwards, sum it on the way."""
    sums = [node for node in grad_output.users if _is_bias_gradient(node) and edit.is_after(node, before)]
    if not sums:
        return edit.call_before(before, sparse_ops.sparsify_mvue.default, (grad_output, seed))
    both = edit.call_before(before, sparse_ops.sparsify_mvue_sum.default, (grad_output, seed))
    for node in sums:
        partial = edit.call_before(node, operator.getitem, (both, 1))
        total = edit.call_before(node, aten.sum.dim_IntList, (partial, *node.args[1:]))
        dtype = node.meta["val"].dtype
        rounded = edit.call_before(node, torch.ops.prims.convert_element_type.default, (total, dtype))
        node.replace_all_uses_with(rounded)
        edit.graph.erase_node(node)
    return edit.call_before(before, operator.getitem, (both, 0))


def _is_bias_gradient(node: Node) -> bool:
    return node.target is aten.sum.dim_IntList and node.args[1:] in (([0],), ([0], True)) and not node.kwargs


def multiply_sparse(edit: Editor, grad_weight: GradWeight, multiply: Callable[[Node, Node], Node]) -> None:
    """Put ``multiply(grad_output [M, N], before) -> [N, K]`` in the place of the GEMM."""
    gemm, place = grad_weight.gemm, grad_weight.place
    operand, other = gemm.args[place], gemm.args[1 - place]
    assert isinstance(operand, Node)
    assert isinstance(other, Node)
    result = multiply(edit.flipped(operand, gemm) if place == 0 else operand, gemm)
    if place == 1:
        # In the memory order of the GEMM that it replaces: what reads it was captured with that.
        turned = edit.call_before(gemm, aten.permute.default, (result, [1, 0]))
        result = edit.call_before(gemm, aten.clone.default, (turned,), {"memory_format": torch.contiguous_format})
    gemm.replace_all_uses_with(result)
    edit.graph.erase_node(gemm)
    edit.erase_dead(operand)
    edit.erase_dead(other)
