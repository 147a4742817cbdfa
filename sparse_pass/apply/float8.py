"""Carry out what is planned for dense operands in float8.

Before and after, of both operands of a GEMM (``s`` is what `weights` makes of the weight)::

    y = mm(view(x), permute(s))

    sx = sparse_pass.float8_scale(x);  xr = sparse_pass.round_float8(x, sx)
    sw = sparse_pass.float8_scale(w);  sr = sparse_pass.round_float8(s, sw)
    y  = mm(view(xr), permute(sr))
"""

from __future__ import annotations

from torch.fx import Node

from ..plan.values import GemmPlan, Rounded
from .editor import Editor, sparse_ops


class RoundedOperands:
    """The rounded tensors of one graph; what several GEMMs read is made once."""

    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        self._made: dict[Rounded, Node] = {}

    def feed(self, plan: GemmPlan) -> None:
        """Give a GEMM its dense operand in float8, if the plan says so."""
        read = plan.gemm.dense_read
        if plan.rounded is None or read is None:
            return
        source, chain = read.resolved()
        if plan.rounded not in self._made:
            self._made[plan.rounded] = self.round(source, source, plan.rounded.before)
        moved = self._edit.replay(chain, source, self._made[plan.rounded], read.gemm)
        self._edit.feed_at(read.gemm, read.place, moved)

    def round(self, tensor: Node, scale_of: Node, before: Node, factor: float = 1.0) -> Node:
        """Round a tensor by the scale of another one times ``factor``; it may be itself."""
        args = (scale_of,) if factor == 1 else (scale_of, factor)
        scale = self._edit.call_before(before, sparse_ops.float8_scale.default, args)
        return self._edit.call_before(before, sparse_ops.round_float8.default, (tensor, scale))
