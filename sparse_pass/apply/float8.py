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

from typing import Any

import torch
from torch.fx import Node

from ..graph.gemms import aten, bias_of
from ..plan.values import GemmPlan, Prepared, Rounded
from .editor import Editor, sparse_ops

_CAST = torch.ops.prims.convert_element_type.default


class RoundedOperands:
    """The float8 tensors of one graph; what several GEMMs read is made once."""

    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        self._scales: dict[Rounded | Prepared, Node] = {}
        self._made: dict[tuple[Rounded, Any], Node] = {}

    def feed(self, plan: GemmPlan) -> None:
        """Give a dense GEMM its dense operand rounded to float8, if the plan says so."""
        if plan.rounded is not None and plan.gemm.dense_read is not None:
            read = plan.gemm.dense_read
            self._edit.feed_at(read.gemm, read.place, self._operand(plan, sparse_ops.round_float8.default))

    def round_weight(self, prepared: Prepared, dense: Node) -> Node:
        """The 2:4 weight, rounded to float8 by the scale of all of the weight."""
        scale = self._scale_of_weight(prepared)
        return self._edit.call_before(prepared.before, sparse_ops.round_float8.default, (dense, scale))

    def pack(self, prepared: Prepared) -> Node:
        """The packed weight, and its transpose."""
        args = (prepared.source, self._scale_of_weight(prepared), prepared.structure, *_factor(prepared))
        return self._edit.call_before(prepared.before, sparse_ops.sparsify_float8.default, args)

    def multiply(self, plan: GemmPlan, packed: Node) -> None:
        """Put the product of two float8 operands in the place of a GEMM."""
        edit, gemm, rounded = self._edit, plan.gemm.node, plan.rounded
        assert rounded is not None
        rows = self._operand(plan, sparse_ops.quantize_float8.default)
        sizes, value = rows.meta["val"].shape, gemm.meta["val"]
        if len(sizes) != 2:
            rows = edit.call_before(gemm, aten.reshape.default, (rows, [-1, sizes[-1]]))
        tuned = {"tuned": True} if plan.tuned else {}
        product = edit.call_before(gemm, sparse_ops.linear.default, (rows, packed, None, value.shape[-1]), tuned)
        scales = (self._scales[rounded], self._scale_of_weight(plan.prepared))
        both = edit.call_before(gemm, aten.mul.Tensor, scales)
        result = edit.call_before(gemm, _CAST, (product, torch.float32))
        # A product of two powers of two is one: this rounds nothing.
        result = edit.call_before(gemm, aten.div.Tensor, (result, both))
        if (bias := bias_of(gemm)) is not None:
            result = edit.call_before(gemm, aten.add.Tensor, (result, bias))
        result = edit.call_before(gemm, _CAST, (result, value.dtype))
        edit.finish_gemm(gemm, result, None, sizes)

    def _operand(self, plan: GemmPlan, op: Any) -> Node:
        """The dense operand of a GEMM, as an operator makes it of the tensor and its scale."""
        rounded, read = plan.rounded, plan.gemm.dense_read
        assert rounded is not None
        assert read is not None
        source, chain = read.resolved()
        if rounded not in self._scales:
            self._scales[rounded] = self._edit.call_before(rounded.before, sparse_ops.float8_scale.default, (source,))
        if (rounded, op) not in self._made:
            scale = self._scales[rounded]
            self._made[rounded, op] = self._edit.call_before(rounded.before, op, (source, scale))
        return self._edit.replay(chain, source, self._made[rounded, op], read.gemm)

    def _scale_of_weight(self, prepared: Prepared) -> Node:
        if prepared not in self._scales:
            args = prepared.source, *_factor(prepared)
            self._scales[prepared] = self._edit.call_before(prepared.before, sparse_ops.float8_scale.default, args)
        return self._scales[prepared]


def _factor(prepared: Prepared) -> tuple[float, ...]:
    return () if prepared.scale == 1 else (prepared.scale,)
