"""Carry out what is planned for weights.

One linear, before and after (sparse; backward on the right)::

    wt  = permute(w)                       wtt = permute(wt)
    y   = addmm(b, x, wt)                  dx  = mm(dy, wtt)           dw = mm(dy.T, x)

    packed, packed_t = sparse_pass.sparsify(w, "optimal", dtype=...)
    y   = sparse_pass.linear(x, packed, b, N)
    dx  = sparse_pass.linear(dy, packed_t, None, K)                    dw = mm(dy.T, x)

and as masked_dense::

    m   = sparse_pass.mask24(w, "optimal")
    s   = where(m, w, 0);  st = permute(s);  y = addmm(b, x, st)       dx  = mm(dy, permute(st))

Leaving dw alone is the straight-through estimator: the joint graph is past autograd.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from ..graph.gemms import Linear, aten, bias_of, fused_bias, operand_of
from ..plan.values import GemmPlan, MaskedGradients, Packed, Part, Prepared
from ..vocabulary import FLOAT8
from .editor import Editor, sparse_ops
from .float8 import RoundedOperands

_CASTS = frozenset({aten._to_copy.default, aten.to.dtype, torch.ops.prims.convert_element_type.default})

_Made: TypeAlias = Mapping[Literal["mask", "dense", "dense_float8"] | Packed, Node]


class Weights:
    """The weights of one graph; what several calls share is made once."""

    def __init__(self, edit: Editor, rounded: RoundedOperands) -> None:
        self._edit = edit
        self._rounded = rounded
        self._made: dict[Prepared, _Made] = {}
        self._moved: dict[tuple[Node, Node], Node] = {}

    def apply(self, linear: Linear, part: Part) -> None:
        """Carry out what a 2:4 weight means for one call."""
        if part.prepared is None:
            return
        weight, made = part.prepared.source, self._make(part.prepared)
        for plan in part.gemms:
            use = plan.gemm.weight_read
            if plan.packed is not None and plan.rounded is not None:
                self._rounded.multiply(plan, made[plan.packed])
            elif plan.packed is not None:
                self._multiply(plan, made[plan.packed])
            elif plan.scaled_mm:
                self._rounded.multiply_dense(plan, made["dense_float8"])
            else:
                if use is not None:
                    self._edit.feed(use.gemm, use.operand, self._replay(use.chain, weight, made["dense"]))
                self._rounded.feed(plan)
        if part.masked is not None:
            self._change_gradients(linear, part.masked, weight, made["mask"])

    def _make(self, prepared: Prepared) -> _Made:
        """All that is read of a weight, before the first forward GEMM that reads it: before every backward, in whatever
        order the calls run backward."""
        if prepared in self._made:
            return self._made[prepared]
        edit, weight, before = self._edit, prepared.source, prepared.before
        made: dict[Literal["mask", "dense", "dense_float8"] | Packed, Node] = {}
        if prepared.mask:
            made["mask"] = edit.call_before(before, sparse_ops.mask24.default, (weight, prepared.structure))
        if prepared.dense or prepared.dense_float8:
            dense = self._masked(prepared, made["mask"]) if prepared.mask else weight
            if prepared.scale != 1:
                dense = edit.call_before(before, aten.mul.Tensor, (dense, prepared.scale))
            if prepared.dense_float8:
                made["dense_float8"] = self._rounded.weight(prepared, dense, sparse_ops.quantize_float8.default)
            if prepared.dense and prepared.precision == "float8":
                made["dense"] = self._rounded.weight(prepared, dense, sparse_ops.round_float8.default)
            elif prepared.dense:
                made["dense"] = dense
        for use in prepared.readers:
            edit.feed(use.gemm, use.operand, self._replay(use.chain, weight, made["dense"]))
        both: dict[torch.dtype, Node] = {}
        for packed in prepared.packed:
            # The mask is chosen on the weight as stored, also where autocast feeds the GEMM a rounded copy.
            options: dict[str, Any] = {} if weight.meta["val"].dtype == packed.dtype else {"dtype": packed.dtype}
            if prepared.scale != 1:
                options["scale"] = prepared.scale
            args = weight, prepared.structure
            if packed.together:
                if packed.dtype not in both:
                    both[packed.dtype] = (
                        self._rounded.pack(prepared)
                        if packed.dtype == FLOAT8
                        else edit.call_before(before, sparse_ops.sparsify.default, args, options)
                    )
                half = both[packed.dtype], int(packed.transposed)
                made[packed] = edit.call_before(before, operator.getitem, half)
            else:
                one = (*args, packed.transposed)
                made[packed] = edit.call_before(packed.before, sparse_ops.sparsify_one.default, one, options)
                if packed.in_backward:
                    made[packed].meta["partitioner_tag"] = "must_be_in_backward"
        self._made[prepared] = made
        return made

    def _masked(self, prepared: Prepared, mask: Node) -> Node:
        edit, weight, before = self._edit, prepared.source, prepared.before
        zero = edit.zero(weight, before, like=before)
        laid_out = edit.laid_out(mask, weight, before, like=before)
        return edit.call_before(before, aten.where.self, (laid_out, weight, zero))

    def _multiply(self, plan: GemmPlan, packed: Node) -> None:
        gemm = plan.gemm.node
        input, fused = operand_of(gemm, 1 if gemm.target is aten.addmm.default else 0), fused_bias(gemm)
        arguments = self._edit.flattened(input, gemm), packed, fused, gemm.meta["val"].shape[-1]
        result = self._edit.call_before(gemm, sparse_ops.linear.default, arguments, plan.options)
        self._edit.finish_gemm(gemm, result, bias_of(gemm) if fused is None else None, input.meta["val"].shape)

    def _change_gradients(self, linear: Linear, masked: MaskedGradients, weight: Node, mask: Node) -> None:
        edit = self._edit
        if masked.operand is not None:
            # The mask takes the weight's way to the operand; casts would turn it into numbers.
            edit.mask_gradient(masked.operand, self._replay(linear.output.chain, weight, mask, skip=_CASTS))
        if masked.returned is None:
            return
        output = edit.graph.output_node()
        values: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        gradient = like = values[masked.returned]
        if masked.whole:
            zero = edit.zero(gradient, output, like=like)
            laid_out = edit.laid_out(mask, gradient, output, like=like)
            gradient = edit.call_before(output, aten.where.self, (laid_out, gradient, zero), like=like)
        if masked.decay:
            zero = edit.zero(weight, output, like=like)
            dropped = edit.call_before(output, aten.where.self, (mask, zero, weight), like=like)
            scaled = edit.call_before(output, aten.mul.Tensor, (dropped, masked.decay), like=like)
            gradient = edit.call_before(output, aten.add.Tensor, (gradient, scaled), like=like)
        values[masked.returned] = gradient
        output.args = (values if isinstance(output.args[0], list) else tuple(values),)

    def _replay(self, chain: tuple[Node, ...], old: Node, new: Node, skip: frozenset[Any] = frozenset()) -> Node:
        """Run the moves of ``chain``, which made an operand of ``old``, on ``new``."""
        made = new
        for node in chain:
            if node.target not in skip:
                if (node, new) not in self._moved:
                    source, target = old, new
                    args, kwargs = map_arg((node.args, node.kwargs), lambda n: target if n is source else n)  # noqa: B023
                    # Beside the original, where that stands after what is derived from the weight, else beside
                    # what is moved: either way before all that reads the original.
                    at = node.next if node > made else target.next
                    self._moved[node, new] = self._edit.call_before(at, node.target, args, kwargs, like=node)
                new = self._moved[node, new]
            old = node
        return new
