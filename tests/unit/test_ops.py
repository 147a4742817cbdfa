"""The operators: fakes, strides, errors, autograd and compilation, on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from sparse_pass import vocabulary
from sparse_pass.ops import definitions as ops
from sparse_pass.ops.reference import weights as reference

sparse = torch.ops.sparse_pass

WEIGHT_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
PACKED_DTYPES = [torch.float16, torch.bfloat16]


def case(rows: int = 10, k: int = 64, n: int = 128, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """input, masked weight, packed, packed_t, bias."""
    weight = torch.randn(n, k)
    packed, packed_t = sparse.sparsify(weight, "optimal", dtype=dtype)
    masked = weight.to(dtype) * ops.mask24(weight)
    return torch.randn(rows, k).to(dtype), masked, packed, packed_t, torch.randn(n).to(dtype)


# Values


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_linear_is_the_dense_one_on_the_masked_weight(dtype):
    x, masked, packed, packed_t, bias = case(dtype=dtype)
    linear = torch.nn.functional.linear
    assert torch.equal(sparse.linear(x, packed, bias, 128), linear(x, masked, bias))
    assert torch.equal(sparse.linear(x, packed, None, 128), linear(x, masked))
    grad = torch.randn(10, 128).to(dtype)
    assert torch.equal(sparse.linear(grad, packed_t, None, 64), grad @ masked)


def test_linear_takes_any_rows_and_strides():
    x, masked, packed, _, bias = case(rows=12)
    expected = torch.nn.functional.linear(x, masked, bias)
    wide = torch.zeros(12, 128, dtype=x.dtype)
    wide[:, ::2] = x
    for same in (x.T.contiguous().T, wide[:, ::2]):
        output = sparse.linear(same, packed, bias, 128)
        assert output.is_contiguous()
        torch.testing.assert_close(output, expected)
    row = x[:1].expand(5, -1)
    torch.testing.assert_close(sparse.linear(row, packed, bias, 128), expected[:1].expand(5, -1))
    assert sparse.linear(x[:0], packed, bias, 128).shape == (0, 128)


@pytest.mark.parametrize("mask", vocabulary.MASKS)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_sparsify_chooses_before_it_rounds(dtype, mask):
    weight = torch.randn(64, 128, dtype=torch.float64).to(dtype)
    expected = reference.sparsify(weight, mask, torch.bfloat16)
    for same in (weight, weight.T.contiguous().T):
        for actual, one in zip(sparse.sparsify(same, mask, dtype=torch.bfloat16), expected, strict=True):
            assert torch.equal(actual, one)
    if dtype in PACKED_DTYPES:
        assert all(packed.dtype is dtype for packed in sparse.sparsify(weight, mask))


def test_mask24_is_the_reference():
    weight = torch.randn(20, 12)
    assert torch.equal(ops.mask24(weight), reference.mask24(weight, "optimal"))
    assert torch.equal(ops.mask24(weight, "greedy"), reference.mask24(weight, "greedy"))
    assert torch.equal(sparse.mask24(weight, "greedy"), reference.mask24(weight, "greedy"))
    assert not ops.mask24(weight.requires_grad_()).requires_grad


# The contract with the compiler


@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_opcheck(dtype):
    weight = torch.randn(64, 128).to(dtype)
    for mask in vocabulary.MASKS:
        for same in (weight, weight.T):
            torch.library.opcheck(sparse.mask24.default, (same, mask))
            torch.library.opcheck(sparse.sparsify.default, (same, mask), {"dtype": torch.float16})
    if dtype in PACKED_DTYPES:
        torch.library.opcheck(sparse.sparsify.default, (weight, "optimal"))
        packed, _ = sparse.sparsify(weight, "optimal")
        for x in (torch.randn(5, 128), torch.randn(0, 128), torch.randn(128, 6).T, torch.randn(1, 128).expand(4, -1)):
            for bias in (None, torch.randn(64).to(dtype)):
                torch.library.opcheck(sparse.linear.default, (x.to(dtype), packed, bias, 64))


def test_fakes_have_the_true_metadata():
    x, _, packed, packed_t, bias = case(rows=9)
    weight = torch.randn(64, 128).T  # the outputs are contiguous whatever this is
    calls = [
        (sparse.linear, (x, packed, bias, 128)),
        (sparse.linear, (x.T.contiguous().T, packed, None, 128)),
        (sparse.linear, (torch.randn(9, 128).bfloat16(), packed_t, None, 64)),
        (lambda w: sparse.sparsify(w, "greedy", dtype=torch.float16), (weight,)),
        (sparse.mask24, (weight, "optimal")),
    ]
    for function, arguments in calls:
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            actual = tree_leaves(function(*fakes))
        for a, e in zip(actual, tree_leaves(function(*arguments)), strict=True):
            assert (a.shape, a.stride(), a.dtype, a.device) == (e.shape, e.stride(), e.dtype, e.device)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_with_a_dynamic_batch(backend):
    def step(x, weight, bias):
        packed, packed_t = sparse.sparsify(weight, "optimal", dtype=x.dtype)
        hidden = torch.relu(sparse.linear(x * 2, packed, bias, weight.shape[0]))
        return sparse.linear(hidden, packed_t, None, weight.shape[1]) + x, sparse.mask24(weight, "greedy")

    weight, bias = torch.randn(128, 64), torch.randn(128).bfloat16()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for rows in (16, 3, 50):
        x = torch.randn(rows, 64).bfloat16()
        for actual, expected in zip(compiled(x, weight, bias), step(x, weight, bias), strict=True):
            torch.testing.assert_close(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["none", "eager", "aot_eager"])
def test_backward_through_an_op_is_refused(backend):
    x, _, packed, _, bias = case()
    call = sparse.linear if backend == "none" else torch.compile(sparse.linear, backend=backend)
    with pytest.raises(Exception, match=r"no derivative.*sparse_backend"):  # aot_eager traces the backward at once
        call(x.requires_grad_(), packed, bias, 128).sum().backward()
    with torch.no_grad():
        assert not call(x, packed, bias, 128).requires_grad


def test_forward_of_tensors_that_require_gradients():
    """As in an exported program, which holds parameters."""
    x, _, packed, _, bias = case()
    output = sparse.linear(x.requires_grad_(), packed, bias, 128)
    assert torch.equal(output, sparse.linear(x.detach(), packed, bias, 128))
    packed, packed_t = sparse.sparsify(torch.randn(64, 64, requires_grad=True), "optimal", dtype=torch.float16)
    for result in (packed, packed_t):
        with pytest.raises(NotImplementedError, match=r"no_grad"):
            result.sum().backward()


# Errors: what is wrong, the rule, and the remedy


@pytest.mark.parametrize(
    ("weight", "mask", "parts"),
    [
        (torch.zeros(8), "optimal", ["2-D", "[8]", "leave the layer dense"]),
        (torch.zeros(10, 64), "optimal", ["multiples of 4", "[10, 64]", "pad"]),
        (torch.zeros(2, 4, 4), "greedy", ["2-D", "[2, 4, 4]"]),
        (torch.zeros(4, 4), "best", ["'best'", "optimal, greedy"]),
        (torch.zeros(4, 4, dtype=torch.int32), "optimal", ["torch.int32", "float32"]),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), "optimal", ["torch.float8_e4m3fn", "convert"]),
    ],
)
def test_mask24_errors(weight, mask, parts):
    for call in (ops.mask24, sparse.mask24):
        with pytest.raises(ValueError, match=r"mask|weight") as error:
            call(weight, mask)
        assert all(part in str(error.value) for part in parts), error.value
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=r"mask|weight"):
        sparse.mask24(mode.from_tensor(weight), mask)


@pytest.mark.parametrize(
    ("shape", "source", "target", "parts"),
    [
        ((96, 64), torch.bfloat16, None, ["multiples of 64", "[96, 64]", "masked dense"]),
        ((64, 64), torch.float32, None, ["torch.float32", "dtype=torch.bfloat16"]),
        ((64, 64), torch.bfloat16, torch.float32, ["torch.float32", "float16 or bfloat16"]),
        ((0, 64), torch.bfloat16, None, ["empty", "[0, 64]"]),
        ((64,), torch.bfloat16, None, ["2-D", "[64]"]),
    ],
)
def test_sparsify_errors(shape, source, target, parts):
    weight = torch.zeros(shape, dtype=source)
    with pytest.raises(ValueError, match=r"weight|packed") as error:
        sparse.sparsify(weight, "optimal", dtype=target)
    assert all(part in str(error.value) for part in parts), error.value
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=r"weight|packed"):
        sparse.sparsify(mode.from_tensor(weight), "optimal", dtype=target)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda x, p, b, n: (x[0], p, b, n), ["[64]", "[M, K]"]),
        (lambda x, p, b, n: (x, p, b, 192), ["out_features=192", "9 / 16"]),
        (lambda x, p, b, n: (x, p.view(n, -1), b, n), ["[128, 36]", "1-D"]),
        (lambda x, p, b, n: (x.half(), p, b, n), ["torch.float16", "torch.bfloat16", "dtype="]),
        (lambda x, p, b, n: (x.float(), p.float(), b, n), ["torch.float32"]),
        (lambda x, p, b, n: (x, p, b[:-1], n), ["[127]", "[128]"]),
        (lambda x, p, b, n: (x, p, b.float(), n), ["torch.float32", "torch.bfloat16"]),
    ],
)
def test_linear_errors(change, parts):
    x, _, packed, _, bias = case()
    arguments = change(x, packed, bias, 128)
    with pytest.raises(ValueError, match=r"input|bias") as error:
        sparse.linear(*arguments)
    assert all(part in str(error.value) for part in parts), error.value
