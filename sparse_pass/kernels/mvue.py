"""dY [M, N] -> MVUE(dY)^T, packed in a layout of `vocabulary.LAYOUTS`, or MVUE(dY) as it is, in one read (Triton).

Packed it is [Np, Mp], M and N rounded up to multiples of 64. The definition is `ops.reference.gradients`; the results
are equal bit for bit, but for the payload of a NaN. Bytes moved for 16-bit dY: 2 read and 1.125 written an element (2
for the dense one). One program handles a 64x64 block of dY, one thread's tile is 4x4 as in `masks`: four groups, which
take the four words of one philox call.
"""

# Triton reads the device functions, which mypy does not; it has no unpacking in tuples.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="import-not-found, assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# As Inductor's code calls it: half the host time of torch.empty.
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]

from ..vocabulary import KERNEL_TILE, Layout, padded
from . import layout, layouts, tiles
from .launch import launch
from .memory import empty_packed

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def philox(seed, offset):
    """The four words of `ops.reference.gradients.philox`, for an offset below 2^32; `tl.randint4x` in half the time:
    one multiplication gives both halves of a product."""
    k0 = seed.to(tl.uint64, bitcast=True).to(tl.uint32)
    k1 = (seed.to(tl.uint64, bitcast=True) >> 32).to(tl.uint32)
    c0 = offset.to(tl.uint32, bitcast=True)
    c1, c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0), tl.zeros_like(c0)
    for _ in tl.static_range(10):
        first = c0.to(tl.uint64) * 0xD2511F53
        second = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (second >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (first >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = second.to(tl.uint32), first.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


# What stands for element i of a group: the byte selector of its two bytes, see `layout.permute_bytes`.
_ELEMENT = tl.constexpr((0x10, 0x32, 0x54, 0x76))
_ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _smaller(x, y):
    return tl.minimum(x, y, propagate_nan=_ALL)


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=_ALL)


@triton.jit
def _part(word, h):
    """u h, for u of the upper 23 bits of a random word: (1 + u) h - h, rounded once."""
    one_and_u = ((word >> 9) + 0x3F800000).to(tl.float32, bitcast=True)
    if _INTERPRETED:
        t = (one_and_u - 1.0) * h
        return tl.where(t < 1.1754943508222875e-38, 0.0, t) + (h - h)
    else:
        asm: tl.constexpr = "{ .reg .f32 minus; neg.f32 minus, $2; fma.rn.ftz.f32 $0, $1, $2, minus; }"
        return tl.inline_asm_elementwise(asm, "=f,f,f", [one_and_u, h], tl.float32, True, 1)


@triton.jit
def _reached(t, end):
    """1.0 if t >= end, otherwise 0.0, in one instruction."""
    if _INTERPRETED:
        return tl.where(t >= end, 1.0, 0.0)
    else:
        return tl.inline_asm_elementwise("set.ge.f32.f32 $0, $1, $2;", "=f,f,f", [t, end], tl.float32, True, 1)


@triton.jit
def choose(x, FIRST: tl.constexpr, word, DTYPE: tl.constexpr):
    """The group x[FIRST], x[FIRST + 4], ... and a random word -> its two kept values as a word, which they are (their
    elements in the low two bytes, above them anything), and its sum. Names as in `ops.reference.gradients.choose`."""
    low = layout.pair_up(x[FIRST], x[FIRST + 4], DTYPE)
    high = layout.pair_up(x[FIRST + 8], x[FIRST + 12], DTYPE)
    x0, x1 = tiles.numbers(low, DTYPE)
    x2, x3 = tiles.numbers(high, DTYPE)
    a0, a1, a2, a3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    upper, lower = _larger(a0, a1), _larger(a2, a3)
    rest = (_smaller(a0, a1) + _smaller(a2, a3)) + _smaller(upper, lower)
    # 2^-140, by its bits: Triton 3.6 takes a denormal constant for a float64.
    tiny = tl.full(rest.shape, 512, tl.int32).to(tl.float32, bitcast=True)
    h = _smaller(rest, (rest + _larger(upper, lower)) * 0.5) + tiny
    e0 = _smaller(a0, h)
    e1 = e0 + _smaller(a1, h)
    e2 = e1 + _smaller(a2, h)
    t = _part(word, h)
    first = _reached(t, e0) + _reached(t, e1)
    second = _reached(t, e0 - h) + _reached(t, e1 - h) + _reached(t, e2 - h)
    second = tl.maximum(second, first + 1.0)
    # Selectors of bytes: 0x10 + 0x22 * element of the first, and of the second one byte further up. Added to 2^23 they
    # are the low bits of a float32: the ALU has enough to do.
    chosen = (first * 34.0 + (second * 8704.0 + 8392720.0)).to(tl.int32, bitcast=True)
    values = layout.permute_bytes(low, high, chosen)
    # -2147450880 is 0x80008000, the signs. As 16-bit integers: above the bits of the infinities there is only NaN.
    sizes = layout.larger_halves(values & 0x7FFF7FFF, layout.round_pair(h, h, DTYPE))
    return sizes | (values & -2147450880), chosen, (x0 + x1) + (x2 + x3)


@triton.jit
def nibbles(low, high):
    """The metadata nibbles of two groups, in bytes 0 and 2, from their chosen elements."""
    both = layout.shuffled(low, high, 0x5410)
    return ((both >> 5) & 0x00030003) | ((both >> 11) & 0x000C000C)


@triton.jit
def _element(group, ELEMENT: tl.constexpr, DTYPE: tl.constexpr):
    """One element of a group."""
    words = group[0].to(tl.uint32, bitcast=True)
    low = tl.where((group[1] & 0xFF) == ELEMENT, words.to(tl.uint16), tl.zeros(words.shape, tl.uint16))
    bits = tl.where(((group[1] >> 8) & 0xFF) == ELEMENT, (words >> 16).to(tl.uint16), low)
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def _mvue_kernel(
    grad_ptr,
    seed_ptr,
    out_ptr,
    sums_ptr,
    M,
    N,
    stride_gm,
    stride_gn,
    DTYPE: tl.constexpr,
    LAYOUT: tl.constexpr,
    BOUNDED: tl.constexpr,
    SUMS: tl.constexpr,
):
    """out_ptr: if LAYOUT is "dense" [M, N] of DTYPE; else int32, two values a word, metadata after Np * Mp / 4 words.
    sums_ptr: if SUMS float32 [Mp / 64, N], where N is a multiple of 64."""
    m = tl.program_id(1) * 64
    n = tl.program_id(0) * 64
    x = tiles.load(grad_ptr, m, n, M, N, stride_gm, stride_gn, BOUNDED)
    groups = tl.num_programs(1) * 16  # of a column, Mp / 4
    R = tl.arange(0, 16)[:, None]
    C = tl.arange(0, 16)[None, :]
    words4 = philox(tl.load(seed_ptr), ((n >> 2) + C + tiles.zero_beside(x[0])) * groups + ((m >> 2) + R))
    group0 = choose(x, 0, words4[0], DTYPE)
    group1 = choose(x, 1, words4[1], DTYPE)
    group2 = choose(x, 2, words4[2], DTYPE)
    group3 = choose(x, 3, words4[3], DTYPE)

    if SUMS:
        even, odd = tl.join(group0[2], group2[2]), tl.join(group1[2], group3[2])
        sums = tl.sum(tl.reshape(tl.join(even, odd), [16, 64]), axis=0)
        tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * N + n + tl.arange(0, 64), sums)

    if LAYOUT != "dense":
        values = out_ptr + n.to(tl.int64) * groups + (m >> 2)
        # Neighbouring words belong to neighbouring R: transpose, all four at once, so that the stores coalesce.
        block = tl.join(tl.join(group0[0], group2[0]), tl.join(group1[0], group3[0]))  # R C j1 j0
        block = tl.reshape(tl.permute(block, (1, 2, 3, 0)), [64, 16])
        rows = tl.arange(0, 64)[:, None]
        tl.store(values + rows * groups + tl.arange(0, 16)[None, :], block)
        codes = nibbles(group0[1], group2[1]) | (nibbles(group1[1], group3[1]) << 8)
        metadata = out_ptr + tl.num_programs(0).to(tl.int64) * 64 * groups
        height = tl.num_programs(0) * 64  # Np
        layouts.store_metadata(metadata, tl.trans(codes), n, m, height, groups * 4, LAYOUT)
    else:
        for i in tl.static_range(4):
            even = tl.join(_element(group0, _ELEMENT[i], DTYPE), _element(group2, _ELEMENT[i], DTYPE))
            odd = tl.join(_element(group1, _ELEMENT[i], DTYPE), _element(group3, _ELEMENT[i], DTYPE))
            row = tl.reshape(tl.join(even, odd), [16, 64])
            at_row = m + 4 * R + i
            at_col = n + tl.arange(0, 64)[None, :]
            tl.store(out_ptr + at_row.to(tl.int64) * N + at_col, row, mask=(at_row < M) & (at_col < N))


