"""The reference of masks and layout against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_pass import vocabulary
from sparse_pass.ops.reference import weights as reference

INF, NAN = float("inf"), float("nan")


def tiles(matrix: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [tiles, 16], tiles and places row-major."""
    rows, cols = matrix.shape
    return matrix.reshape(rows // 4, 4, cols // 4, 4).permute(0, 2, 1, 3).reshape(-1, 16)


def all_masks() -> set[frozenset[int]]:
    pairs = list(itertools.combinations(range(4), 2))
    return {
        frozenset(4 * row + col for row, pair in enumerate(choice) for col in pair)
        for choice in itertools.product(pairs, repeat=4)
        if all(sum(col in pair for pair in choice) == 2 for col in range(4))
    }


def best_mask(weight: torch.Tensor) -> torch.Tensor:
    """Brute force over the 90 masks in the documented order; exact for integers."""
    order = list(dict.fromkeys(reference.MASK_LIST))
    table = torch.tensor([[place in places for place in range(16)] for places in order])
    sums = tiles(weight.abs().double()) @ table.T.double()
    return table[sums.argmax(1)]  # documented to be the first of equals


def greedy_mask(tile: list[float]) -> list[bool]:
    kept: list[int] = []
    for place in sorted(range(16), key=lambda p: (-abs(tile[p]), p)):
        row = sum(k // 4 == place // 4 for k in kept)
        col = sum(k % 4 == place % 4 for k in kept)
        if row < 2 and col < 2:
            kept.append(place)
    return [place in kept for place in range(16)]


def test_mask_list_holds_the_90_masks():
    assert set(reference.MASK_LIST) == all_masks()
    assert len(all_masks()) == 90


@pytest.mark.parametrize("largest", [0, 1, 2, 9, 10_000])
def test_optimal_is_brute_force_with_ties(largest):
    weight = torch.randint(-largest, largest + 1, (64, 128)).float()
    assert torch.equal(tiles(reference.mask24(weight, "optimal")), best_mask(weight))


@given(st.lists(st.integers(-3, 3), min_size=16, max_size=16))
@settings(max_examples=200, deadline=None)
def test_both_masks_on_any_small_tile(values):
    weight = torch.tensor(values, dtype=torch.float32).view(4, 4)
    assert torch.equal(tiles(reference.mask24(weight, "optimal")), best_mask(weight))
    assert tiles(reference.mask24(weight, "greedy")).tolist() == [greedy_mask(values)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_optimal_keeps_the_largest_sum(dtype):
    weight = torch.randn(64, 64, dtype=torch.float64).to(dtype)
    kept = tiles(reference.mask24(weight, "optimal"))
    magnitude = tiles(weight.abs().double())
    largest = (magnitude * best_mask(weight)).sum(1)
    torch.testing.assert_close((magnitude * kept).sum(1), largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mask", vocabulary.MASKS)
def test_two_of_four_along_rows_and_columns(mask):
    kept = reference.mask24(torch.randn(128, 64), mask)
    assert kept.dtype is torch.bool
    assert kept.is_contiguous()
    along, across = (m.reshape(-1, 4).sum(1) for m in (kept, kept.T))
    if mask == "optimal":
        assert along.eq(2).all()
        assert across.eq(2).all()
    else:
        assert along.le(2).all()
        assert across.le(2).all()


@pytest.mark.parametrize("mask", vocabulary.MASKS)
def test_nan_and_infinity_are_kept_first(mask):
    weight = torch.full((4, 4), 1.0)
    weight[0, 0], weight[1, 2], weight[3, 1], weight[2, 3] = NAN, INF, -INF, -NAN
    kept = reference.mask24(weight, mask)
    assert kept[~weight.isfinite()].all()
    assert reference.mask24(torch.full((4, 4), NAN), mask).sum() == 8


@pytest.mark.parametrize("mask", vocabulary.MASKS)
def test_float32_decides_where_16_bits_would_tie(mask):
    weight = torch.ones(4, 4)
    weight[0, 3] = weight[1, 3] = 1 + 1e-6
    kept = reference.mask24(weight, mask)
    assert kept[:2, 3].all()
    weight = weight.double()
    weight[2, 3] = 1 + 1e-12 + 1e-6
    assert reference.mask24(weight, mask)[2, 3]


@pytest.mark.parametrize("mask", vocabulary.MASKS)
def test_strides_and_pieces_do_not_matter(mask, monkeypatch):
    weight = torch.randn(96, 2080)
    expected = reference.mask24(weight, mask)
    assert torch.equal(reference.mask24(weight.T.contiguous().T, mask), expected)
    wide = torch.randn(96, 4160)
    wide[:, ::2] = weight
    assert torch.equal(reference.mask24(wide[:, ::2], mask), expected)
    assert torch.equal(reference.mask24(weight[:, :64], mask), expected[:, :64])  # another cut into pieces


def test_empty_weights_have_empty_masks():
    assert reference.mask24(torch.empty(0, 8), "optimal").shape == (0, 8)
    assert reference.mask24(torch.empty(8, 0), "greedy").shape == (8, 0)


def nibble_position(row: int, group: int, cols: int) -> int:
    """Where the metadata nibble of a group is, bit by bit; the oracle of `pack`, taken from torch._cslt_compress."""
    weights = {"r": (16, 32, 64, 1, 128, 256), "g": (4, 8, 2, 512)}
    block = row // 64 * (cols // 64) + group // 16
    inside = sum(weight for bit, weight in enumerate(weights["r"]) if row >> bit & 1)
    inside += sum(weight for bit, weight in enumerate(weights["g"]) if group >> bit & 1)
    return block * 1024 + inside


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", vocabulary.MASKS)
def test_pack_byte_by_byte(dtype, mask):
    rows, cols = 128, 192
    weight = torch.randn(rows, cols).to(dtype)
    kept = reference.mask24(weight, mask)
    packed = reference.pack(weight, kept)
    assert packed.shape == (rows * cols * 9 // 16,)
    assert packed.dtype is dtype
    values = packed[: rows * cols // 2].view(rows, cols // 2)
    metadata = packed[rows * cols // 2 :].view(torch.uint8).tolist()
    for row, group in itertools.product(range(rows), range(cols // 4)):
        chosen = [c for c in range(4) if kept[row, 4 * group + c]]
        free = [c for c in range(4) if c not in chosen]
        indices = sorted(chosen + free[: 2 - len(chosen)])
        position = nibble_position(row, group, cols)
        nibble = metadata[position // 2] >> (4 * (position % 2)) & 15
        assert nibble == indices[0] | indices[1] << 2
        expected = [weight[row, 4 * group + c].item() if c in chosen else 0.0 for c in indices]
        assert values[row, 2 * group : 2 * group + 2].tolist() == expected


@pytest.mark.parametrize("mask", vocabulary.MASKS)
def test_unpack_inverts_pack(mask):
    weight = torch.randn(64, 256).bfloat16()
    kept = reference.mask24(weight, mask)
    assert torch.equal(reference.unpack(reference.pack(weight, kept), 64, 256), weight * kept)


def test_a_kept_zero_keeps_its_index():
    kept = torch.tensor([False, True, False, True]).repeat(64, 16)
    packed = reference.pack(torch.zeros(64, 64, dtype=torch.float16), kept)
    assert packed[64 * 32 :].view(torch.uint8).eq(0b1101_1101).all()


@pytest.mark.parametrize("mask", vocabulary.MASKS)
def test_sparsify_packs_both_directions_of_one_mask(mask):
    weight = torch.randn(128, 64)
    packed, packed_t = reference.sparsify(weight, mask, torch.bfloat16)
    dense = weight.bfloat16() * reference.mask24(weight, mask)
    assert torch.equal(reference.unpack(packed, 128, 64), dense)
    assert torch.equal(reference.unpack(packed_t, 64, 128), dense.T)
