"""What may be rewritten, and how: rules that return a reason or None.

Legal is one question (`why_skipped`), having a kernel for it another (`why_not_sparse`).
"""

from __future__ import annotations

import torch

from ..config import (
    ActivationSparsity,
    GradientSparsity,
    Scheme,
    Single,
    WeightSparsity,
    input_scheme,
    weight_scheme,
)
from ..graph.backward import grad_input_gemm
from ..graph.gemms import GradientGemm, Linear, Use, aten, is_flip, made_by
from ..graph.inputs import Input, input_of
from ..vocabulary import GRAD_TILE, KERNEL_DTYPES, KERNEL_TILE, MIN_CAPABILITY, TILE
from .float8 import why_no_float8
from .limits import Limits
from .table import ESTIMATORS
from .values import Reason

_SCALED_MM_TILE = 16
"""cuBLAS requires N and K of a float8 matmul to be multiples of this."""
_KEEPS = frozenset(
    {
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.detach.default,
        aten._to_copy.default,
        aten.to.dtype,
        torch.ops.prims.convert_element_type.default,
    }
)


def why_skipped(linear: Linear, scheme: Scheme) -> str | None:
    """Why the linear cannot be made 2:4 sparse at all, on any device. Of two schemes both must be possible."""
    if linear.ambiguous:
        return linear.ambiguous
    weight = linear.weight.meta["val"]
    if weight.dim() != 2:
        return why_dims_skipped(weight.shape)
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"the weight is {weight.dtype}: expected float16, bfloat16, float32 or float64"
    reason = None
    if weight_scheme(scheme) is not None:
        split = linear.sharding.why_tiles_are_split() if linear.sharding is not None else None
        reason = split or why_shape_skipped(weight.shape)
    reason = reason or why_no_float8(linear, scheme)
    if input_scheme(scheme) is not None:
        reason = reason or _why_input_skipped(linear)
    return reason


def _why_input_skipped(linear: Linear) -> str | None:
    input = input_of(linear.output)
    if input is None:
        return "the graph has no input of the matmul"
    value = input.node.meta["val"]
    k = linear.shape[2]  # of the weight: that of an input of dynamic sizes may be an expression
    if not isinstance(k, int) or k % TILE or k == 0:
        return f"the input has {k} features: 2:4 needs a multiple of {TILE}; leave the layer dense (map it to None)"
    if not value.is_floating_point() or value.element_size() < 2:
        return f"the input is {value.dtype}: expected float16, bfloat16, float32 or float64"
    return None


def why_dims_skipped(shape: torch.Size) -> str:
    """What is said of a weight that is no matrix."""
    return f"the weight has shape {list(shape)}: 2:4 masks are defined for 2-D weights"


def why_shape_skipped(shape: torch.Size) -> str | None:
    """The rule on dims alone; also asked of parameters before anything is captured."""
    if not all(isinstance(dim, int) for dim in shape):
        return (
            f"the weight has the symbolic shape {list(shape)}: dims of a weight must be static;"
            " pass it as an nn.Parameter or mark it with torch._dynamo.mark_static"
        )
    if any(dim % TILE or dim == 0 for dim in shape):
        return (
            f"the weight is {list(shape)}: 2:4 masks need both dims to be multiples of {TILE};"
            " pad the layer or leave it dense (map it to None)"
        )
    return None


def why_not_sparse(use: Use, linear: Linear, scheme: WeightSparsity, limits: Limits) -> str | None:
    """Why one GEMM gets no sparse kernel. It is computed with the masked weight all the same."""
    if not use.reads(linear.weight):
        return "the GEMM reads what the graph computes from the weight"
    if scheme.backend == "masked_dense":
        return "backend='masked_dense' was asked for"
    return _why_no_device(scheme, limits) or _why_no_call(use) or _why_no_kernel(use, linear)


def has_scaled_mm(use: Use, linear: Linear, limits: Limits) -> bool:
    """Whether ``torch._scaled_mm`` can multiply what one GEMM multiplies, in float8 and dense."""
    if not limits.scaled_mm:
        return False
    if not use.reads(linear.weight) or _why_no_call(use) or _why_no_dtype(use.operand.meta["val"].dtype):
        return False
    return all(isinstance(dim, int) and dim % _SCALED_MM_TILE == 0 for dim in linear.weight.meta["val"].shape)


def why_dense_gradient(linear: Linear) -> Reason | None:
    """Why grad_weight cannot be computed from a 2:4 grad_output at all, on any device."""
    if linear.grad_weight is not None:
        return None
    if linear.grad_operand is None:
        return Reason("grad_weight", linear.unplaced_grad_weight)
    source = made_by(linear.grad_operand)
    text = f"the graph has it as {source.target}, not as one matmul of grad_output and input; left dense"
    return Reason("grad_weight", text)


