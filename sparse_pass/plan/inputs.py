"""Decide for the inputs: S(X) belongs to the input, so one answer holds for all linears that read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch.fx import Node

from ..config import ActivationSparsity
from ..graph.activation_functions import ActivationFunction, activation_of
from ..graph.gemms import Linear, Role, made_by, weight_place
from ..graph.inputs import Input, OperandRead, gradient_of, input_of, input_reads
from .calls import Call
from .costs import Costs, Preparation, Product, why_slower
from .legal import why_dense_gradient, why_not_sparse_input
from .values import Gemm, GemmPlan, MaskedInputGradient, Packed, Part, Prepared, Reason


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """The GEMMs of one call that read the 2:4 input: output, and grad_weight if the scheme says so."""

    call: Call
    scheme: ActivationSparsity
    input: Input
    gemms: tuple[Gemm, ...]
    reason: Reason | None
    """Why they are not sparse: none is then, as a dense one needs the masked input, which the kernels do not make."""

    def products(self) -> Iterator[Product]:
        """What is timed of them."""
        value, (_, n, k) = self.call.linear.output.gemm.meta["val"], self.call.linear.shape
        for gemm in self.gemms:
            form = "input" if gemm.name == "output" else "input_grad_weight"
            yield Product(form=form, device=value.device, dtype=value.dtype, m=value.numel() // n, n=n, k=k)


def plan_inputs(calls: Sequence[Call], costs: Costs | None) -> Mapping[Call, Part]:
    """What a 2:4 input means for each call whose scheme has one."""
    groups: dict[tuple[Node, str, bool], list[_Read]] = {}
    for call in calls:
        # Without an input of the matmul the layer is skipped.
        if call.input is not None and (input := input_of(call.linear.output)) is not None:
            read = _read(call, call.input, input)
            groups.setdefault((input.node, call.input.mask, input.k_last), []).append(read)
    parts: dict[Call, Part] = {}
    for several in groups.values():
        parts.update(_plan_input(several, costs))
    return parts


def _read(call: Call, scheme: ActivationSparsity, input: Input) -> _Read:
    linear = call.linear
    output = linear.output.gemm
    places: dict[Role, int] = {"input": input.place, "weight": weight_place(linear.output)}
    read = OperandRead(output, input.place, len(input.chain))
    gemms = [Gemm("output", output, places, input_reads=(read,))]
    text = why_not_sparse_input(linear, input, scheme, call.limits)
    reason = None if text is None else Reason(None, text)
    if call.structured["grad_weight"] == "input" and linear.grad_operand is not None:
        reads, made = tuple(input_reads(linear, input.node)), linear.grad_weight
        places = {} if made is None else {"grad_output": made.place, "input": 1 - made.place}
        gemms.append(Gemm("grad_weight", made_by(linear.grad_operand), places, input_reads=reads))
        reason = reason or why_dense_gradient(linear)
    return _Read(call, scheme, input, tuple(gemms), reason)


def _plan_input(reads: Sequence[_Read], costs: Costs | None) -> dict[Call, Part]:
    """Of all calls that read one input and mask it alike."""
    input, scheme = reads[0].input, reads[0].scheme
    sparse = [one for one in reads if one.reason is None]
    slower = _why_slower(sparse, costs)
    if slower is not None:
        sparse = []
    activation = _activation(sparse[0]) if sparse and len(reads) == 1 else None
    first = min(one.call.linear.output.gemm for one in reads)
    masked = {one.call: tuple(_masked_gradients(one)) for one in reads}
    dense = len(sparse) < len(reads)
    packed = []
    if sparse:
        dtype = input.node.meta["val"].dtype
        transposed = (False, True) if any(len(one.gemms) > 1 for one in sparse) else (False,)
        packed = [Packed(dtype, one, first, together=True) for one in transposed]
    prepared = Prepared(
        "input", input.node, scheme.mask, first, mask=dense or any(masked.values()), dense=dense,
        packed=tuple(packed), k_last=input.k_last, activation=activation,
    )  # fmt: skip
    parts = {}
    for one in reads:
        reason = one.reason or slower
        parts[one.call] = Part(
            gemms=tuple(_gemm_plan(one, gemm, prepared, reason, tuned=costs is not None) for gemm in one.gemms),
            prepared=prepared,
            masked_inputs=masked[one.call],
            reasons=tuple(_told(one, reason)),
        )
    return parts


def _why_slower(sparse: Sequence[_Read], costs: Costs | None) -> Reason | None:
    if costs is None or not sparse or any(one.scheme.backend != "auto" for one in sparse):
        return None
    products = [product for one in sparse for product in one.products()]
    preparation = Preparation(
        operand="S(X)",
        device=products[0].device,
        shape=(products[0].m, products[0].k),
        stored=products[0].dtype,
        dtype=products[0].dtype,
        mask=sparse[0].scheme.mask,
    )
    text = why_slower(costs, "input", products, preparation)
    return None if text is None else Reason(None, text, measured=True)


def _gemm_plan(read: _Read, gemm: Gemm, prepared: Prepared, reason: Reason | None, *, tuned: bool) -> GemmPlan:
    if reason is not None:
        return GemmPlan(gemm, prepared, None, "masked_dense", False, reason)
    packed = prepared.packed[0 if gemm.name == "output" else 1]
    return GemmPlan(gemm, prepared, packed, read.call.kernel, tuned and read.input.node.meta["val"].is_cuda)


def _told(read: _Read, reason: Reason | None) -> Iterator[Reason]:
    if reason is not None:
        yield reason
        if len(read.gemms) > 1 and read.scheme.mask == "rowwise":
            yield Reason("grad_weight", "a rowwise mask is not 2:4 along M, over which it contracts")


def _activation(read: _Read) -> ActivationFunction | None:
    """The activation function that the sparse kernel can compute by itself: none if something else reads its result."""
    linear = read.call.linear
    if read.scheme.grad_input == "masked" and linear.grad_input:
        return None  # that mask is of the result
    if len(read.gemms) == 1 and linear.grad_operand is not None:
        return None  # grad_weight reads the result
    readers = {gemm.node for gemm in read.gemms}
    for gemm in read.gemms[1:]:
        # Through views and a transpose of their own.
        readers |= {node for one in gemm.input_reads for node in one.resolved()[1]}
    return activation_of(read.input.node, frozenset(readers))


def why_no_masked_gradient(linear: Linear) -> Reason | None:
    """Why the gradient of the input cannot be masked, or None if it can be, or if there is none."""
    if linear.unplaced_grad_input:
        return Reason("grad_input", linear.unplaced_grad_input)
    input = input_of(linear.output)
    if input is not None and any(gradient_of(input, use.gemm) is None for use in linear.grad_input):
        return Reason("grad_input", "not found in the layout of the input; left as captured")
    return None


def why_no_masked_grad_weight(linear: Linear) -> Reason | None:
    """Why grad_weight cannot be given the masked input, or None if it can be, or if there is none."""
    if not linear.has_gradient:
        return None
    if linear.grad_operand is None:
        return Reason("grad_weight", linear.unplaced_grad_weight)
    input = input_of(linear.output)
    if input is not None and not any(True for _ in input_reads(linear, input.node)):
        return Reason("grad_weight", "the GEMM that reads the input was not found; left as captured")
    return None


def _masked_gradients(read: _Read) -> Iterator[MaskedInputGradient]:
    for use in read.call.linear.grad_input if read.scheme.grad_input == "masked" else ():
        if (found := gradient_of(read.input, use.gemm)) is not None:
            yield MaskedInputGradient(*found)
