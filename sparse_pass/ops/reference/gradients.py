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

from ...vocabulary import KERNEL_TILE, Layout, padded
from .weights import pack

_MASK32 = 0xFFFFFFFF
_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEYS = (0x9E3779B9, 0xBB67AE85)


_TINY = 2.0**-140
"""Not 0, and 0 in 16 bits; nothing beside 2^-116 and more."""
_SMALLEST_NORMAL = 2.0**-126


def philox(seed: Tensor, offset: Tensor) -> Tensor:
    """Philox4x32-10, as `triton.language.randint4x` gives it: int64 in [0, 2^32), offset's shape and a dim of 4 words.

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
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _multiply32(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32-bit product, without a product of 64 bits, which int64 has no room for."""
    lower = word * (constant & 0xFFFF)
    upper = word * (constant >> 16) + (lower >> 16)
    return upper >> 16, (upper & 0xFFFF) << 16 | lower & 0xFFFF


def uniform(seed: Tensor, offset: Tensor) -> Tensor:
    """float32 in [0, 1), offset's shape and a dim of 4: the upper 23 bits of each word of `philox`, over 2^23."""
    return (philox(seed, offset) >> 9).to(torch.float32) * 2.0**-23


def choose(group: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the survivors of groups: which two of four are kept, and the values.

    group: float32 or float64 [..., 4]; u: [...] of the same dtype, in [0, 1), a multiple of 2^-23. Returns bool
    [..., 4], two of four, and [..., 4] values, zero where not kept.

    Of estimates that keep element i with probability p_i and then give g_i / p_i, which is g_i in expectation with the
    variance g_i^2 (1 / p_i - 1), the sum of variances is smallest, with p_i <= 1 and sum p_i = 2, where p_i is
    proportional to the magnitude a_i, cut off at 1. Only the largest can be cut off, and is if it is more than the sum
    of the other three, which then share what is left. So with h such that p_i = min(a_i / h, 1):

        rest    = (min(a_0, a_1) + min(a_2, a_3)) + min(max(a_0, a_1), max(a_2, a_3))     all but the largest
        largest = max(max(a_0, a_1), max(a_2, a_3))
        h       = min(rest, (rest + largest) * 0.5) + 2^-140         where 2^-140 counts as 0 if that is kept
        b_i     = min(a_i, h)                                        p_i = b_i / h
        e_0 = b_0, e_1 = e_0 + b_1, e_2 = e_1 + b_2, e_3 = 2 h
        t       = u h, or 0 if that is below 2^-126, or NaN if h is infinite

    the interval [e_(i-1), e_i) has the length p_i h, and elements are kept whose interval holds t or t + h (systematic
    sampling), by counting the ends that the point is not before:

        first  = the number of i < 2 with t >= e_i
        second = the number of i < 3 with t >= e_i - h, at least first + 1

    and have the larger one of h and a_i as their magnitude. Every sum, difference and product above is rounded once, in
    this order; t < h in floating point too, as u has 23 bits. The one product that goes into a sum is exact, so that
    fused multiply-adds change nothing.

    One or two nonzeros are kept as they are. Zeros are kept as zeros, and what is sure is kept: up to the rounding of
    e_i, which matters only if magnitudes of a group differ by more than a float32 has bits, and then less than once in
    2^22 draws. NaN gives NaN, infinities and groups whose sum is too large for the dtype give infinities.
    """
    a0, a1, a2, a3 = group.abs().unbind(-1)
    upper, lower = torch.maximum(a0, a1), torch.maximum(a2, a3)
    rest = (torch.minimum(a0, a1) + torch.minimum(a2, a3)) + torch.minimum(upper, lower)
    h = torch.minimum(rest, (rest + torch.maximum(upper, lower)) * 0.5) + _TINY
    e0 = torch.minimum(a0, h)
    e1 = e0 + torch.minimum(a1, h)
    e2 = e1 + torch.minimum(a2, h)
    t = u * h
    t = t.masked_fill(t < _SMALLEST_NORMAL, 0) + (h - h)
    first = (t >= e0).int() + (t >= e1)
    second = (t >= e0 - h).int() + (t >= e1 - h) + (t >= e2 - h)
    second = torch.maximum(second, first + 1)

    place = torch.arange(4, device=group.device)
    kept = (place == first.unsqueeze(-1)) | (place == second.unsqueeze(-1))
    magnitude = torch.maximum(group.abs(), (h * (h > _TINY)).unsqueeze(-1))
    return kept, torch.copysign(magnitude, group).masked_fill(~kept, 0)


def _estimate(grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """The estimate of grad^T, and which of it was kept: [N, Mp] of grad's dtype, and bool [N, Mp].

    Group g of column n draws with word n % 4 of uniform(seed, (n // 4) * (Mp / 4) + g), and all of it is computed in
    float32 (in float64 for float64); values that are kept are rounded to grad's dtype at the end.
    """
    rows, cols = grad.shape
    groups = padded(rows) // 4
    turned = torch.nn.functional.pad(grad.detach().T, (0, 4 * groups - rows))
    values = torch.empty(cols, 4 * groups, dtype=grad.dtype, device=grad.device)
    kept = torch.empty(cols, 4 * groups, dtype=torch.bool, device=grad.device)
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    # Small pieces stay in a CPU's cache; a GPU wants few launches.
    piece = max((1 << (14 if grad.device.type == "cpu" else 22)) // max(4 * groups, 1), 1) * 4
    for start in range(0, cols if groups else 0, piece):
        part = slice(start, min(start + piece, cols))
        group = turned[part].to(compute).reshape(-1, groups, 4)
        tile_cols = torch.arange(start // 4, -(-part.stop // 4), device=grad.device)
        offset = tile_cols.unsqueeze(-1) * groups + torch.arange(groups, device=grad.device)
        u = uniform(seed, offset).movedim(-1, 1).reshape(-1, groups)[: group.shape[0]]
        chosen, value = choose(group, u.to(compute))
        kept[part], values[part] = chosen.flatten(1), value.flatten(1)
    return values, kept


def mvue24(grad: Tensor, seed: Tensor) -> Tensor:
    """The estimate of grad [M, N] as a dense [M, N] of the same dtype, contiguous."""
    values, _ = _estimate(grad, seed)
    return values[:, : grad.shape[0]].T.contiguous()


def sparsify_mvue(grad: Tensor, seed: Tensor, layout: Layout = "sm90") -> Tensor:
    """The estimate of grad [M, N], transposed and packed: `pack` of [Np, Mp], where Np is N rounded up as M is."""
    return pack(*estimate(grad, seed), layout)


def estimate(grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """What is packed: the estimate of grad^T, and which of it was kept, [Np, Mp]."""
    return _estimate(torch.nn.functional.pad(grad, (0, padded(grad.shape[1]) - grad.shape[1])), seed)


def sparsify_mvue_sum(grad: Tensor, seed: Tensor, layout: Layout = "sm90") -> tuple[Tensor, Tensor]:
    """The same, and `sums`."""
    return sparsify_mvue(grad, seed, layout), sums(grad)


def sums(grad: Tensor) -> Tensor:
    """The sums of grad over 64 rows each: float32 [Mp / 64, N]. Their sum is the gradient of a bias."""
    rows, cols = grad.shape
    missing = padded(rows) - rows
    return torch.nn.functional.pad(grad.float(), (0, 0, 0, missing)).view(-1, KERNEL_TILE, cols).sum(1)
