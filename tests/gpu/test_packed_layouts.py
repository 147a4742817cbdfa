"""Packed layouts on a GPU: those of SM8x byte for byte as torch core packs them, on any GPU, and the library's own.

Compiled models, and random networks, with the layout that only the library knows::

    SPARSE_PASS_LAYOUT=library pytest -m gpu tests/gpu/test_compiled.py
    SPARSE_PASS_LAYOUT=library SPARSE_PASS_EXAMPLES=500 SPARSE_PASS_DEVICE=cuda SPARSE_PASS_INNER=aot_eager \
        pytest tests/exact/test_properties.py -k networks
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from support import TOLERANCE, assert_same_packed, errors, run, split_packed, ste_reference, twins
from torch import Tensor, nn

import sparse_pass as sp
from sparse_pass.kernels import backends, cusparselt, probe, torch_cslt
from sparse_pass.ops.reference import gradients as reference_gradients
from sparse_pass.ops.reference import inputs as reference_inputs
from sparse_pass.ops.reference import weights as reference
from sparse_pass.vocabulary import FORMS, MASKS, PRODUCTS, Layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
TILES: dict[Layout, int] = {"sm80": 128, "cutlass": 64}
SHAPES = 200


def kernels():
    """Triton is not everywhere where this file is collected."""
    from sparse_pass.kernels import mvue, sparsify

    return sparsify, mvue


def shapes(layout: Layout, count: int) -> list[tuple[int, int]]:
    draw, tile = random.Random(0), TILES[layout]
    most = 1024 // tile
    return [(tile * draw.randint(1, most), tile * draw.randint(1, most)) for _ in range(count)]


def by_torch(weight: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """S(W) and S(W)^T, greedy, as torch core packs them for SM8x: 1-D, values and metadata."""
    values, metadata, values_t, metadata_t, _ = torch._sparse_semi_structured_tile(
        weight, "largest_abs_values_greedy", use_cutlass=layout == "cutlass"
    )
    if layout == "sm80":
        return values.flatten(), values_t.flatten()  # with the metadata behind them
    return tuple(
        torch.cat([one.flatten(), its.permute(2, 0, 1).flatten().view(weight.dtype)])
        for one, its in ((values, metadata), (values_t, metadata_t))
    )


def decided(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """A weight of which both masks keep the same eight of each tile: two in each row and column, larger than others."""
    kept = sp.mask24(torch.randn(rows, cols, device="cuda"))
    weight = torch.rand(rows, cols, device="cuda") + 0.001
    weight = torch.where(kept, weight + 2, weight)
    return (weight * (torch.randint(0, 2, weight.shape, device="cuda") * 2 - 1)).to(dtype)


@DTYPES
@pytest.mark.parametrize("layout", TILES)
def test_bytes_are_those_of_torch(layout: Layout, dtype: torch.dtype) -> None:
    sparsify, _ = kernels()
    for rows, cols in shapes(layout, SHAPES):
        weight = decided(rows, cols, dtype)
        expected = by_torch(weight, layout)
        for mask in MASKS:
            for actual, one in zip(sparsify.sparsify(weight, mask, dtype, 1.0, layout), expected, strict=True):
                assert torch.equal(actual.view(torch.int16), one.view(torch.int16)), (rows, cols, mask)


@DTYPES
@pytest.mark.parametrize("layout", TILES)
def test_groups_of_two_are_those_of_torch(layout: Layout, dtype: torch.dtype) -> None:
    """Of any weight without ties, which torch breaks otherwise. For a group of which greedy keeps fewer than two it
    writes any indices."""
    sparsify, _ = kernels()
    for rows, cols in shapes(layout, 20):
        ranks = torch.rand(rows * cols // 16, 16, device="cuda").argsort(1) + 1.0
        signs = torch.randint(0, 2, ranks.shape, device="cuda") * 2 - 1
        weight = (ranks * signs).view(rows // 4, cols // 4, 4, 4).permute(0, 2, 1, 3).reshape(rows, cols).to(dtype)
        masked = weight * sp.mask24(weight, "greedy")
        ours = sparsify.sparsify(weight, "greedy", dtype, 1.0, layout)
        for actual, one, dense in zip(ours, by_torch(weight, layout), (masked, masked.T), strict=True):
            assert torch.equal(reference.unpack(actual, *dense.shape, layout), dense)
            theirs = reference.unpack(one, *dense.shape, layout).unflatten(1, (-1, 4))
            full = (dense.unflatten(1, (-1, 4)) != 0).sum(-1) == 2
            assert full.float().mean() > 0.8
            assert torch.equal(theirs[full], dense.unflatten(1, (-1, 4))[full])


@DTYPES
@pytest.mark.parametrize("layout", ["sm80", "cutlass", "dense"])
def test_kernels_are_the_references(layout: Layout, dtype: torch.dtype) -> None:
    sparsify, mvue = kernels()
    seed = torch.tensor([7], device="cuda")

    def same(actual: Tensor, expected: Tensor, about: object) -> None:
        if layout == "dense":
            assert torch.equal(actual.view(torch.int16).cpu(), expected.view(torch.int16)), about
        else:
            assert_same_packed(actual.cpu(), expected, about)

    for rows, cols in ((128, 128), (256, 384), (512, 1024)):
        for mask in MASKS:
            for source in (dtype, torch.float32):
                weight = torch.randn(rows, cols, device="cuda").to(source)
                expected = reference.sparsify(weight.cpu(), mask, dtype, 1.0, layout)
                both = sparsify.sparsify(weight, mask, dtype, 1.0, layout)
                for transposed in (False, True):
                    about = (rows, cols, mask, source, transposed)
                    same(both[transposed], expected[transposed], about)
                    one = sparsify.sparsify_one(weight.T.contiguous().T, mask, transposed, dtype, 1.0, layout)
                    same(one, expected[transposed], about)
        x = torch.randn(rows - 30, cols, device="cuda").to(dtype)
        expected = reference_inputs.sparsify_input(x.cpu(), None, "optimal", "squared_relu", layout)
        for actual, one in zip(
            sparsify.sparsify_input(x, None, "optimal", "squared_relu", layout), expected, strict=True
        ):
            same(actual, one, (rows, cols, "input"))
        if layout != "dense":
            expected = reference_gradients.sparsify_mvue(x.cpu(), seed.cpu(), layout)
            same(mvue.sparsify_mvue(x, seed, layout), expected, (rows, cols, "mvue"))


# The library's own


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that only the library knows, where it has another one, too."""
    monkeypatch.setattr(backends, "BACKENDS", (backends.LIBRARY,))
    probe._backend.cache_clear()
    yield
    probe._backend.cache_clear()


