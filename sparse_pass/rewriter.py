"""Rewrite the weights of linears in a captured graph.

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
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from .config import WeightSparsity
from .editor import Editor
from .gemms import Linear, Use, aten, bias_of
from .legal import reads_rows
from .ops import definitions as _ops  # noqa: F401  (registers torch.ops.sparse_pass)

sparse_ops = torch.ops.sparse_pass

_MANY_ROWS = 8192
"""Times the bytes of an element of the weight, which the second kernel reads again: from so many rows on."""

_CASTS = frozenset({aten._to_copy.default, aten.to.dtype, torch.ops.prims.convert_element_type.default})


class Rewriter:
    """Rewrites the weights of one graph, in graph order; what several calls share is made once.

    Everything derived from a weight is made right before the first forward GEMM that reads it, so that
    it stands before every backward, in whatever order the calls run backward.
    """

    def __init__(self, editor: Editor, *, tuned: bool) -> None:
        self._edit = editor
        self._tuned = tuned
        # Before which place of the original graph a mask or masked weight was made.
        self._made_at: dict[Node, int] = {}

    def rewrite(self, linear: Linear, scheme: WeightSparsity, sparse: Iterable[Use], masked: Iterable[Use]) -> None:
        """Rewrite one call of a linear.

        Args:
            sparse: its GEMMs that get a sparse kernel.
            masked: its GEMMs that read the masked weight instead.
        """
        weight, order = linear.weight, self._edit.order
        readers = sorted(linear.readers, key=lambda use: order[use.gemm])
        before = min([linear.output.gemm, *(use.gemm for use in readers)], key=lambda node: order[node])
        # What reads the weight itself; the others read what the readers compute.
        sparse, masked = tuple(sparse), tuple(use for use in [*readers, *masked] if use.reads(weight))
        mask_whole = scheme.grad_weight == "masked" and linear.whole_gradient
        mask_gradient = scheme.grad_weight == "masked" and linear.grad_operand is not None and not mask_whole
        decay = scheme.decay > 0 and linear.grad_output is not None
        mask = kept = None
        if masked or mask_gradient or mask_whole or decay:
            mask = self._mask(weight, scheme, before)
        if masked:
            assert mask is not None
            kept = self._masked(weight, mask, before)
            if linear.output.reads(weight):
                self._replay(linear.output.chain, weight, kept)
        if mask_whole:
            assert mask is not None
            assert linear.grad_output is not None
            self._mask_output(weight, mask, linear.grad_output)
        if mask_gradient:
            assert mask is not None
            # The mask takes the weight's way to the operand; casts would turn it into numbers.
            mask_of_operand = self._replay(linear.output.chain, weight, mask, skip=_CASTS)
            assert linear.grad_operand is not None
            self._edit.mask_gradient(linear.grad_operand, mask_of_operand)
        if decay:
            assert mask is not None
            assert linear.grad_output is not None
            self._decay(weight, mask, scheme.decay, linear.grad_output)
        apart = self._apart(linear, scheme, sparse)
        for use in sparse:
            self._packed(weight, scheme, use, before, apart)
        for use in masked:
            assert kept is not None
            operand = self._replay(use.chain, weight, kept)
            use.gemm.replace_input_with(use.operand, operand)
        for use in sparse:
            self._sparse(use, self._packed(weight, scheme, use, before, apart))

    def _mask(self, weight: Node, scheme: WeightSparsity, before: Node) -> Node:
        mask = self._edit.once(
            ("mask", weight, scheme.mask),
            lambda: self._edit.call_before(before, sparse_ops.mask24.default, (weight, scheme.mask)),
        )
        self._made_at.setdefault(mask, self._edit.order[before])
        return mask

    def _masked(self, weight: Node, mask: Node, before: Node) -> Node:
        def make() -> Node:
            zero = self._edit.zero(weight, before, like=before)
            laid_out = self._edit.laid_out(mask, weight, before, like=before)
            return self._edit.call_before(before, aten.where.self, (laid_out, weight, zero))

        masked = self._edit.once(("masked", mask), make)
        self._made_at.setdefault(masked, self._edit.order[before])
        return masked

    def _apart(self, linear: Linear, scheme: WeightSparsity, sparse: Sequence[Use]) -> bool:
        """Whether S(W) and S(W)^T are packed where they are read, instead of both at once in the forward.

        So they are where only one is read. Where both are, one kernel for both takes two thirds of the time of two,
        and keeps S(W)^T from the forward to the backward, 0.56 of the memory of the weight in 16 bits. Two it is if
        the difference is nothing beside the GEMMs: below half a percent of their time for so many rows.
        """
        if len({reads_rows(use) for use in sparse}) == 1:
            return True
        rows, weight = linear.shape[0], linear.weight
        many = isinstance(rows, int) and rows >= _MANY_ROWS * weight.meta["val"].dtype.itemsize
        # A weight that is computed would have to be kept itself.
        return many and scheme.mask == "optimal" and weight.op == "placeholder"

    def _packed(self, weight: Node, scheme: WeightSparsity, use: Use, before: Node, apart: bool) -> Node:
        """S(W) or S(W)^T, whichever the GEMM reads. before: the first forward GEMM of this call."""
        dtype, in_rows = use.operand.meta["val"].dtype, reads_rows(use)
        # The mask is chosen on the weight as stored, also where autocast feeds the GEMM a rounded copy.
        cast = {} if weight.meta["val"].dtype == dtype else {"dtype": dtype}
        key = (weight, scheme.mask, dtype)

        def both() -> Node:
            made = self._edit.once(
                ("sparsify", *key),
                lambda: self._edit.call_before(before, sparse_ops.sparsify.default, (weight, scheme.mask), cast),
            )
            return self._edit.call_before(before, operator.getitem, (made, 0 if in_rows else 1))

        def one() -> Node:
            # In the backward where it is first read there: tagged, as nothing else keeps it from the forward.
            args = weight, scheme.mask, not in_rows
            made = self._edit.call_before(use.gemm, sparse_ops.sparsify_one.default, args, cast)
            if use.gemm is not before and use.gemm.meta.get("partitioner_tag") != "is_forward":
                made.meta["partitioner_tag"] = "must_be_in_backward"
            self._made_at[made] = self._edit.order[use.gemm]
            return made

        packed = self._edit.once(("packed", *key, in_rows), one if apart else both)
        if self._made_at.get(packed, -1) > self._edit.order[use.gemm]:
            # The backward of a later call comes first.
            use.gemm.prepend(packed)
            self._made_at[packed] = self._edit.order[use.gemm]
        return packed

    def _sparse(self, use: Use, packed: Node) -> None:
        gemm = use.gemm
        bias, input = bias_of(gemm), gemm.args[1 if gemm.target is aten.addmm.default else 0]
        assert isinstance(input, Node)
        sizes = input.meta["val"].shape
        out_features = gemm.meta["val"].shape[-1]
        rows = input
        if len(sizes) != 2:
            rows = self._edit.call_before(gemm, aten.reshape.default, (input, [-1, sizes[-1]]))
        fused = bias if isinstance(bias, Node) and bias.meta["val"].shape == (out_features,) else None
        tuned = {"tuned": True} if self._tuned and gemm.meta["val"].is_cuda else {}
        result = self._edit.call_before(gemm, sparse_ops.linear.default, (rows, packed, fused, out_features), tuned)
        self._edit.finish_gemm(gemm, result, bias if fused is None else None, sizes)

    def _mask_output(self, weight: Node, mask: Node, grad_output: int) -> None:
        def masked(gradient: Node, output: Node) -> Node:
            zero = self._edit.zero(gradient, output, like=gradient)
            laid_out = self._edit.laid_out(mask, gradient, output, like=gradient)
            return self._edit.call_before(output, aten.where.self, (laid_out, gradient, zero), like=gradient)

        self._return_once(("masked gradient", weight), grad_output, masked)

    def _decay(self, weight: Node, mask: Node, decay: float, grad_output: int) -> None:
        def added(gradient: Node, output: Node) -> Node:
            zero = self._edit.zero(weight, output, like=gradient)
            dropped = self._edit.call_before(output, aten.where.self, (mask, zero, weight), like=gradient)
            scaled = self._edit.call_before(output, aten.mul.Tensor, (dropped, decay), like=gradient)
            return self._edit.call_before(output, aten.add.Tensor, (gradient, scaled), like=gradient)

        self._return_once(("decay", weight), grad_output, added)

    def _return_once(self, key: Any, grad_output: int, change: Callable[[Node, Node], Node]) -> None:
        """Change what the graph returns as the gradient of a weight: once, however many calls share it."""
        if key in self._edit.made:
            return
        output = self._edit.graph.output_node()
        values = list(output.args[0])  # type: ignore[arg-type]
        values[grad_output] = self._edit.made[key] = change(values[grad_output], output)
        output.args = (values if isinstance(output.args[0], list) else tuple(values),)

    def _replay(self, chain: tuple[Node, ...], old: Node, new: Node, skip: frozenset[Any] = frozenset()) -> Node:
        """Run the moves of ``chain``, which made an operand of ``old``, on ``new``."""
        made_at = self._made_at[new]
        for node in chain:
            if node.target not in skip:
                if (node, new) not in self._edit.made:
                    source, target = old, new
                    args, kwargs = map_arg((node.args, node.kwargs), lambda n: target if n is source else n)  # noqa: B023
                    # Beside the original, where that stands after what is derived from the weight, else beside
                    # what is moved: either way before all that reads the original.
                    late = self._edit.order[node] > made_at
                    at = node.next if late else target.next
                    self._edit.made[node, new] = self._edit.call_before(at, node.target, args, kwargs, like=node)
                new = self._edit.made[node, new]
            old = node
        return new
