"""Activation functions that `sparsify` applies to what it reads, row by row (Triton device functions).

`ops.reference.inputs.activate` defines them; computed in float32 and rounded once.
"""

# Triton reads the device functions, which mypy does not; it has no unpacking in tuples.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="import-not-found, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from . import layout, tiles

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
def _relu(words, DTYPE: tl.constexpr):
    if _INTERPRETED:
        low, high = tiles.numbers(words, DTYPE)
        return layout.round_pair(_positive(low), _positive(high), DTYPE)
    else:
        larger: tl.constexpr = "max.NaN.bf16x2" if tl.bfloat16 == DTYPE else "max.NaN.f16x2"
        asm: tl.constexpr = "{ .reg .b32 zero; mov.b32 zero, 0; " + larger + " $0, $1, zero; }"
        return tl.inline_asm_elementwise(asm, "=r,r", [words], tl.int32, True, 1)


@triton.jit
def _squared(words, DTYPE: tl.constexpr):
    """Rounded once, as a float32 holds the square of each."""
    if _INTERPRETED:
        low, high = tiles.numbers(words, DTYPE)
        return layout.round_pair(low * low, high * high, DTYPE)
    elif tl.bfloat16 == DTYPE:
        # More GPUs have it than have a product alone. 0x80008000 is -0 twice.
        asm: tl.constexpr = "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $1, zero; }"
        return tl.inline_asm_elementwise(asm, "=r,r", [words], tl.int32, True, 1)
    else:
        return tl.inline_asm_elementwise("mul.rn.f16x2 $0, $1, $1;", "=r,r", [words], tl.int32, True, 1)


@triton.jit
def _gelu(x, DTYPE: tl.constexpr):
    """max(x, 0) - |x| h, with h = erfc(|x| / sqrt(2)) / 2 = exp(-x^2 / 2) P(1 / (1 + p |x|)) for a polynomial P.

    p and P were fitted here, by weighted least squares with the weights of Lawson's iteration, to a relative error of h
    that matters after rounding: of standard normal x, less than 1 of 10^5 results in bfloat16 and 30 in float16 are not
    the nearest number (10 and 54 of torch's).
    """
    a = tl.abs(x)
    if tl.bfloat16 == DTYPE:
        t = _reciprocal(1.0 + 0.42 * a)
        series = 0.021074872 + t * (0.4069347114 + t * -0.1297208687)
        series = -0.003845025029 + t * (0.2055538409 + t * series)
    else:
        t = _reciprocal(1.0 + 0.32 * a)
        series = 0.311054020 + t * (-0.2605258485 + t * (0.4925661534 + t * -0.1290388157))
        series = 0.004857733696 + t * (0.08108667328 + t * series)
    return _positive(x) - a * (series * _exp2((a * a) * (-0.5 * _LOG2_E)))


@triton.jit
def _sigmoid(x):
    return _reciprocal(1.0 + _exp2(x * -_LOG2_E))


@triton.jit
def _activated(x, gate, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    if ACTIVATION == "gelu":
        return _gelu(x, DTYPE)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 is the sigmoid of 2 z.
        return x * _sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * (x * x)))
    else:
        return x * _sigmoid(x) * gate


@triton.jit
def activate(row, gate, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """A row of 16-bit numbers as `tiles.load_row` gives it, and one of the gate's -> one of the same dtype.

    In words of two numbers, as they are loaded: no number is moved.
    """
    words = _words(row, DTYPE)
    if ACTIVATION == "relu":
        words = _relu(words, DTYPE)
    elif ACTIVATION == "squared_relu":
        words = _squared(_relu(words, DTYPE), DTYPE)
    else:
        low, high = tiles.numbers(words, DTYPE)
        gate_low, gate_high = tiles.numbers(_words(gate, DTYPE), DTYPE)
        words = layout.round_pair(
            _activated(low, gate_low, ACTIVATION, DTYPE), _activated(high, gate_high, ACTIVATION, DTYPE), DTYPE
        )
    words = words.to(tl.uint32, bitcast=True)
    halves = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    return tl.reshape(halves, row.shape).to(DTYPE, bitcast=True)


@triton.jit
def _words(row, DTYPE: tl.constexpr):
    low, high = tl.split(tl.reshape(row, [16, 32, 2]))
    return layout.pair_up(low, high, DTYPE)