def sparsify_mvue(grad: Tensor, seed: Tensor, layout: Layout = "sm90") -> Tensor:
    """Pack MVUE(grad)^T; `ops.reference.gradients.sparsify_mvue` defines the result.

    grad: [M, N] float16 or bfloat16, M and N > 0, any strides. seed: one int64. Both on the current device. layout: any
    but "dense"; in "sm80" M and N, rounded up to 64, are multiples of 128.
    """
    packed = _empty(grad)
    _launch(grad, seed, packed, None, layout)
    return packed.view(grad.dtype)


def sparsify_mvue_sum(grad: Tensor, seed: Tensor, layout: Layout = "sm90") -> tuple[Tensor, Tensor]:
    """The same of N a multiple of 64, and the sums of grad over 64 rows each, float32 [Mp / 64, N]."""
    packed, sums = _empty(grad), _empty_sums(grad)
    _launch(grad, seed, packed, sums, layout)
    return packed.view(grad.dtype), sums


def mvue24(grad: Tensor, seed: Tensor) -> Tensor:
    """The dense estimate [M, N]; `ops.reference.gradients.mvue24` defines it. As above."""
    estimate: Tensor = _empty_strided_cuda(tuple(grad.shape), (grad.shape[1], 1), grad.dtype)
    _launch(grad, seed, estimate, None, "dense")
    return estimate


