"""Carry out what is planned in float8.

One GEMM, before and after as masked_dense (``s`` is what `weights` makes of the weight)::

    y = mm(view(x), permute(s))

    sx = sparse_pass.float8_scale(x);  xr = sparse_pass.round_float8(x, sx)
    sw = sparse_pass.float8_scale(w);  sr = sparse_pass.round_float8(s, sw)
    y  = mm(view(xr), permute(sr))

and sparse, where the product is that of the scaled values::

    q = sparse_pass.quantize_float8(x, sx)
    packed, packed_t = sparse_pass.sparsify_float8(w, sw, "optimal")
    y = cast(cast(sparse_pass.linear(view(q), packed, None, N), float32) / (sx * sw) + b)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from ..graph.gemms import aten, bias_of, reads_rows
from ..plan.values import GemmPlan, Prepared, Rounded
from .editor import Editor, sparse_ops

_CAST = torch.ops.prims.convert_element_type.default


class RoundedOperands:
    """The float8 tensors of one graph; what several GEMMs read is made once."""

    def __init__(self, edit: Editor) -> None:
        self._edit = edit
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

    def multiply_estimate(self, plan: GemmPlan, packed: Node, rows: Any) -> Node:
        """The product [N, K] of a packed estimate of grad_output and the input, both in float8."""
        edit, gemm = self._edit, plan.gemm.node
        operand = self._operand(plan, sparse_ops.quantize_float8.default)
        if plan.gemm.places["input"] == 1:  # [M, K]
            operand = edit.call_before(gemm, aten.permute.default, (operand, [1, 0]))
        contiguous = {"memory_format": torch.contiguous_format}
        turned = edit.call_before(gemm, aten.clone.default, (operand,), contiguous)
        tuned = {"tuned": True} if plan.tuned else {}
        product = edit.call_before(gemm, sparse_ops.grad_weight_t.default, (packed, turned, rows), tuned)
        assert plan.rounded is not None
        return self._unscaled(gemm, product, (self._scales[plan.rounded], self.scale_of_estimate(plan)))

    def _unscaled(self, gemm: Node, product: Node, scales: tuple[Node, Node], bias: Any = None) -> Node:
        """The product of scaled values, without their scales and in the dtype of the GEMM."""
        edit = self._edit
        both = edit.call_before(gemm, aten.mul.Tensor, scales)
        result = edit.call_before(gemm, _CAST, (product, torch.float32))
        # A product of two powers of two is one: this rounds nothing.
        result = edit.call_before(gemm, aten.div.Tensor, (result, both))
        if bias is not None:
            result = edit.call_before(gemm, aten.add.Tensor, (result, bias))
        return edit.call_before(gemm, _CAST, (result, gemm.meta["val"].dtype))

    def multiply(self, plan: GemmPlan, packed: Node) -> None:
        """Put the product of two float8 operands in the place of a GEMM."""
        edit, gemm, rounded = self._edit, plan.gemm.node, plan.rounded
        assert rounded is not None
        rows, sizes = self._rows(plan)
        value = gemm.meta["val"]
        tuned = {"tuned": True} if plan.tuned else {}
        product = edit.call_before(gemm, sparse_ops.linear.default, (rows, packed, None, value.shape[-1]), tuned)
        scales = (self._scales[rounded], self._scale_of_weight(plan.prepared))
        edit.finish_gemm(gemm, self._unscaled(gemm, product, scales, bias_of(gemm)), None, sizes)

    def multiply_dense(self, plan: GemmPlan, weight: Node) -> None:
        """Put a dense product of float8 operands in the place of a GEMM. weight: [N, K]."""
        edit, gemm, use, rounded = self._edit, plan.gemm.node, plan.gemm.weight_read, plan.rounded
        assert rounded is not None
        assert use is not None
        rows, sizes = self._rows(plan)
        # The second operand has the dim first in memory that it is multiplied over.
        turned = edit.call_before(gemm, aten.permute.default, (weight, [1, 0]))
        if not reads_rows(use):
            contiguous = {"memory_format": torch.contiguous_format}
            turned = edit.call_before(gemm, aten.clone.default, (turned,), contiguous)
            turned = edit.call_before(gemm, aten.permute.default, (turned, [1, 0]))
        scales = (self._scales[rounded], self._scale_of_weight(plan.prepared))
        inverse = [edit.call_before(gemm, aten.reciprocal.default, (scale,)) for scale in scales]
        bias, dtype = bias_of(gemm), gemm.meta["val"].dtype
        fused = bias if isinstance(bias, Node) and bias.meta["val"].dim() == 1 else None
        # As torchao: sums of gradients in full precision.
        arguments = (rows, turned, *inverse, fused, None, dtype, plan.gemm.name == "output")
        result = edit.call_before(gemm, aten._scaled_mm.default, arguments)
        edit.finish_gemm(gemm, result, bias if fused is None else None, sizes)

    def _rows(self, plan: GemmPlan) -> tuple[Node, Sequence[Any]]:
        """The dense operand quantized, [M, ...], and the sizes that it had."""
        rows = self._operand(plan, sparse_ops.quantize_float8.default)
        sizes = rows.meta["val"].shape
        if len(sizes) != 2:
            rows = self._edit.call_before(plan.gemm.node, aten.reshape.default, (rows, [-1, sizes[-1]]))
        return rows, sizes

    def _operand(self, plan: GemmPlan, op: Any) -> Node:
        """The dense operand of a GEMM, as an operator makes it of the tensor and its scale."""
        rounded, read = plan.rounded, plan.gemm.dense_read
        assert rounded is not None
        assert read is not None
        source, chain = read.resolved()
        scale = self._scale(rounded, source)
        if (rounded, op) not in self._made:
            self._made[rounded, op] = self._edit.call_before(rounded.before, op, (source, scale))
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