def why_dense_grad_input(linear: Linear) -> Reason | None:
    """Why grad_input, or one GEMM of it, cannot be computed from a 2:4 grad_output at all, on any device."""
    if linear.stray:
        return Reason("grad_input", f"{linear.unplaced_grad_input}; left dense")
    for use in linear.grad_input:
        if grad_input_gemm(linear, use) is None:
            text = f"the graph has it as {use.gemm.target}, not as one matmul of grad_output and weight; left dense"
            return Reason("grad_input", text)
    return None


def why_not_sparse_gradient(
    made: GradientGemm, name: str, scheme: WeightSparsity | GradientSparsity, limits: Limits
) -> str | None:
    """Why the GEMM of a 2:4 grad_output gets no sparse kernel. It is computed with the same numbers, dense."""
    if scheme.backend == "masked_dense":
        return "backend='masked_dense' was asked for"
    if reason := _why_no_device(scheme, limits):
        return reason
    if not ESTIMATORS[name].packed:
        return f"{made.name}={name!r} has no 2:4 kernel"
    if reason := _why_no_dtype(made.gemm.meta["val"].dtype):
        return reason
    _, n, k = made.shape
    # Weights that are inputs of the graph may have symbolic sizes.
    if not isinstance(n, int) or not isinstance(k, int) or n % KERNEL_TILE or k % GRAD_TILE:
        return f"N and K are {n} and {k}: a 2:4 gradient needs multiples of {KERNEL_TILE} and {GRAD_TILE}"
    return None


def why_not_sparse_input(linear: Linear, input: Input, scheme: ActivationSparsity, limits: Limits) -> str | None:
    """Why the GEMMs of a 2:4 input get no sparse kernel. They are computed with the masked input all the same."""
    if scheme.backend == "masked_dense":
        return "backend='masked_dense' was asked for"
    reason = _why_no_device(scheme, limits)
    if reason is None and scheme.mask == "rowwise":
        reason = "masks of single rows have no kernels, as grad_weight could not use them"
    reason = reason or _why_no_scaled_call(linear.output) or _why_no_dtype(input.node.meta["val"].dtype)
    _, n, k = linear.shape
    if reason is None and (k % KERNEL_TILE or n % GRAD_TILE):
        reason = f"K and N are {k} and {n}: a 2:4 input needs multiples of {KERNEL_TILE} and {GRAD_TILE}"
    return reason


def _why_no_dtype(dtype: torch.dtype) -> str | None:
    if dtype not in KERNEL_DTYPES:
        return f"{str(dtype).removeprefix('torch.')} has no 2:4 kernels, only float16 and bfloat16"
    return None


def _why_no_device(scheme: Single, limits: Limits) -> str | None:
    if limits.device == "cpu" and scheme.backend == "cusparselt":
        return None  # the reference kernels
    if limits.device != "cuda" or limits.capability is None:
        return f"no 2:4 kernels on {limits.device}"
    if limits.capability < MIN_CAPABILITY:
        major, minor = limits.capability
        return f"SM{major}{minor} has no sparse tensor cores: compute capability 8.0 (A100) or newer is needed"
    return limits.unavailable or None


def _why_no_call(use: Use) -> str | None:
    """The sparse op is linear(input, packed, bias): the weight on the right, no scaling."""
    if reason := _why_no_scaled_call(use):
        return reason
    others = [str(node.target) for node in use.chain if node.target not in _KEEPS and not is_flip(node)]
    if others:
        return f"the GEMM reads the weight through {', '.join(others)}"
    return None


def _why_no_scaled_call(use: Use) -> str | None:
    gemm = use.gemm
    if gemm.target not in (aten.mm.default, aten.addmm.default, aten.linear.default):
        return f"the graph has it as {gemm.target}, which has no sparse kernel"
    if use.operand is not gemm.args[2 if gemm.target is aten.addmm.default else 1]:
        return "the weight is the left operand of the matmul"
    if any(factor != 1 for factor in gemm.kwargs.values()):
        return f"addmm with {dict(gemm.kwargs)} has no sparse kernel"
    return None


def _why_no_kernel(use: Use, linear: Linear) -> str | None:
    if reason := _why_no_dtype(use.operand.meta["val"].dtype):
        return reason
    shape = list(linear.weight.meta["val"].shape)
    if any(dim % KERNEL_TILE for dim in shape):
        what = f"the shard of the weight ({linear.sharding})" if linear.sharding is not None else "the weight"
        return f"{what} is {shape}: sparse kernels need multiples of {KERNEL_TILE}"
    return None
