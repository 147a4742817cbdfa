"""The reference of 2:4 gradients: a minimum-variance unbiased estimate of grad_output, for grad_weight.

    grad_weight = MVUE(grad_output^T) input        grad_output [M, N], input [M, K]

Random, not largest, two of every four neighbours along M survive, scaled so that the expectation is grad_output: what a
gradient descent averages over steps is right, where keeping the largest would be wrong in every step the same way. The
idea is that of Chmiel et al., "Minimum Variance Unbiased N:M Sparsity for the Neural Gradients" (ICLR 2023).

Letters: a *group* is four neighbours along M of one column n of grad_output; Mp is M rounded up to a multiple of 64,
and what is added counts as zeros. A GPU kernel gives the same bits as the functions here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

TILE = 64
"""The packed layout is made of 64x64 tiles: M is padded to a multiple."""

_MASK32 = 0xFFFFFFFF
_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEYS = (0x9E3779B9, 0xBB67AE85)
_UNIFORM_SCALE = 4.6566127342e-10
"""The largest float32 that takes 2^31 to less than 1."""


def padded(rows: int) -> int:
    """Mp: M rounded up to a multiple of 64."""
    return (rows + TILE - 1) // TILE * TILE


def philox(seed: Tensor, offset: Tensor) -> Tensor:
    """The first word of Philox4x32-10, as `triton.language.randint` gives it: int64 in [0, 2^32), offset's shape.

    seed: int64, one element; its low half is the first key word, its high half the second. offset: int64 >= 0, any
    shape; its low half is the first counter word, its high half the second; the third and fourth are 0.
    """
    k0, k1 = seed.reshape(()) & _MASK32, seed.reshape(()) >> 32 & _MASK32
    c0, c1 = offset & _MASK32, offset >> 32
    c2 = c3 = torch.zeros_like(offset)
    for _ in range(_PHILOX_ROUNDS):
        high0, low0 = _multiply32(c0, _PHILOX_MULTIPLIERS[0])
        high2, low2 = _multiply32(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _PHILOX_KEYS[0] & _MASK32, k1 + _PHILOX_KEYS[1] & _MASK32
    return c0


def _multiply32(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32-bit product, without a product of 64 bits, which int64 has no room for."""
    lower = word * (constant & 0xFFFF)
    upper = word * (constant >> 16) + (lower >> 16)
    return upper >> 16, (upper & 0xFFFF) << 16 | lower & 0xFFFF


def uniform(seed: Tensor, offset: Tensor) -> Tensor:
    """float32 in [0, 1), offset's shape: `triton.language.rand`.

    The word as a signed number x, folded to x or -x - 1, rounded to float32, times 4.6566127342e-10 rounded to float32.
    """
    word = philox(seed, offset)
    folded = torch.where(word > 0x7FFFFFFF, word ^ _MASK32, word)
    return folded.to(torch.float32) * _UNIFORM_SCALE


