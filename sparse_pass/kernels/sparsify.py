"""W [N, K] -> S(W) and S(W)^T, packed in one of the layouts of `vocabulary.LAYOUTS`, in one read of W (Triton).

The same for inputs X [M, K], whose rows are padded, and which may be what an activation function makes of the tensor
that is read. The definition is `ops.reference.weights` (mask24, pack); the results are equal bit for bit, but for the
sign of a zero that a relu makes of -0.0. Bytes moved for 16-bit W: 2 read and 2 * 1.125 written an element. One program
handles a 64x64 block of W, which is 512 bytes of metadata of S(W) and of S(W)^T; see `masks` and `layout` for the
tensors in it.
"""

# Triton reads the device functions, which mypy does not; it has no unpacking in tuples.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs
# mypy: disable-error-code="import-not-found, assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# As Inductor's code calls it: half the host time of torch.empty.
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]

from ..vocabulary import KERNEL_TILE, Layout, padded
from . import activations, layout, layouts, masks, tiles
from .launch import launch
from .memory import empty_packed

# Two tiles a thread: 96 registers, no spills, five programs on an SM.
_WARPS = 4


@triton.jit
def choose(x, GREEDY: tl.constexpr):
    if GREEDY:
        return masks.choose_greedy(x)
    else:
        sizes = (masks.magnitude(x[0]),)
        for place in tl.static_range(1, 16):
            sizes = sizes + (masks.magnitude(x[place]),)
        return masks.choose_optimal(sizes)


@triton.jit
def zero_unkept(x, mask):
    kept = (tl.where((mask & 1) != 0, x[0], 0.0),)
    for place in tl.static_range(1, 16):
        kept = kept + (tl.where((mask & (1 << place)) != 0, x[place], 0.0),)
    return kept


@triton.jit
def scaled(x, SCALE: tl.constexpr):
    """In the dtype of the tensor that is read, as it is multiplied elsewhere."""
    result = ((x[0].to(tl.float32) * SCALE).to(x[0].dtype),)
    for place in tl.static_range(1, 16):
        result = result + ((x[place].to(tl.float32) * SCALE).to(x[place].dtype),)
    return result


@triton.jit
def _columns(
    w, gate, n, k, N, K, i: tl.constexpr, DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, BOUNDED: tl.constexpr
):
    """Row i of every tile, activated, as its four columns. w, gate: a pointer and its strides."""
    row = tiles.load_row(w[0], n, k, N, K, w[1], w[2], i, BOUNDED)
    if ACTIVATION == "silu_gate":
        gate_row = tiles.load_row(gate[0], n, k, N, K, gate[1], gate[2], i, BOUNDED)
        row = activations.activate(row, gate_row, ACTIVATION, DTYPE)
    elif ACTIVATION != "none":
        row = activations.activate(row, row, ACTIVATION, DTYPE)
    return tiles.columns(row)