@DTYPES
def test_the_library_packs_as_torch_does(library: None, dtype: torch.dtype) -> None:
    """By cached descriptors, on shapes that are no multiples of 128 too; both directions from one masked matrix."""
    assert probe.backend(torch.device("cuda"), dtype) is backends.LIBRARY
    for rows, cols in ((64, 64), (192, 320), (1024, 512), (64, 64)):
        weight = torch.randn(rows, cols, device="cuda").to(dtype)
        masked = weight * sp.mask24(weight)
        packed = torch.ops.sparse_pass.sparsify(weight, "optimal")
        for actual, dense in zip(packed, (masked, masked.T), strict=True):
            assert_same_packed(actual, torch_cslt.compress(dense), (rows, cols))
        for transposed in (False, True):
            one = torch.ops.sparse_pass.sparsify_one(weight, "optimal", transposed)
            assert_same_packed(one, packed[transposed], (rows, cols))


@DTYPES
@pytest.mark.parametrize("form", FORMS)
def test_products_of_what_the_library_packs(library: None, form: str, dtype: torch.dtype) -> None:
    from sparse_pass.kernels import compressor

    spec = PRODUCTS[form]
    a = torch.randn(192, 320, device="cuda").to(dtype)
    a *= sp.mask24(a)
    dense = torch.randn(spec.dense_shape(136, 320), device="cuda").to(dtype)
    actual = cusparselt.product(form, dense, compressor.pack(a), 192)
    b = dense.double().T if spec.b_transposed else dense.double()
    expected = a.double() @ b
    expected = expected.T if spec.d_transposed else expected
    assert float((actual.double() - expected).norm() / expected.norm()) < TOLERANCE[torch.bfloat16]


def test_a_step_with_the_librarys_layout(library: None) -> None:
    """Compiled by Inductor, which calls the packers and the binding themselves."""
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 192)).to("cuda", torch.bfloat16)
    config = {"0": sp.WeightSparsity(), "2": sp.WeightSparsity()}
    x = torch.randn(104, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    backend = sp.sparse_backend(config, model=model, tune="off")
    actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x])
    ste = ste_reference(model, config)
    expected = run(ste, twins(model, ste), [x])
    assert max(errors(actual, expected).values()) < TOLERANCE[torch.bfloat16]
    assert {site.output for site in backend.report.sites} == {"cusparselt"}


def test_the_librarys_layout_in_a_cuda_graph(library: None) -> None:
    weight, x = (torch.randn(256, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def step() -> Tensor:
        packed, packed_t = torch.ops.sparse_pass.sparsify(weight, "optimal")
        hidden = torch.ops.sparse_pass.linear(x, packed, None, 256)
        return torch.ops.sparse_pass.linear(hidden, packed_t, None, 128)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for _ in range(2):
        weight.normal_()
        x.normal_()
        graph.replay()
        expected = step().double()
        assert float((output.double() - expected).norm() / expected.norm()) < 5e-3


def test_every_layout_is_right_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU that is there; torch's CUTLASS kernels and the layout of SM8x are for SM8x."""
    device, found = torch.device("cuda"), {}
    for one in backends.BACKENDS:
        probe._backend.cache_clear()
        monkeypatch.setattr(backends, "BACKENDS", (one,))
        found[one.name] = probe.availability(device, torch.bfloat16)
    probe._backend.cache_clear()
    print(found)
    assert found["library"] == found["compress"] == ""
    if torch.cuda.get_device_capability() == (9, 0):
        assert found["sm90"] == ""
        assert "wrong results" in found["sm80"]
        assert "compute capability 8.x" in found["cutlass"]
    if torch.cuda.get_device_capability()[0] == 8:
        assert found["sm80"] == found["cutlass"] == ""


def test_emulated_products_are_masked_dense() -> None:
    """What a GPU of SM8x would multiply: unpacked by the reference."""
    sparsify, _ = kernels()
    for layout, tile in TILES.items():
        weight, x = (
            torch.randn(4 * tile, 2 * tile, device="cuda").bfloat16(),
            torch.randn(96, 2 * tile, device="cuda").bfloat16(),
        )
        packed, packed_t = sparsify.sparsify(weight, "optimal", torch.bfloat16, 1.0, layout)
        masked = weight * sp.mask24(weight)
        assert torch.equal(F.linear(x, reference.unpack(packed, *weight.shape, layout)), F.linear(x, masked))
        assert torch.equal(reference.unpack(packed_t, *weight.T.shape, layout), masked.T)
        assert split_packed(packed)[0].shape == (weight.numel() // 2,)