def choose(group: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the survivors of groups: which of four are kept, and the values of those that are.

    group: float32 or float64 [..., 4]; u: [...] of the same dtype, in [0, 1). Returns bool [..., 4], at most two of
    four, and [..., 4] values, zero where not kept.

    Of estimates that keep element i with probability p_i and then give g_i / p_i, which is g_i in expectation with the
    variance g_i^2 (1 / p_i - 1), the sum of variances is smallest, with p_i <= 1 and sum p_i = 2, where p_i is
    proportional to the magnitude a_i, cut off at 1. Only one element can be cut off, and is if its magnitude is more
    than the sum of the other three; those then share what is left, sum p_i = 1. So with

        rest_i = the sum of the other three, of lower index first:  (x + y) + z
        sure_i = a_i > rest_i                                       kept for certain, with its value
        b_i    = 0 if sure_i else a_i
        e_0 = b_0, e_1 = e_0 + b_1, e_2 = e_1 + b_2, e_3 = e_2 + b_3
        h      = e_3 if any is sure, else e_3 * 0.5                 p_i = b_i / h: kept values are h, signed as g_i
        t      = u * h

    the interval [e_(i-1), e_i) has the length p_i h, and elements are kept whose interval holds t or t + h (systematic
    sampling; t + h is beyond the last interval if an element is sure):

        kept_i = sure_i or e_(i-1) <= t < e_i or e_(i-1) - h <= t < e_i - h            e_(-1) = 0

    Every sum, difference and product above is rounded once, in this order. The one product that goes into a sum is
    e_3 * 0.5, which is exact, so that fused multiply-adds change nothing. Zeros are never kept; one or two nonzeros
    are kept as they are. (The last two hold but for subnormal numbers.)

    If e_3 is not finite, elements 0 and 1 are kept as NaN, and 2 and 3 are not. That is so for a group with a NaN,
    with two infinities, or whose sum is too large for the dtype. A lone infinity is sure, and kept.
    """
    magnitude = group.abs()
    a0, a1, a2, a3 = magnitude.unbind(-1)
    rest = torch.stack([(a1 + a2) + a3, (a0 + a2) + a3, (a0 + a1) + a3, (a0 + a1) + a2], dim=-1)
    sure = magnitude > rest
    b0, b1, b2, b3 = magnitude.masked_fill(sure, 0).unbind(-1)
    e0 = b0
    e1 = e0 + b1
    e2 = e1 + b2
    e3 = e2 + b3
    h = torch.where(sure.any(-1), e3, e3 * 0.5)
    t = u * h
    ends = torch.stack([e0, e1, e2, e3], dim=-1)
    kept = sure | _holding(ends, t) | _holding(ends - h.unsqueeze(-1), t)
    broken = ~(e3 < float("inf")).unsqueeze(-1)
    first_two = torch.arange(4, device=group.device) < 2
    kept = torch.where(broken, first_two, kept)
    value = torch.where(sure, group, torch.copysign(h.unsqueeze(-1), group))
    value = value.masked_fill(broken, float("nan")).masked_fill(~kept, 0)
    return kept, value


def _holding(ends: Tensor, point: Tensor) -> Tensor:
    """Which of four neighbouring intervals with these ends [..., 4] holds the point, which lies behind their start."""
    before = point.unsqueeze(-1) < ends
    return before & ~torch.nn.functional.pad(before[..., :-1], (1, 0))


def _estimate(grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """The estimate of grad^T, and which of it was kept: [N, Mp] of grad's dtype, and bool [N, Mp].

    Group g of column n draws with uniform(seed, n * (Mp / 4) + g), and all of it is computed in float32 (in float64 for
    float64); values that are kept are rounded to grad's dtype at the end.
    """
    rows, cols = grad.shape
    groups = padded(rows) // 4
    turned = torch.nn.functional.pad(grad.detach().T, (0, 4 * groups - rows))
    values = torch.empty(cols, 4 * groups, dtype=grad.dtype, device=grad.device)
    kept = torch.empty(cols, 4 * groups, dtype=torch.bool, device=grad.device)
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    # Small pieces stay in a CPU's cache; a GPU wants few launches.
    piece = max((1 << (14 if grad.device.type == "cpu" else 22)) // max(groups, 1), 1)
    for start in range(0, cols if groups else 0, piece):
        part = slice(start, min(start + piece, cols))
        group = turned[part].to(compute).reshape(-1, groups, 4)
        offset = torch.arange(start * groups, part.stop * groups, device=grad.device).view(-1, groups)
        chosen, value = choose(group, uniform(seed, offset).to(compute))
        kept[part], values[part] = chosen.flatten(1), value.flatten(1)
    return values, kept


def mvue24(grad: Tensor, seed: Tensor) -> Tensor:
    """The estimate of grad [M, N] as a dense [M, N] of the same dtype, contiguous."""
    values, _ = _estimate(grad, seed)
    return values[:, : grad.shape[0]].T.contiguous()


def sparsify_mvue(grad: Tensor, seed: Tensor) -> Tensor:
    """The estimate of grad [M, N], transposed and packed: `reference.pack` of [N, Mp]."""
    return reference.pack(*_estimate(grad, seed))


def grad_weight(packed: Tensor, input: Tensor, out_features: int) -> Tensor:
    """Multiply: packed [N, Mp] of `sparsify_mvue`, input [M, K] -> [N, K]."""
    rows = input.shape[0]
    return reference.unpack(packed, out_features, padded(rows))[:, :rows] @ input
