"""Decide for the weights: S(W) belongs to the weight, so one answer holds for all calls of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ..config import WeightSparsity
from ..graph.gemms import Linear, Use, aten, reads_rows
from ..vocabulary import FLOAT8
from .calls import Call
from .costs import Costs, Preparation, Product, why_slower
from .float8 import RoundedReads, why_not_rounded
from .legal import has_scaled_mm, why_not_sparse
from .values import Gemm, GemmPlan, MaskedGradients, Packed, Part, Prepared, Reason, Rounded

_MANY_ROWS = 8192
"""Times the bytes of an element of the weight, which the second kernel reads again: from so many rows on."""


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """One GEMM that reads the 2:4 weight."""

    call: Call
    scheme: WeightSparsity
    gemm: Gemm
    use: Use
    reason: Reason | None
    """Why it is not sparse."""
    rounded: Rounded | None
    """Its other operand, if that is in float8."""

    @property
    def scaled_mm(self) -> bool:
        """Whether it multiplies dense float8 operands."""
        if self.reason is None or self.rounded is None or self.scheme.backend == "masked_dense":
            return False
        return has_scaled_mm(self.use, self.call.linear, self.call.weight_limits)

    def without_kernel(self, text: str, *, measured: bool = False) -> _Read:
        return replace(self, reason=Reason(None if self.gemm.name == "output" else self.gemm.name, text, measured))

    @property
    def transposed(self) -> bool:
        """Whether it is S(W)^T that it reads, packed."""
        return not reads_rows(self.use)

    @property
    def dtype(self) -> torch.dtype:
        return self.use.operand.meta["val"].dtype  # type: ignore[no-any-return]

    def product(self) -> Product:
        """What is timed of it."""
        value = self.use.gemm.meta["val"]
        n = value.shape[-1]
        return Product(
            form="linear", device=value.device, dtype=self.packed_dtype,
            m=value.numel() // n, n=n, k=self.use.operand.meta["val"].numel() // n,
            bias=self.use.gemm.target is aten.addmm.default and self.packed_dtype != FLOAT8,
        )  # fmt: skip

    @property
    def packed_dtype(self) -> torch.dtype:
        """Of the packed weight that it reads."""
        return FLOAT8 if self.scheme.precision == "float8" else self.dtype

    def plan(self, prepared: Prepared, *, tuned: bool) -> GemmPlan:
        if self.reason is not None:
            return GemmPlan(
                self.gemm, prepared, None, "masked_dense", False, self.reason, self.rounded, scaled_mm=self.scaled_mm
            )
        packed = next(p for p in prepared.packed if (p.dtype, p.transposed) == (self.packed_dtype, self.transposed))
        tuned = tuned and self.use.gemm.meta["val"].is_cuda
        return GemmPlan(self.gemm, prepared, packed, self.call.kernel, tuned, rounded=self.rounded)


def plan_weights(calls: Sequence[Call], costs: Costs | None, rounded: RoundedReads) -> Mapping[Call, Part]:
    """What a 2:4 weight means for each call whose scheme has one."""
    groups: dict[tuple[object, ...], list[tuple[Call, WeightSparsity]]] = {}
    decaying: dict[Node, Call] = {}  # which call adds the decay of a weight
    for call in calls:
        if call.weight is not None:
            key = call.linear.weight, call.weight.mask, call.weight.factor, call.weight.precision
            groups.setdefault(key, []).append((call, call.weight))
            if call.weight.decay > 0 and call.linear.grad_output is not None:
                decaying.setdefault(call.linear.weight, call)
    parts: dict[Call, Part] = {}
    for several in groups.values():
        first = several[0][0]
        masked = {
            call: _masked_gradients(call.linear, scheme, first=call is first, decays=call in decaying.values())
            for call, scheme in several
        }
        reads = [read for call, scheme in several for read in _reads(call, scheme, rounded)]
        parts.update(_plan_weight(several, reads, masked, costs))
    return parts


def _masked_gradients(linear: Linear, scheme: WeightSparsity, *, first: bool, decays: bool) -> MaskedGradients | None:
    """What a call does to the gradient of its weight; what the graph returns is changed by one call of the weight."""
    masks = scheme.grad_weight == "masked"
    whole = masks and linear.whole_gradient and first
    operand = linear.grad_operand if masks and not linear.whole_gradient else None
    if operand is None and not whole and not decays:
        return None
    return MaskedGradients(
        operand=operand,
        returned=linear.grad_output if whole or decays else None,
        whole=whole,
        decay=scheme.decay if decays else 0.0,
    )


def _plan_weight(
    calls: Sequence[tuple[Call, WeightSparsity]],
    reads: Sequence[_Read],
    masked: Mapping[Call, MaskedGradients | None],
    costs: Costs | None,
) -> dict[Call, Part]:
    """Of all calls of one weight that mask it alike."""
    weight, scheme = calls[0][0].linear.weight, calls[0][1]
    for dtype in dict.fromkeys(one.dtype for one in reads):
        sparse = [one for one in reads if one.dtype == dtype and one.reason is None]
        if text := _why_slower(weight, sparse, costs):
            reads = [one if one not in sparse else one.without_kernel(text, measured=True) for one in reads]
    readers = tuple(dict.fromkeys(use for call, _ in calls for use in call.linear.readers))
    reading = {*(one.call for one in reads), *(call for call, one in masked.items() if one is not None)}
    if not reading and not readers:
        return {call: Part(reasons=_told(call.linear, [])) for call, _ in calls}
    before = min([*(call.linear.output.gemm for call in reading), *(use.gemm for use in readers)])
    readers = tuple(use for use in readers if use.reads(weight))
    masked_dense = [one for one in reads if one.reason is not None and one.gemm.weight_read is not None]
    dense = bool(readers) or any(not one.scaled_mm for one in masked_dense)
    dense_float8 = any(one.scaled_mm for one in masked_dense)
    mask = dense or dense_float8 or any(one is not None for one in masked.values())
    packed = tuple(_packed(weight, [one for one in reads if one.reason is None], before))
    prepared = Prepared(
        "weight", weight, scheme.mask, before,
        scale=scheme.factor, precision=scheme.precision, mask=mask, dense=dense,
        dense_float8=dense_float8, packed=packed, readers=readers,
    )  # fmt: skip
    return {
        call: Part(
            gemms=tuple(one.plan(prepared, tuned=costs is not None) for one in reads if one.call is call),
            prepared=prepared,
            masked=masked[call],
            reasons=(*_told(call.linear, [one for one in reads if one.call is call]), *why_not_rounded(call)),
        )
        for call, _ in calls
    }


def _reads(call: Call, scheme: WeightSparsity, rounded: RoundedReads) -> Iterator[_Read]:
    linear, weight = call.linear, call.linear.weight
    for name, use in call.weight_uses():
        if call.structured[name] == "weight":
            dense_read, shared = rounded.of_weight(use) or (None, None)
            direct = use if use.reads(weight) else None
            gemm = Gemm(name, use.gemm, weight_read=direct, dense_read=dense_read)
            read = _Read(call, scheme, gemm, use, None, shared)
            text = why_not_sparse(use, linear, scheme, call.weight_limits)
            if text is None and call.is_float8 and shared is None:
                text = "there is nothing to round to float8"
            yield read if text is None else read.without_kernel(text)


def _why_slower(weight: Node, sparse: Sequence[_Read], costs: Costs | None) -> str | None:
    if costs is None or not sparse or any(one.scheme.backend != "auto" for one in sparse):
        return None
    value = weight.meta["val"]
    preparation = Preparation(
        operand="S(W)",
        device=value.device,
        shape=tuple(value.shape),
        stored=value.dtype,
        dtype=sparse[0].packed_dtype,
        mask=sparse[0].scheme.mask,
    )
    return why_slower(costs, "weight", [one.product() for one in sparse], preparation)


def _packed(weight: Node, sparse: Sequence[_Read], before: Node) -> Iterator[Packed]:
    """S(W) and S(W)^T, whichever are read, of each dtype.

    They are packed where they are read, instead of both at once in the forward, where only one is read. Where both
    are, one kernel for both takes two thirds of the time of two, and keeps S(W)^T from the forward to the backward,
    0.56 of the memory of the weight in 16 bits. Two it is if the difference is nothing beside the GEMMs: below half a
    percent of their time for so many rows.
    """
    readers: dict[tuple[torch.dtype, bool], list[_Read]] = {}
    for one in sparse:
        readers.setdefault((one.packed_dtype, one.transposed), []).append(one)
    rows = [one.call.linear.shape[0] for one in sparse]
    many = any(isinstance(m, int) and m >= _MANY_ROWS * weight.meta["val"].dtype.itemsize for m in rows)
    # A weight that is computed would have to be kept itself; the greedy mask takes long to choose.
    cheap_twice = many and sparse[0].scheme.mask == "optimal" and weight.op == "placeholder"
    for (dtype, transposed), several in readers.items():
        together = ((dtype, not transposed) in readers and not cheap_twice) or dtype == FLOAT8
        first = min(several, key=lambda one: one.use.gemm)
        forward = first.use is first.call.linear.output or first.use.gemm.meta.get("partitioner_tag") == "is_forward"
        yield Packed(dtype, transposed, before if together else first.use.gemm, together, not together and not forward)


def _told(linear: Linear, reads: Sequence[_Read]) -> tuple[Reason, ...]:
    """The reasons of one call: of output, of grad_input, and of what was not found."""
    reasons = {name: [one.reason for one in reads if one.gemm.name == name] for name in ("output", "grad_input")}
    grad_input = sorted({one for one in reasons["grad_input"] if one is not None}, key=str)
    unplaced = [Reason("grad_input", linear.unplaced_grad_input), Reason("grad_weight", linear.unplaced_grad_weight)]
    if linear.whole_gradient:
        unplaced.pop()
    return (*filter(None, reasons["output"][:1]), *grad_input, *(one for one in unplaced if one.text))
