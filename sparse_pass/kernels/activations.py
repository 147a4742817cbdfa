"""Activation functions that `sparsify` can apply to what it reads (Triton device functions).

`sparse_pass.reference_activation.activate` defines them; computed in float32 and rounded once.
"""

# Triton reads the device functions, which mypy does not; it has no unpacking in tuples.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="import-not-found, assignment"

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_LOG2_E = tl.constexpr(1.4426950408889634)


# The GPU's own approximations, to 1e-7, without the code around them that is for denormals: there are sixteen
# elements in a thread's tile, and the kernel that reads them is to be bound by memory.


@triton.jit
def _exp2(x):
    if _INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _reciprocal(x):
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def _positive(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gelu(x):
    """max(x, 0) - |x| erfc(|x| / sqrt(2)) / 2, with erfc by Abramowitz and Stegun 7.1.26, which is good to 1.5e-7."""
    a = tl.abs(x)
    t = _reciprocal(1.0 + (0.3275911 * 0.7071067811865476) * a)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    half_erfc = series * _exp2((a * a) * (-0.5 * _LOG2_E)) * 0.5
    return _positive(x) - a * half_erfc


@triton.jit
def _sigmoid(x):
    return _reciprocal(1.0 + _exp2(x * -_LOG2_E))


@triton.jit
def _activated(x, gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return _positive(x)
    elif ACTIVATION == "squared_relu":
        positive = _positive(x)
        return positive * positive
    elif ACTIVATION == "gelu":
        return _gelu(x)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 is the sigmoid of 2 z.
        return x * _sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * (x * x)))
    else:
        return x * _sigmoid(x) * gate


@triton.jit
def activate(x, gate, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """Sixteen tensors of 16-bit numbers, and as many of the gate's -> sixteen, of the same dtype."""
    y = (_activated(x[0].to(tl.float32), gate[0].to(tl.float32), ACTIVATION).to(DTYPE),)
    for place in tl.static_range(1, 16):
        y = y + (_activated(x[place].to(tl.float32), gate[place].to(tl.float32), ACTIVATION).to(DTYPE),)  # noqa: RUF005
    return y
