"""Carry out what is planned for grad_output: a 2:4 estimate, drawn anew in every step if it is random.

Before and after (sparse), of grad_weight and of grad_input::

    dw = mm(permute(dy), x)                               dx = mm(dy, w)

    seed   = randint(0, 2**62, [1])                       seed_1   = randint(0, 2**62, [1])
    packed = sparse_pass.sparsify_mvue(dy, seed)          packed_1 = sparse_pass.sparsify_mvue(permute(dy), seed_1)
    dw     = sparse_pass.grad_weight(packed, x, N)        dx       = sparse_pass.grad_input(packed_1, w, M)

(with the gradient of the bias on the way, if the graph has ``db = sum(dy, [0])``)

and as masked_dense::

    seed = randint(0, 2**62, [1])                         seed_1 = randint(0, 2**62, [1])
    kept = sparse_pass.mvue24(dy, seed)                   kept_1 = sparse_pass.mvue24(permute(dy), seed_1)
    dw   = mm(permute(kept), x)                           dx     = mm(permute(kept_1), w)

In float8 (`float8`; q is what output multiplies, of which this reads the transpose)::

    packed, qdy = sparse_pass.sparsify_mvue_float8(dy, seed, s)                 qdy: what grad_input multiplies
    dw = cast(cast(sparse_pass.grad_weight_t(packed, clone(permute(q)), N), float32) * float8_inverse(s / 2, sx))

Each GEMM has a seed of its own, of torch's generator of the device.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from ..graph.gemms import aten, operand_of
from ..plan.table import ESTIMATORS
from ..plan.values import Part
from .editor import Editor, sparse_ops
from .float8 import RoundedOperands

_PRODUCTS = {"grad_weight": sparse_ops.grad_weight.default, "grad_input": sparse_ops.grad_input.default}


def estimate_gradients(edit: Editor, part: Part, rounded: RoundedOperands) -> None:
    """Give gradients of one call a 2:4 grad_output, by the sparse kernel or by a dense matmul of the same numbers."""
    for plan in part.gemms:
        gemm, place = plan.gemm.node, plan.gemm.places["grad_output"]
        estimator = ESTIMATORS[plan.prepared.structure]
        if plan.estimated is not None and plan.packed is not None:
            edit.finish_gradient(gemm, rounded.multiply_estimate(plan), turned=place == 1)
            continue
        # The dim that the GEMM contracts over comes first: M for grad_weight, N for grad_input.
        grad_output = edit.contracted_first(gemm, place)
        arguments = [grad_output, edit.seed(gemm)] if estimator.random else [grad_output]
        if plan.packed is None:
            kept = edit.call_before(gemm, _operator(estimator.dense), tuple(arguments))
            if plan.estimated is not None:
                kept = rounded.round_estimate(plan, kept)
                rounded.feed(plan)
            edit.feed_at(gemm, place, edit.flipped(kept, gemm) if place == 0 else kept)
            continue
        sums = plan.prepared.sums
        packed = edit.call_before(
            gemm, _operator(estimator.packed_and_sum if sums else estimator.packed), tuple(arguments)
        )
        if sums:
            _replace_sums(edit, sums, packed)
            packed = edit.call_before(gemm, operator.getitem, (packed, 0))
        other = operand_of(gemm, 1 - place)
        other = edit.flipped(other, gemm) if place == 1 else other
        rows = grad_output.meta["val"].shape[1]
        if not isinstance(rows, int):
            rows = edit.call_before(gemm, aten.sym_size.int, (grad_output, 1))
        result = edit.call_before(gemm, _PRODUCTS[plan.gemm.name], (packed, other, rows), plan.options)
        edit.finish_gradient(gemm, result, turned=place == 1)


def _replace_sums(edit: Editor, sums: Sequence[Node], both: Node) -> None:
    """Sum what the kernel has summed on the way, for the gradient of a bias."""
    for node in sums:
        partial = edit.call_before(node, operator.getitem, (both, 1))
        total = edit.call_before(node, aten.sum.dim_IntList, (partial, *node.args[1:]))
        dtype = node.meta["val"].dtype
        edit.replace(node, edit.call_before(node, torch.ops.prims.convert_element_type.default, (total, dtype)))


def _operator(name: str) -> Any:
    """An operator by its name, such as ``sparse_pass::mvue24``."""
    library, _, packet = name.partition("::")
    return getattr(getattr(torch.ops, library), packet).default
