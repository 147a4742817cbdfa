"""Half a scheme is never computed: a call is rewritten in its forward and in its backward, or not at all."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from torch.fx import Node

from ..config import Scheme, input_scheme, weight_scheme
from ..graph.gemms import Linear
from .legal import why_skipped
from .values import Named

EAGER_BACKWARD = (
    "its autograd.Function is not traced by Dynamo: forward is compiled alone and backward runs eagerly, with the dense"
    " weight (TORCH_LOGS=graph_breaks says why)"
)
_UNLIKE = "{}, and the config treats its calls differently: name all of them, with one scheme"
_BOTH = "the graph computes something from the weight, for output and for grad_input: only one of them would be 2:4"
_AGAIN = "the backward computes the output anew, from the dense input"


def without_halves(linears: Sequence[Linear], chosen: Sequence[Named], eager_backward: Collection[str]) -> list[Named]:
    """The chosen calls, each with the reason if its scheme could not be kept in all of it.

    Backward GEMMs that may belong to any call of a weight are given to the last one, where all have the same scheme.

    Args:
        linears: all of the graph.
        eager_backward: names of the parameters whose backward is in no graph.
    """
    schemes = {  # by the forward GEMM of the call
        one.linear.output.gemm: one.scheme for one in chosen if why_skipped(one.linear, one.scheme) is None
    }
    calls: dict[Node, list[Linear]] = {}
    for linear in linears:
        calls.setdefault(linear.weight, []).append(linear)
    whole = []
    for named in chosen:
        linear = named.linear
        several = calls[linear.weight]
        scheme = schemes.get(linear.output.gemm)
        alike = all(schemes.get(one.output.gemm) == scheme for one in several)
        half = ""
        if any(name in eager_backward or f"{name}.weight" in eager_backward for name in linear.names):
            half = EAGER_BACKWARD
        elif scheme is not None:
            half = _why_half(linear, scheme, alike)
        given = linear.stray if alike and linear is several[-1] else ()
        changed = replace(
            linear,
            half=half,
            grad_input=(*linear.grad_input, *given),
            stray=() if alike else linear.stray,
            whole_gradient=linear.whole_gradient and alike,
        )
        whole.append(replace(named, linear=changed))
    return whole


def _why_half(linear: Linear, scheme: Scheme, alike: bool) -> str:
    if input_scheme(scheme) is not None and linear.again:
        return _AGAIN
    if weight_scheme(scheme) is None:
        return ""
    if linear.half:
        return linear.half
    if linear.readers and input_scheme(scheme) is not None:
        return _BOTH
    if linear.readers and not alike:
        return _UNLIKE.format("the graph computes something from the weight")
    if linear.stray and not alike:
        return _UNLIKE.format("a backward GEMM of the weight may belong to any of its calls")
    return ""
