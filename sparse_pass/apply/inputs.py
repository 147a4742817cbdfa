"""Carry out what is planned for inputs.

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

from torch.fx import Node

from ..graph.gemms import Linear, aten, bias_of, operand_of
from ..plan.values import GemmPlan, Part, Prepared
from .editor import Editor, sparse_ops


class Inputs:
    """The inputs of one graph; what several linears share is made once."""

    def __init__(self, edit: Editor) -> None:
        self._edit = edit
        self._masks: dict[Prepared, Node] = {}
        self._dense: dict[Prepared, Node] = {}
        self._packed: dict[Prepared, tuple[Node, ...]] = {}

    def mask_gradients(self, part: Part) -> None:
        """Mask the gradients of the input of one call."""
        if part.prepared is None:
            return
        for one in part.masked_inputs:
            mask, gemm = self._mask(part.prepared), part.gemms[0].gemm
            source, chain = gemm.input_reads[0].resolved()
            self._edit.mask_gradient(one.node, self._edit.replay(chain, source, mask, gemm.node) if one.moved else mask)

    def feed_dense(self, part: Part) -> None:
        """Give the GEMMs of one call that have no sparse kernel the masked input."""
        for plan in part.gemms:
            for read in plan.gemm.input_reads if plan.packed is None else ():
                kept, (source, chain) = self._masked(plan.prepared), read.resolved()
                self._edit.feed_at(read.gemm, read.place, self._edit.replay(chain, source, kept, read.gemm))

    def multiply(self, part: Part, linear: Linear) -> None:
        """Compute the GEMMs of one call that have a sparse kernel."""
        for plan in part.gemms:
            if plan.packed is not None:
                packed = self._pack(plan.prepared, linear.shape[2])[int(plan.packed.transposed)]
                if plan.gemm.name == "output":
                    self._multiply_output(plan, packed)
                else:
                    self._multiply_grad_weight(plan, packed, linear.shape[2])

    def _multiply_output(self, plan: GemmPlan, packed: Node) -> None:
        edit, gemm, places = self._edit, plan.gemm.node, plan.gemm.places
        sizes = plan.gemm.input_reads[0].resolved()[0].meta["val"].shape
        # What was packed: rows of the input, or of what the activation function takes.
        rows = operand_of(operand_of(packed, 0), 0)
        m = rows.meta["val"].shape[0]
        count = m if isinstance(m, int) else edit.call_before(gemm, aten.sym_size.int, (rows, 0))
        weight = operand_of(gemm, places["weight"])
        if gemm.target is not aten.linear.default:
            weight = edit.flipped(weight, gemm)
        arguments = packed, weight, count
        result = edit.call_before(gemm, sparse_ops.input_linear.default, arguments, plan.options)
        edit.finish_gemm(gemm, result, bias_of(gemm), sizes)

    def _multiply_grad_weight(self, plan: GemmPlan, packed: Node, features: int) -> None:
        gemm, place = plan.gemm.node, plan.gemm.places["grad_output"]
        grad_output = self._edit.contracted_first(gemm, place)
        arguments = packed, grad_output, features
        result = self._edit.call_before(gemm, sparse_ops.input_grad_weight.default, arguments, plan.options)
        self._edit.finish_gradient(gemm, result, turned=place == 1)

    def _mask(self, prepared: Prepared) -> Node:
        """In the shape and the memory order of the input, whose K may be the last dim but one."""
        if prepared not in self._masks:
            edit, before, input = self._edit, prepared.before, self._edit.current(prepared.source)
            if prepared.k_last:
                made = edit.call_before(before, sparse_ops.input_mask24.default, (input, prepared.structure))
            else:
                # Not by transpose: Inductor lowers what its decompositions leave in a graph, and permute is left.
                *batch, k, last = range(input.meta["val"].dim())
                flip = [*batch, last, k]
                turned = edit.call_before(before, aten.permute.default, (input, flip))
                made = edit.call_before(before, sparse_ops.input_mask24.default, (turned, prepared.structure))
                made = edit.call_before(before, aten.permute.default, (made, flip))
            self._masks[prepared] = edit.laid_out(made, input, before, like=before)
        return self._masks[prepared]

    def _masked(self, prepared: Prepared) -> Node:
        if prepared not in self._dense:
            mask, before, input = self._mask(prepared), prepared.before, self._edit.current(prepared.source)
            zero = self._edit.zero(input, before, like=before)
            self._dense[prepared] = self._edit.call_before(before, aten.where.self, (mask, input, zero))
        return self._dense[prepared]

    def _pack(self, prepared: Prepared, features: int) -> tuple[Node, ...]:
        """S(X) and, if it is read, S(X)^T."""
        if prepared not in self._packed:
            edit, before, function = self._edit, prepared.before, prepared.activation
            source, gate, name = prepared.source, None, "none"
            if function is not None:
                source, gate, name = function.source, function.gate, function.name
            rows = self._rows(source, features, before)
            gates = None if gate is None else self._rows(gate, features, before)
            arguments = rows, gates, prepared.structure, name
            both = edit.call_before(before, sparse_ops.sparsify_input.default, arguments)
            halves = [edit.call_before(before, operator.getitem, (both, 0))]
            if len(prepared.packed) > 1:
                halves.append(edit.call_before(both.next, operator.getitem, (both, 1), like=both))
            self._packed[prepared] = tuple(halves)
        return self._packed[prepared]

    def _rows(self, tensor: Node, features: int, before: Node) -> Node:
        """As a matrix [M, K]."""
        current = self._edit.current(tensor)
        shape = current.meta["val"].shape
        # An activation may be viewed with other features; with dynamic sizes their number may be a symbol.
        if len(shape) == 2 and isinstance(shape[1], int) and shape[1] == features:
            return current
        return self._edit.call_before(before, aten.reshape.default, (current, [-1, features]))