def mvue24_sum(grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """The dense estimate of N a multiple of 64, and the sums of grad over 64 rows each."""
    estimate: Tensor = _empty_strided_cuda(tuple(grad.shape), (grad.shape[1], 1), grad.dtype)
    sums = _empty_sums(grad)
    _launch(grad, seed, estimate, sums, "dense")
    return estimate, sums


def _empty(grad: Tensor) -> Tensor:
    rows, cols = grad.shape
    return empty_packed(padded(cols), padded(rows))


def _empty_sums(grad: Tensor) -> Tensor:
    rows, cols = grad.shape
    shape = triton.cdiv(rows, KERNEL_TILE), cols
    return _empty_strided_cuda(shape, (cols, 1), torch.float32)  # type: ignore[no-any-return]


def _launch(grad: Tensor, seed: Tensor, out: Tensor, sums: Tensor | None, layout: Layout) -> None:
    rows, cols = grad.shape
    bounded = rows % KERNEL_TILE != 0 or cols % KERNEL_TILE != 0
    launch(
        _mvue_kernel,
        (triton.cdiv(cols, KERNEL_TILE), triton.cdiv(rows, KERNEL_TILE)),
        (grad, seed, out, out if sums is None else sums),
        (*grad.shape, *grad.stride()),
        (tiles.TRITON_DTYPE[grad.dtype], layout, bounded, sums is not None),
        # Fewer warps exchange fewer partial sums, and what a thread computes once serves four tiles.
        4 if layout == "dense" else 2,
    )
