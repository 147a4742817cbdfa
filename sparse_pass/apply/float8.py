"""Carry out what is planned in float8.

One GEMM, before and after as masked_dense (``s`` is what `weights` makes of the weight)::

    y = mm(view(x), permute(s))

    sx = sparse_pass.float8_scale(x);  xr = sparse_pass.round_float8(x, sx)
    sw = sparse_pass.float8_scale(w);  sr = sparse_pass.round_float8(s, sw)
    y  = mm(view(xr), permute(sr))

and sparse, where the product is that of the scaled values::

    q = sparse_pass.quantize_float8(x, sx)
    packed, packed_t = sparse_pass.sparsify_float8(w, sw, "optimal")
    y = cast(cast(sparse_pass.linear(view(q), packed, None, N), float32) * float8_inverse(sx, sw) + b)
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from ..graph.gemms import aten, bias_of, fused_bias, is_flip, operand_of, reads_rows
from ..plan.values import GemmPlan, Plan, Prepared, Rounded
from .editor import Editor, sparse_ops

_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
_CAST = torch.ops.prims.convert_element_type.default


class RoundedOperands:
    """The float8 tensors of one graph; what several GEMMs read is made once."""

    def __init__(self, edit: Editor, plan: Plan) -> None:
        self._edit = edit
        self._estimates: dict[Rounded, GemmPlan] = {}
        """By grad_output the GEMM whose kernel packs an estimate of it: that kernel quantizes it as well."""
        for one in (gemm for linear in plan.linears for gemm in linear.grad_output.gemms):
            if one.estimated is not None and one.packed is not None:
                self._estimates.setdefault(one.estimated, one)
        self._drawn: dict[GemmPlan, Node] = {}
        self._scales: dict[Rounded | Prepared, Node] = {}
        self._halves: dict[Rounded, Node] = {}
        self._made: dict[tuple[Rounded, Any], Node] = {}

    def feed(self, plan: GemmPlan) -> None:
        """Give a dense GEMM its dense operand rounded to float8, if the plan says so."""
        if plan.rounded is not None and plan.gemm.dense_read is not None:
            read = plan.gemm.dense_read
            self._edit.feed_at(read.gemm, read.place, self._operand(plan, sparse_ops.round_float8.default))

    def weight(self, prepared: Prepared, dense: Node, op: Any) -> Node:
        """The 2:4 weight, rounded or quantized to float8 by the scale of all of the weight."""
        return self._edit.call_before(prepared.before, op, (dense, self._scale_of_weight(prepared)))

    def pack(self, prepared: Prepared) -> Node:
        """The packed weight, and its transpose."""
        args = (prepared.source, self._scale_of_weight(prepared), prepared.structure, *_factor(prepared))
        return self._edit.call_before(prepared.before, sparse_ops.sparsify_float8.default, args)

    def scale_of_estimate(self, plan: GemmPlan) -> Node:
        """Of the estimate of a grad_output, which may be twice as large: half the scale of it."""
        rounded, read = plan.estimated, plan.gemm.structured_read
        assert rounded is not None
        assert read is not None
        if rounded not in self._halves:
            scale = self._scale(rounded, read.resolved()[0])
            self._halves[rounded] = self._edit.call_before(rounded.before, aten.mul.Tensor, (scale, 0.5))
        return self._halves[rounded]

    def round_estimate(self, plan: GemmPlan, estimate: Node) -> Node:
        """The dense estimate of a grad_output, rounded to float8."""
        arguments = estimate, self.scale_of_estimate(plan)
        return self._edit.call_before(plan.gemm.node, sparse_ops.round_float8.default, arguments)

    def multiply_estimate(self, plan: GemmPlan) -> Node:
        """The product [N, K] of a packed estimate of grad_output and the input, both in float8."""
        edit, gemm = self._edit, plan.gemm.node
        both = self._draw(plan)
        packed = edit.call_before(gemm, operator.getitem, (both, 0))
        operand = self._operand(plan, sparse_ops.quantize_float8.default)
        if plan.gemm.places["input"] == 1:  # [M, K]
            operand = edit.call_before(gemm, aten.permute.default, (operand, [1, 0]))
        turned = edit.copied(operand, gemm)
        rows: Any = both.meta["val"][1].shape[1]
        if not isinstance(rows, int):
            rows = edit.call_before(gemm, aten.sym_size.int, (edit.call_before(gemm, operator.getitem, (both, 1)), 1))
        product = edit.call_before(gemm, sparse_ops.grad_weight_t.default, (packed, turned, rows), plan.options)
        assert plan.rounded is not None
        return self._unscaled(gemm, product, (self._scales[plan.rounded], self.scale_of_estimate(plan)))

    def _draw(self, plan: GemmPlan) -> Node:
        """The estimate of grad_output packed, and grad_output quantized [M, N]."""
        if plan in self._drawn:
            return self._drawn[plan]
        edit, rounded = self._edit, plan.estimated
        assert rounded is not None
        before = rounded.before if self._estimates[rounded] is plan else plan.gemm.node
        source, moves, turned = self._matrix(plan)
        scale = self._scale(rounded, source)
        matrix = edit.replay(moves, source, source, before)
        if turned:
            matrix = edit.flipped(matrix, before)
        arguments = matrix, edit.seed(before), scale
        self._drawn[plan] = edit.call_before(before, sparse_ops.sparsify_mvue_float8.default, arguments)
        return self._drawn[plan]

    def _matrix(self, plan: GemmPlan) -> tuple[Node, tuple[Node, ...], bool]:
        """grad_output, the moves that make a matrix of it, and whether that is [N, M] instead of [M, N]."""
        assert plan.gemm.structured_read is not None
        source, moves = plan.gemm.structured_read.resolved()
        is_first = plan.gemm.places["grad_output"] == 0  # which is read as [N, M]
        if is_first and moves and is_flip(moves[-1]):
            moves = moves[:-1]
        return source, moves, is_first and not is_flip(operand_of(plan.gemm.node, 0))

    def _quantized_with_estimate(self, rounded: Rounded) -> Node | None:
        """grad_output quantized by the kernel that packs the estimate of it, if it is read as [M, N] there."""
        plan = self._estimates.get(rounded)
        if plan is None:
            return None
        source, moves, turned = self._matrix(plan)
        sizes = source.meta["val"].shape
        viewed = all(node.target in _VIEWS for node in moves)
        if turned or not viewed or (moves and not all(isinstance(size, int) for size in sizes)):
            return None
        quantized = self._edit.call_before(rounded.before, operator.getitem, (self._draw(plan), 1))
        if moves:
            quantized = self._edit.call_before(rounded.before, aten.reshape.default, (quantized, list(sizes)))
        return quantized

    def _unscaled(self, gemm: Node, product: Node, scales: tuple[Node, Node], bias: Any = None) -> Node:
        """The product of scaled values, without their scales and in the dtype of the GEMM."""
        edit = self._edit
        inverse = edit.call_before(gemm, sparse_ops.float8_inverse.default, scales)
        result = edit.call_before(gemm, _CAST, (product, torch.float32))
        # A product of powers of two is one: this rounds nothing.
        result = edit.call_before(gemm, aten.mul.Tensor, (result, inverse))
        if bias is not None:
            result = edit.call_before(gemm, aten.add.Tensor, (result, bias))
        return edit.call_before(gemm, _CAST, (result, gemm.meta["val"].dtype))

    def multiply(self, plan: GemmPlan, packed: Node) -> None:
        """Put the product of two float8 operands in the place of a GEMM."""
        edit, gemm, rounded = self._edit, plan.gemm.node, plan.rounded
        assert rounded is not None
        rows, sizes = self._rows(plan)
        arguments = rows, packed, None, gemm.meta["val"].shape[-1]
        product = edit.call_before(gemm, sparse_ops.linear.default, arguments, plan.options)
        scales = (self._scales[rounded], self._scale_of_weight(plan.prepared))
        edit.finish_gemm(gemm, self._unscaled(gemm, product, scales, bias_of(gemm)), None, sizes)

    def multiply_dense(self, plan: GemmPlan, weight: Node) -> None:
        """Put a dense product of float8 operands in the place of a GEMM. weight: [N, K]."""
        edit, gemm, use, rounded = self._edit, plan.gemm.node, plan.gemm.weight_read, plan.rounded
        assert rounded is not None
        assert use is not None
        rows, sizes = self._rows(plan)
        rows = self._row_by_row(rows, gemm)
        # The second operand is the transpose of a matrix that is stored row by row.
        matrix = weight if reads_rows(use) else edit.call_before(gemm, aten.permute.default, (weight, [1, 0]))
        turned = edit.call_before(gemm, aten.permute.default, (self._row_by_row(matrix, gemm), [1, 0]))
        scales = (self._scales[rounded], self._scale_of_weight(plan.prepared))
        inverse = [edit.call_before(gemm, aten.reciprocal.default, (scale,)) for scale in scales]
        fused = fused_bias(gemm)
        # Fast accumulation, as the 2:4 kernels have it.
        arguments = (rows, turned, *inverse, fused, None, gemm.meta["val"].dtype, True)
        result = edit.call_before(gemm, aten._scaled_mm.default, arguments)
        edit.finish_gemm(gemm, result, bias_of(gemm) if fused is None else None, sizes)

    def _row_by_row(self, matrix: Node, before: Node) -> Node:
        """The matrix, or a copy that is stored row by row."""
        value = matrix.meta["val"]
        known = all(isinstance(size, int) for size in (*value.shape, *value.stride()))
        return matrix if known and value.is_contiguous() else self._edit.copied(matrix, before)

    def _rows(self, plan: GemmPlan) -> tuple[Node, Sequence[Any]]:
        """The dense operand quantized, [M, ...], and the sizes that it had."""
        operand = self._operand(plan, sparse_ops.quantize_float8.default)
        return self._edit.flattened(operand, plan.gemm.node), operand.meta["val"].shape

    def _operand(self, plan: GemmPlan, op: Any) -> Node:
        """The dense operand of a GEMM, as an operator makes it of the tensor and its scale."""
        rounded, read = plan.rounded, plan.gemm.dense_read
        assert rounded is not None
        assert read is not None
        source, chain = read.resolved()
        scale = self._scale(rounded, source)
        if (rounded, op) not in self._made:
            made = self._quantized_with_estimate(rounded) if op is sparse_ops.quantize_float8.default else None
            self._made[rounded, op] = made or self._edit.call_before(rounded.before, op, (source, scale))
        return self._edit.replay(chain, source, self._made[rounded, op], read.gemm)

    def _scale(self, rounded: Rounded, source: Node) -> Node:
        if rounded not in self._scales:
            self._scales[rounded] = self._edit.call_before(rounded.before, sparse_ops.float8_scale.default, (source,))
        return self._scales[rounded]

    def _scale_of_weight(self, prepared: Prepared) -> Node:
        if prepared not in self._scales:
            args = prepared.source, *_factor(prepared)
            self._scales[prepared] = self._edit.call_before(prepared.before, sparse_ops.float8_scale.default, args)
        return self._scales[prepared]


def _factor(prepared: Prepared) -> tuple[float, ...]:
    return () if prepared.scale == 1 else (prepared.scale,)