@triton.jit
def _sparsify_kernel(
    w_ptr,
    packed_ptr,
    packed_t_ptr,
    gate_ptr,
    N,
    K,
    stride_wn,
    stride_wk,
    stride_gn,
    stride_gk,
    DTYPE: tl.constexpr,
    GREEDY: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BOUNDED: tl.constexpr,
    PACK: tl.constexpr,
    PACK_T: tl.constexpr,
    SCALE: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """packed_ptr, packed_t_ptr: int32, two values a word, metadata after Np * K / 4 words; Np is N padded to 64."""
    n = tl.program_id(1) * 64
    k = tl.program_id(0) * 64
    w, gate = (w_ptr, stride_wn, stride_wk), (gate_ptr, stride_gn, stride_gk)
    x = _columns(w, gate, n, k, N, K, 0, DTYPE, ACTIVATION, BOUNDED)
    for i in tl.static_range(1, 4):
        x = x + _columns(w, gate, n, k, N, K, i, DTYPE, ACTIVATION, BOUNDED)
    if BOUNDED:
        N = tl.num_programs(1) * 64
    mask = choose(x, GREEDY)
    if GREEDY or LAYOUT == "dense":
        x = zero_unkept(x, mask)
    if GREEDY:
        mask = masks.fill(mask)
    if SCALE != 1.0:
        x = scaled(x, SCALE)
    R = tl.arange(0, 16)[:, None]
    C = tl.arange(0, 16)[None, :]
    metadata = (N.to(tl.int64) * K) >> 2

    if PACK and LAYOUT == "dense":
        layouts.store_dense(packed_ptr, x, n, k, K, DTYPE)
    elif PACK:
        words, codes = layout.compress(x, mask, 1, 4, DTYPE)
        values = packed_ptr + n.to(tl.int64) * (K >> 2) + (k >> 2)
        for i in tl.static_range(4):
            tl.store(values + (4 * R + i) * (K >> 2) + C, words[i])
        layouts.store_metadata(packed_ptr + metadata, codes, n, k, N, K, LAYOUT)

    if PACK_T and LAYOUT == "dense":
        layouts.store_dense_transposed(packed_t_ptr, x, n, k, N, DTYPE)
    elif PACK_T:
        words, codes = layout.compress(x, mask >> 16, 4, 1, DTYPE)
        values = packed_t_ptr + k.to(tl.int64) * (N >> 2) + (n >> 2)
        # Neighbouring words belong to neighbouring R: transpose, all four at once, so that the stores coalesce.
        block = tl.join(tl.join(words[0], words[2]), tl.join(words[1], words[3]))  # R C j1 j0
        block = tl.reshape(tl.permute(block, (1, 2, 3, 0)), [64, 16])
        rows = tl.arange(0, 64)[:, None]
        tl.store(values + rows * (N >> 2) + tl.arange(0, 16)[None, :], block)
        layouts.store_metadata(packed_t_ptr + metadata, tl.trans(codes), k, n, K, N, LAYOUT)


@triton.jit
def _mask24_kernel(w_ptr, out_ptr, N, K, stride_wn, stride_wk, GREEDY: tl.constexpr):
    """out_ptr: bool [N, K] as int32, four flags a word."""
    n = tl.program_id(1) * 64
    k = tl.program_id(0) * 64
    x = tiles.load(w_ptr, n, k, N, K, stride_wn, stride_wk, True)
    mask = choose(x, GREEDY)
    rows = 4 * tl.arange(0, 16)[:, None]
    cols = tl.arange(0, 16)[None, :]
    inside = (n + rows < N) & (k + 4 * cols < K)
    out_ptr += n.to(tl.int64) * (K >> 2) + (k >> 2)
    for i in tl.static_range(4):
        nibble = (mask >> (4 * i)) & 15
        flags = (nibble * 0x00204081) & 0x01010101  # bit j to byte j
        tl.store(out_ptr + (rows + i) * (K >> 2) + cols, flags, mask=inside)


def sparsify(
    weight: Tensor, mask: str, dtype: torch.dtype, scale: float = 1.0, layout: Layout = "sm90"
) -> tuple[Tensor, Tensor]:
    """Pack scale * S(W) and its transpose; `ops.reference.weights.sparsify` defines the result.

    weight: [N, K] float16, bfloat16 or float32, N and K multiples of 64 (of 128 in the layout "sm80"), any strides, on
    the current device. dtype: float16 or bfloat16, of the packed values; the mask is chosen on `weight` as stored.
    """
    # Two allocations: a backward that keeps packed_t must not keep packed with it.
    packed, packed_t = _empty(weight, False, layout), _empty(weight, True, layout)
    _launch(weight, None, _How("none", mask, dtype, scale, layout), (packed, packed_t))
    return packed.view(dtype), packed_t.view(dtype)


def sparsify_one(
    weight: Tensor, mask: str, transposed: bool, dtype: torch.dtype, scale: float = 1.0, layout: Layout = "sm90"
) -> Tensor:
    """Pack one of the two alone."""
    packed = _empty(weight, transposed, layout)
    how = _How("none", mask, dtype, scale, layout)
    _launch(weight, None, how, (None, packed) if transposed else (packed, None))
    return packed.view(dtype)


def sparsify_input(
    input: Tensor, gate: Tensor | None, mask: str, activation: str, layout: Layout = "sm90"
) -> tuple[Tensor, Tensor]:
    """Pack S(x) and S(x)^T; `ops.reference.inputs.sparsify_input` defines the result.

    input: [M, K] float16 or bfloat16, M > 0, K a multiple of 64, any strides, on the current device. gate: the same, or
    None if the activation has none. In the layout "sm80" K, and M rounded up to 64, are multiples of 128.
    """
    packed, packed_t = _empty(input, False, layout), _empty(input, True, layout)
    _launch(input, gate, _How(activation, mask, input.dtype, 1.0, layout), (packed, packed_t))
    return packed.view(input.dtype), packed_t.view(input.dtype)


def _empty(source: Tensor, transposed: bool, layout: Layout) -> Tensor:
    rows, cols = padded(source.shape[0]), source.shape[1]
    if layout == "dense":
        return _empty_strided_cuda((rows * cols // 2,), (1,), torch.int32)  # type: ignore[no-any-return]
    return empty_packed(cols, rows) if transposed else empty_packed(rows, cols)


class _How(NamedTuple):
    activation: str
    mask: str
    dtype: torch.dtype
    scale: float
    layout: Layout


def _launch(source: Tensor, gate: Tensor | None, how: _How, results: tuple[Tensor | None, Tensor | None]) -> None:
    """results: of S and of its transpose; either may be None."""
    rows, cols = source.shape
    packed, packed_t = results
    gate = source if gate is None else gate
    target = packed if packed is not None else packed_t
    assert target is not None
    launch(
        _sparsify_kernel,
        (cols // KERNEL_TILE, triton.cdiv(rows, KERNEL_TILE)),
        (source, target, target if packed_t is None else packed_t, gate),
        (rows, cols, *source.stride(), *gate.stride()),
        (
            tiles.TRITON_DTYPE[how.dtype],
            how.mask == "greedy",
            how.activation,
            rows % KERNEL_TILE != 0,
            packed is not None,
            packed_t is not None,
            how.scale,
            how.layout,
        ),
        _WARPS,
    )


def mask24(weight: Tensor, mask: str) -> Tensor:
    """The bool mask [N, K]; `ops.reference.weights.mask24` defines it.

    weight: [N, K] float16, bfloat16 or float32, N and K multiples of 4, any strides, on the current device.
    """
    rows, cols = weight.shape
    kept = torch.empty(rows, cols, dtype=torch.bool, device=weight.device)
    launch(
        _mask24_kernel,
        (triton.cdiv(cols, KERNEL_TILE), triton.cdiv(rows, KERNEL_TILE)),
        (weight, kept.view(torch.int32)),
        (rows, cols, *weight.stride()),
        (mask == "greedy",),
        _WARPS,
    )
    return kept
