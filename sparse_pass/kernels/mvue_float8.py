"""dY [M, N] -> q(MVUE(dY))^T, packed in the SM90 layout of cuSPARSELt for 8-bit types, and q(dY), in one read (Triton).

The definition is `ops.reference.float8.sparsify_mvue`; the results are equal bit for bit. The algorithm is that of
`mvue`, with float8 values. For 16-bit dY it reads 2 bytes and writes 1.625 bytes an element.
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

from ..vocabulary import FLOAT8, KERNEL_TILE, padded
from . import layout_float8, mvue, tiles
from .launch import launch
from .memory import empty_packed


@triton.jit
def _pair(group, scale, DTYPE: tl.constexpr):
    """The two kept values of a group in float8: a number of 16 bits."""
    first, second = tiles.numbers(group[0], DTYPE)
    return layout_float8.pair(first, second, scale)


@triton.jit
def _mvue_kernel(
    grad_ptr,
    seed_ptr,
    scale_ptr,
    out_ptr,
    quantized_ptr,
    M,
    N,
    stride_gm,
    stride_gn,
    DTYPE: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """out_ptr: int16, two values each, metadata after Np * Mp / 4 of them. quantized_ptr: int32, four values each."""
    m = tl.program_id(1) * 64
    n = tl.program_id(0) * 64
    scale = tl.load(scale_ptr)
    x = tiles.load(grad_ptr, m, n, M, N, stride_gm, stride_gn, BOUNDED)
    groups = tl.num_programs(1) * 16  # of a column, Mp / 4
    R = tl.arange(0, 16)[:, None]
    C = tl.arange(0, 16)[None, :]
    for i in tl.static_range(4):
        word = layout_float8.word(x, 4 * i, 1, scale)
        at = quantized_ptr + (m + 4 * R + i).to(tl.int64) * (N >> 2) + (n >> 2) + C
        if BOUNDED:
            tl.store(at, word, mask=(m + 4 * R + i < M) & (n + 4 * C < N))
        else:
            tl.store(at, word)
    words4 = mvue.philox(tl.load(seed_ptr), ((n >> 2) + C + tiles.zero_beside(x[0])) * groups + ((m >> 2) + R))
    group0 = mvue.choose(x, 0, words4[0], DTYPE)
    group1 = mvue.choose(x, 1, words4[1], DTYPE)
    group2 = mvue.choose(x, 2, words4[2], DTYPE)
    group3 = mvue.choose(x, 3, words4[3], DTYPE)

    scale *= 0.5
    values = out_ptr + n.to(tl.int64) * groups + (m >> 2)
    # As in mvue: a row of the block is of one column of dY.
    even = tl.join(_pair(group0, scale, DTYPE), _pair(group2, scale, DTYPE))
    odd = tl.join(_pair(group1, scale, DTYPE), _pair(group3, scale, DTYPE))
    block = tl.reshape(tl.permute(tl.join(even, odd), (1, 2, 3, 0)), [64, 16])
    rows = tl.arange(0, 64)[:, None]
    tl.store(values + rows * groups + tl.arange(0, 16)[None, :], block.to(tl.int16))
    codes = mvue.nibbles(group0[1], group2[1]) | (mvue.nibbles(group1[1], group3[1]) << 8)
    metadata = out_ptr + tl.num_programs(0).to(tl.int64) * 64 * groups
    metadata += (n.to(tl.int64) * (groups * 4) + m * 64) >> 4
    layout_float8.store_metadata(metadata.to(tl.pointer_type(tl.int32), bitcast=True), tl.trans(codes))


def sparsify_mvue_float8(grad: Tensor, seed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Pack q(MVUE(grad))^T, and make q(grad); `ops.reference.float8.sparsify_mvue` defines the results.

    grad: [M, N] float16 or bfloat16, M and N > 0, N a multiple of 4, any strides. seed: one int64. scale: one float32.
    All on the current device.
    """
    rows, cols = grad.shape
    packed = empty_packed(padded(cols), padded(rows), FLOAT8)
    quantized: Tensor = _empty_strided_cuda((rows, cols), (cols, 1), FLOAT8)
    bounded = rows % KERNEL_TILE != 0 or cols % KERNEL_TILE != 0
    launch(
        _mvue_kernel,
        (triton.cdiv(cols, KERNEL_TILE), triton.cdiv(rows, KERNEL_TILE)),
        (grad, seed, scale, packed, quantized.view(torch.int32)),
        (rows, cols, *grad.stride()),
        (tiles.TRITON_DTYPE[grad.dtype], bounded),
        2,
    )
    return packed.view(FLOAT8), quantized
