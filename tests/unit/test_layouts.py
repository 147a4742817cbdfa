"""The packed layouts against torch's own definitions of them, and the kernels that write them compiled for each GPU."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import python_environment, split_packed
from torch import Tensor
from torch.sparse import _semi_structured_conversions as conversions

from sparse_pass.ops.reference import gradients, inputs
from sparse_pass.ops.reference import weights as reference
from sparse_pass.vocabulary import LAYOUTS, MASKS, Layout, packed_numel

DTYPES = [torch.bfloat16, torch.float16]


def shapes(count: int, multiple: int) -> list[tuple[int, int]]:
    draw = random.Random(0)
    return [(multiple * draw.randint(1, 5), multiple * draw.randint(1, 5)) for _ in range(count)]


def sm80_place(row: int, col: int, rows: int) -> int:
    """Where the 16 bits of a row's sixteen columns are, in 16-bit words, as torch core's `MetadataCuSparseLt` counts:
    tiles of 128x64 column by column, in each 32x32 ones column by column, in each eight lines of 16 bytes."""
    of_tile = 512 * (row // 128 + col // 64 * (rows // 128))
    of_square = 64 * (row % 128 // 32) + 256 * (col % 64 // 32)
    # A line: a[0, 0:16] a[8, 0:16] | a[0, 16:32] a[8, 16:32] | a[16, 0:16] a[24, 0:16] | a[16, 16:32] a[24, 16:32].
    return of_tile + of_square + row % 8 * 8 + row % 32 // 16 * 4 + col % 32 // 16 * 2 + row % 16 // 8


def row_major_metadata(masked: Tensor, kept: Tensor) -> Tensor:
    """Of each row's sixteen columns 16 bits, as the reference has them in any layout."""
    index = kept.unflatten(1, (-1, 4)).to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :2]
    low, high = index.sort(dim=-1).values.unbind(-1)
    nibbles = (low | high << 2).view(len(masked), -1, 4)
    return (nibbles << torch.tensor([0, 4, 8, 12])).sum(-1).to(torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_cutlass_is_what_torch_converts(mask: str, dtype: torch.dtype) -> None:
    """Back to the matrix, whatever was masked; and byte for byte where every group keeps two."""
    complete = 0
    for rows, cols in shapes(25, 64):
        weight = torch.randn(rows, cols).to(dtype)
        kept = reference.mask24(weight, mask)
        masked = weight * kept
        values, metadata = split_packed(reference.pack(weight, kept, "cutlass"))
        values, metadata = values.view(rows, -1), metadata.view(torch.int16).view(rows, -1)
        assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(values, metadata), masked)
        offsets = conversions._calculate_meta_reordering_scatter_offsets(rows, cols // 16, torch.int16, "cpu")
        assert torch.equal(metadata.flatten()[offsets].view(rows, -1), row_major_metadata(masked, kept))
        if bool((kept.unflatten(1, (-1, 4)).sum(-1) == 2).all()):
            complete += 1
            theirs = conversions.sparse_semi_structured_from_dense_cutlass(masked)
            assert torch.equal(values, theirs[0])
            assert torch.equal(metadata, theirs[1])
    assert complete == 25 or mask == "greedy"


@pytest.mark.parametrize("mask", MASKS)
def test_sm80_is_as_torch_counts(mask: str) -> None:
    for rows, cols in shapes(6, 128):
        weight = torch.randn(rows, cols).half()
        kept = reference.mask24(weight, mask)
        values, metadata = split_packed(reference.pack(weight, kept, "sm80"))
        assert torch.equal(values, split_packed(reference.pack(weight, kept))[0])
        places = [sm80_place(row, col, rows) for row in range(rows) for col in range(0, cols, 16)]
        assert sorted(places) == list(range(rows * cols // 16))
        stored = metadata.view(torch.int16)[places].view(rows, -1)
        assert torch.equal(stored, row_major_metadata(weight * kept, kept))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_of_unpacked_matrices_are_masked_dense(layout: Layout) -> None:
    """Of weights, their transposes, inputs and gradients, with all that is stored of them."""
    weight, x, seed = torch.randn(256, 128).bfloat16(), torch.randn(128, 128).bfloat16(), torch.tensor([3])
    for mask in MASKS:
        masked = weight * reference.mask24(weight, mask)
        packed, packed_t = reference.sparsify(weight, mask, layout=layout)
        assert packed.numel() == (weight.numel() if layout == "dense" else packed_numel(256, 128))
        assert torch.equal(x @ reference.unpack(packed, 256, 128, layout).T, x @ masked.T)
        assert torch.equal(reference.unpack(packed_t, 128, 256, layout), masked.T)
        for transposed, both in enumerate((packed, packed_t)):
            one = reference.sparsify_one(weight, mask, bool(transposed), layout=layout)
            assert torch.equal(one.view(torch.int16), both.view(torch.int16))
        kept, kept_t = inputs.sparsify_input(x, None, mask, "relu", layout)
        relu = torch.relu(x)
        assert torch.equal(reference.unpack(kept, 128, 128, layout), relu * reference.mask24(relu, mask))
        assert torch.equal(reference.unpack(kept_t, 128, 128, layout), reference.unpack(kept, 128, 128, layout).T)
    estimate = gradients.sparsify_mvue_sum(weight, seed, layout)[0]
    assert torch.equal(reference.unpack(estimate, 128, 256, layout), gradients.mvue24(weight, seed).T)


def test_a_layout_has_whole_tiles() -> None:
    weight = torch.randn(192, 128).bfloat16()
    kept = reference.mask24(weight, "optimal")
    with pytest.raises(ValueError, match=r"\[192, 128\] is not made of tiles of 128x64, as the layout 'sm80' is"):
        reference.pack(weight, kept, "sm80")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's compiler")
def test_the_kernels_compile_for_each_gpu() -> None:
    """Also where there is none: an instruction that a GPU does not have is an error of the assembler."""
    script = Path(__file__).with_name("compiled_kernels.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=python_environment(), capture_output=True, text=True, check=False
    )
    assert done.stdout == "compiled\n", done.stderr[-2000:]
