"""Activation functions that `sparsify` can apply to what it reads (Triton device functions).

`sparse_pass.reference_activation.activate` defines them; computed in float32 and rounded once.
"""

# Triton reads the device functions, which mypy does not; it has no unpacking in tuples.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="import-not-found, assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activated(x, gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        # NaN stays NaN.
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "squared_relu":
        positive = tl.where(x < 0, 0.0, x)
        return positive * positive
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2.0 * inner)
    else:
        return x * tl.sigmoid(x) * gate


@triton.jit
def activate(x, gate, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """Sixteen tensors of 16-bit numbers, and as many of the gate's -> sixteen, of the same dtype."""
    y = (_activated(x[0].to(tl.float32), gate[0].to(tl.float32), ACTIVATION).to(DTYPE),)
    for place in tl.static_range(1, 16):
        y = y + (_activated(x[place].to(tl.float32), gate[place].to(tl.float32), ACTIVATION).to(DTYPE),)  # noqa: RUF005
    return y
