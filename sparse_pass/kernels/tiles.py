"""Read a 64x64 block of a matrix as 16x16 tiles of 4x4 (Triton device functions).

A block is sixteen tensors [16, 16], one for each place in a tile, row-major; see `masks`.
"""

# Triton reads the device functions, which mypy does not; it has no unpacking in tuples.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="import-not-found, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

TRITON_DTYPE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def load_row(ptr, n, k, N, K, stride_n, stride_k, i: tl.constexpr, BOUNDED: tl.constexpr):
    """Row i of every tile of the 64x64 block at row n and column k of [N, K]: [16, 64], zeros outside of the matrix."""
    ptr += n.to(tl.int64) * stride_n + k.to(tl.int64) * stride_k
    rows = 4 * tl.arange(0, 16)[:, None] + i
    cols = tl.arange(0, 64)[None, :]
    pointers = ptr + rows * stride_n + cols * stride_k
    return tl.load(pointers, mask=(n + rows < N) & (k + cols < K), other=0.0) if BOUNDED else tl.load(pointers)


@triton.jit
def columns(row):
    """The four columns, [16, 16] each, of what `load_row` returns."""
    even, odd = tl.split(tl.reshape(row, [16, 16, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load(ptr, n, k, N, K, stride_n, stride_k, BOUNDED: tl.constexpr):
    """The block as sixteen tensors."""
    x = columns(load_row(ptr, n, k, N, K, stride_n, stride_k, 0, BOUNDED))
    for i in tl.static_range(1, 4):
        x = x + columns(load_row(ptr, n, k, N, K, stride_n, stride_k, i, BOUNDED))
    return x


@triton.jit
def zero_beside(x):
    """Zeros in the registers where x is: what they are added to is computed there, and not moved there afterwards."""
    if _INTERPRETED:
        return tl.zeros(x.shape, tl.int32)
    else:
        word = x.to(tl.uint16, bitcast=True).to(tl.int32)
        return tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,r", [word], tl.int32, True, 1)


@triton.jit
def numbers(word, DTYPE: tl.constexpr):
    """The two 16-bit numbers of a word, as float32."""
    if tl.bfloat16 == DTYPE:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        word = word.to(tl.uint32, bitcast=True)
        low, high = word.to(tl.uint16), (word >> 16).to(tl.uint16)
        return low.to(DTYPE, bitcast=True).to(tl.float32), high.to(DTYPE, bitcast=True).to(tl.float32)
