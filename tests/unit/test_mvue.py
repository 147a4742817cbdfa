"""The 2:4 estimate of gradients: unbiased, of least variance, the same numbers everywhere; and its operators."""

from __future__ import annotations

import importlib.util
import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from support import assert_unbiased, probabilities, python_environment
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_pass.ops.reference import gradients as reference_gradients
from sparse_pass.ops.reference import weights as reference

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
PACKED_DTYPES = [torch.float16, torch.bfloat16]
sparse = torch.ops.sparse_pass


def seed(number: int) -> Tensor:
    return torch.tensor([number])


# Random numbers


def philox(key: int, counter: int) -> list[int]:
    """Philox4x32-10, from its paper (Salmon et al. 2011), in Python's integers."""
    mask = 2**32 - 1
    c0, c1, c2, c3 = counter & mask, counter >> 32, 0, 0
    k0, k1 = key & mask, key >> 32
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & mask, (first >> 32) ^ c3 ^ k1, first & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


KEYS = [0, 1, 2**32 - 1, 2**32, 2**40 + 12345, 2**62 - 1]
COUNTERS = [0, 1, 77, 2**31, 2**32 - 1, 2**32, 2**41 + 5]


def test_philox() -> None:
    assert philox(0, 0)[0] == 0x6627E8D5  # the paper's code prints it for zeros
    for key in KEYS:
        words = reference_gradients.philox(seed(key), torch.tensor(COUNTERS))
        assert words.tolist() == [philox(key, counter) for counter in COUNTERS]


def test_uniform() -> None:
    for key in KEYS:
        numbers = reference_gradients.uniform(seed(key), torch.tensor(COUNTERS))
        assert numbers.dtype is torch.float32
        assert numbers.tolist() == [[word // 512 / 2**23 for word in philox(key, counter)] for counter in COUNTERS]
    many = reference_gradients.uniform(seed(3), torch.arange(25_000)).flatten()
    assert many.min() >= 0
    assert many.max() < 1
    counts = torch.histc(many, bins=50, min=0, max=1)
    assert (counts - 2000).abs().max() < 5 * 2000**0.5


WORDS = """
    import torch, triton
    import triton.language as tl
    from sparse_pass.ops.reference import gradients as reference_gradients

    @triton.jit
    def kernel(out, seed_ptr, start, COUNT: tl.constexpr):
        place = tl.arange(0, COUNT)
        words = tl.randint4x(tl.load(seed_ptr), start.to(tl.int64) + place.to(tl.int64))
        for word in tl.static_range(4):
            tl.store(out + 4 * place + word, words[word].to(tl.int64) & 0xFFFFFFFF)

    for key in (0, 1, 2**33 + 7, 2**62 - 5):
        for start in (0, 2**32 - 512, 2**40):
            out, seed = torch.empty(1024, 4, dtype=torch.int64), torch.tensor([key])
            kernel[(1,)](out, seed, start, 1024)
            assert torch.equal(out, reference_gradients.philox(seed, torch.arange(start, start + 1024))), (key, start)
    print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's interpreter")
def test_random_words_are_those_of_triton(tmp_path: Path) -> None:
    script = tmp_path / "rand.py"  # Triton reads the source of kernels
    script.write_text(textwrap.dedent(WORDS))
    environment = python_environment(TRITON_INTERPRET="1")
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "equal\n", done.stderr[-2000:]


# The choice


GROUPS = {
    "equal": [1.0, 1.0, 1.0, 1.0],
    "mixed signs": [-3.0, 1.0, 2.0, -1.5],
    "rising": [1.0, 2.0, 3.0, 4.0],
    "one small": [1.0, 1e-3, 1.0, 1.0],
    "dominated": [1.0, -10.0, 2.0, 3.0],
    "dominated, last": [0.1, 0.2, 0.3, -7.0],
    "as large as the rest": [1.0, 2.0, 6.0, 3.0],
    "three": [0.0, 2.0, -1.0, 2.5],
    "three, dominated": [5.0, 0.0, -1.0, 0.5],
    "large and small": [1e20, 1e-20, -1e20, 1e20],
}


@pytest.mark.parametrize("name", GROUPS)
def test_inclusion_probabilities(name: str) -> None:
    """On a grid of u the share in which an element is kept is its probability, up to the ends of two intervals."""
    count = 1 << 14
    u = (torch.arange(count) + 0.5) / count
    kept, values = reference_gradients.choose(torch.tensor(GROUPS[name]).expand(count, 4), u)
    expected = probabilities(GROUPS[name])
    np.testing.assert_allclose(kept.float().mean(0).numpy(), expected, atol=4 / count)
    # A kept value is the dense one over the probability.
    for i in range(4):
        given = values[kept[:, i], i]
        if expected[i] > 1e-6:
            np.testing.assert_allclose(given.numpy(), GROUPS[name][i] / expected[i], rtol=1e-5)
    assert (kept.sum(1) == 2).all()
    assert (values[~kept] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unbiased_with_the_variance_of_the_closed_form(dtype: torch.dtype) -> None:
    """Over 2000 seeds; 16-bit values are rounded once more, which moves the mean by up to half a unit."""
    torch.manual_seed(1)
    grad = (torch.randn(18, 5) * torch.randn(18, 1).exp()).to(dtype)
    grad[3], grad[6:8] = 0, 0
    draws = torch.stack([sparse.mvue24(grad, seed(number)).double() for number in range(2000)])
    assert_unbiased(draws, grad)


def test_less_variance_than_equal_chances() -> None:
    """And than that of any other probabilities of the same sum, tried at random."""
    generator = np.random.default_rng(0)
    for group in (GROUPS["mixed signs"], GROUPS["dominated"], GROUPS["rising"]):
        squares = np.array(group) ** 2
        least = (squares * (1 / probabilities(group) - 1)).sum()
        others = generator.dirichlet(np.ones(4), size=20_000) * 2
        others = others[(others <= 1).all(1) & (others > 0).all(1)]
        assert (squares * (1 / others - 1)).sum(1).min() >= least
        assert (squares * (1 / 0.5 - 1)).sum() > 1.05 * least


def chosen(group: list[float], u: float, dtype: torch.dtype = torch.float32) -> list[float]:
    kept, values = reference_gradients.choose(torch.tensor(group, dtype=dtype), torch.tensor(u, dtype=dtype))
    assert kept.sum() == 2
    assert (values[~kept] == 0).all()
    return values.tolist()


@pytest.mark.parametrize("u", [0.0, 0.25, 0.5, 1 - 2**-23])
@pytest.mark.parametrize("pair", list(itertools.combinations(range(4), 2)), ids=str)
def test_one_or_two_nonzeros_are_kept_as_they_are(pair: tuple[int, int], u: float) -> None:
    for values in ((3.0, -1e-30), (0.1, 0.3), (-2.0, 2.0), (0.0, -5.0), (-0.0, 0.0), (1e-30, 1e30)):
        group = [0.0, -0.0, 0.0, -0.0]
        for place, value in zip(pair, values, strict=True):
            group[place] = value
        group = torch.tensor(group).tolist()
        assert chosen(group, u) == group


def test_what_is_not_finite_stays_so() -> None:
    """Whatever u is; a lone infinity is the largest of its group, and stays."""
    for u in (0.0, 0.3, 0.99):
        for group in ([1, NAN, 2, 3], [0, 0, 0, NAN], [INF, NAN, 0, 0]):
            assert np.isnan(chosen(group, u)).any()
        for group in ([INF, 1, 2, -INF], [3e38, 3e38, 3e38, 0]):
            assert not np.isfinite(chosen(group, u)).all()
        values = chosen([1, 2, -INF, 3], u)
        assert values[2] == -INF
        assert sum(value in (6, 0) for value in values) == 3
        assert chosen([1e38, 3e38, 0, 0], u) == torch.tensor([1e38, 3e38, 0, 0]).tolist()


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_too_large_for_the_dtype_is_infinite(dtype: torch.dtype) -> None:
    """Half the sum may be more than the largest element."""
    largest = torch.finfo(dtype).max
    grad = torch.full((4, 64), largest, dtype=dtype)
    assert not sparse.mvue24(grad, seed(0)).isfinite().all()
    grad[1:] = 0
    assert torch.equal(sparse.mvue24(grad, seed(0)), grad)


def by_hand(group: np.ndarray, u: float) -> np.ndarray:
    """`choose`, number by number and from its docstring."""
    f = np.float32
    a = np.abs(group)
    if np.isnan(a).any():
        return np.array([NAN, NAN, 0, 0], dtype=f)
    rest = f(f(min(a[0], a[1]) + min(a[2], a[3])) + min(max(a[0], a[1]), max(a[2], a[3])))
    h = f(min(rest, f(f(rest + max(a)) * f(0.5))) + f(2**-140))
    ends = [min(a[0], h)]
    for i in (1, 2):
        ends.append(f(ends[-1] + min(a[i], h)))
    t = f(f(u) * h)
    if t < 2**-126:
        t = f(0)
    first = sum(bool(t >= ends[i]) for i in range(2))
    second = max(sum(bool(t >= f(ends[i] - h)) for i in range(3)), first + 1)
    values = np.zeros(4, dtype=f)
    for i in (first, second):
        values[i] = np.copysign(max(a[i], h if h > f(2**-140) else f(0)), group[i])
    return values


@pytest.mark.parametrize("dtype", [torch.float32, *PACKED_DTYPES])
@pytest.mark.parametrize(("rows", "cols"), [(70, 5), (3, 1200), (64, 64)], ids=str)
def test_the_same_bits_by_hand(rows: int, cols: int, dtype: torch.dtype) -> None:
    """Offsets, padding and every rounding as documented; [3, 1200] is computed in pieces."""
    key = 2**40 + 11
    grad = (torch.randn(rows, cols) * torch.randn(rows, cols).mul(3).exp()).to(dtype)
    grad[0, 0] = NAN
    padded = -(-rows // 64) * 64
    turned = torch.zeros(cols, padded)
    turned[:, :rows] = grad.T.float()
    expected = torch.empty(cols, padded)
    for n in [0, 1, 2, *range(3, cols, max(cols // 60, 1)), cols - 1]:
        for g in range(padded // 4):
            part = slice(4 * g, 4 * g + 4)
            word = philox(key, n // 4 * (padded // 4) + g)[n % 4]
            expected[n, part] = torch.from_numpy(by_hand(turned[n, part].numpy(), word // 512 / 2**23))
        actual = sparse.mvue24(grad, seed(key))[:, n]
        torch.testing.assert_close(actual, expected[n, :rows].to(dtype), rtol=0, atol=0, equal_nan=True)


# Operators


def gradient(rows: int = 70, cols: int = 128, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, cols).to(dtype)


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 64, 70])
def test_packed_is_the_dense_one_transposed(rows: int, dtype: torch.dtype) -> None:
    grad = gradient(rows, dtype=dtype)
    packed = sparse.sparsify_mvue(grad, seed(9))
    padded = -(-rows // 64) * 64
    assert packed.shape == (128 * padded * 9 // 16,)
    assert packed.dtype is dtype
    dense = reference.unpack(packed, 128, padded)
    assert torch.equal(dense[:, :rows], sparse.mvue24(grad, seed(9)).T)
    assert not dense[:, rows:].any()


def test_packed_metadata_of_zeros_that_are_kept() -> None:
    """Indices are those of what was drawn, also where its value is rounded to zero; one alone has its neighbour."""
    grad = torch.zeros(64, 64, dtype=torch.float16)
    grad[3::4] = 1
    packed = sparse.sparsify_mvue(grad, seed(0))
    assert packed[64 * 32 :].view(torch.uint8).eq(0b1110_1110).all()  # 2 | 3 << 2
    grad[:] = 2**-24  # the smallest subnormal; a kept value is twice that
    assert (sparse.mvue24(grad, seed(0)) != 0).sum() == 64 * 32


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize(("rows", "k"), [(70, 48), (64, 16), (3, 5), (0, 16)], ids=str)
def test_grad_weight_is_the_dense_one(rows: int, k: int, dtype: torch.dtype) -> None:
    grad, x = gradient(rows, dtype=dtype), torch.randn(rows, k).to(dtype)
    expected = sparse.mvue24(grad, seed(4)).T @ x
    for same in (x, x.T.contiguous().T):
        actual = sparse.grad_weight(sparse.sparsify_mvue(grad, seed(4)), same, 128)
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    grad = gradient(dtype=dtype)
    wide = torch.zeros(70, 256, dtype=dtype)
    wide[:, ::2] = grad
    expected = sparse.mvue24(grad, seed(2))
    assert expected.is_contiguous()
    for same in (grad.T.contiguous().T, wide[:, ::2]):
        assert torch.equal(sparse.mvue24(same, seed(2)), expected)
        if dtype in PACKED_DTYPES:
            assert torch.equal(sparse.sparsify_mvue(same, seed(2)), sparse.sparsify_mvue(grad, seed(2)))


def test_seeds_decide() -> None:
    grad = gradient()
    assert torch.equal(sparse.mvue24(grad, seed(5)), sparse.mvue24(grad, torch.tensor(5)))
    draws = [sparse.mvue24(grad, seed(number)) for number in (5, 6, 5 + 2**32)]
    assert not any(torch.equal(one, two) for one, two in itertools.combinations(draws, 2))
    columns = sparse.mvue24(torch.ones(64, 64), seed(0)).T.unique(dim=0)
    assert len(columns) == 64  # columns, and groups of one, draw for themselves
    assert len(columns.view(-1, 4).unique(dim=0)) == 2  # of equal elements 0 and 2, or 1 and 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    for grad in (gradient(dtype=dtype), gradient(dtype=dtype)[:, :64], gradient(128, 64, dtype).T, gradient(0)):
        torch.library.opcheck(sparse.mvue24.default, (grad, seed(1)))
        if grad.dtype in PACKED_DTYPES:
            torch.library.opcheck(sparse.sparsify_mvue.default, (grad, seed(1)))
            packed = sparse.sparsify_mvue(grad, seed(1))
            x = torch.randn(16, grad.shape[0]).T.to(grad.dtype)
            torch.library.opcheck(sparse.grad_weight.default, (packed, x, grad.shape[1]))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_with_a_dynamic_batch(backend: str) -> None:
    def step(grad: Tensor, x: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        packed = sparse.sparsify_mvue(grad * 2, number)
        return sparse.grad_weight(packed, x, grad.shape[1]) + 1, sparse.mvue24(grad * 2, number)

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for rows in (20, 3, 100):
        grad, x = gradient(rows), torch.randn(rows, 16).bfloat16()
        for actual, expected in zip(compiled(grad, x, seed(3)), step(grad, x, seed(3)), strict=True):
            torch.testing.assert_close(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_backward_through_an_op_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="sparse_backend"):
        sparse.mvue24(gradient().requires_grad_(), seed(0)).sum().backward()


@pytest.mark.parametrize(
    ("op", "arguments", "parts"),
    [
        ("mvue24", (torch.zeros(4), seed(0)), ["[4]", "[M, N]", "flatten"]),
        ("mvue24", (torch.zeros(4, 4, dtype=torch.int32), seed(0)), ["torch.int32", "float32"]),
        ("mvue24", (torch.zeros(4, 4), torch.zeros(1)), ["seed", "torch.float32", "int64"]),
        ("mvue24", (torch.zeros(4, 4), torch.zeros(2, dtype=torch.int64)), ["[2]", "one int64 on cpu"]),
        ("sparsify_mvue", (torch.zeros(4, 64), seed(0)), ["torch.float32", "mvue24"]),
        ("sparsify_mvue_sum", (gradient(4, 32), seed(0)), ["[4, 32]", "multiple of 64"]),
        ("sparsify_mvue_sum", (gradient(4, 0), seed(0)), ["[4, 0]"]),
        ("grad_weight", (torch.zeros(36 * 64).half(), torch.zeros(65, 16).half(), 64), ["[65, 16]", "[M, K]"]),
        ("grad_weight", (torch.zeros(36 * 64).half(), torch.zeros(64, 16).half(), 32), ["out_features=32"]),
        ("grad_weight", (torch.zeros(36 * 64).half(), torch.zeros(64, 16), 64), ["torch.float16", "torch.float32"]),
    ],
)
def test_errors(op: str, arguments: tuple[object, ...], parts: list[str]) -> None:
    call = getattr(sparse, op)
    with pytest.raises(ValueError, match=r"grad|seed|packed") as error:
        call(*arguments)
    assert all(part in str(error.value) for part in parts), error.value
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=r"grad|seed|packed"):
        call(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments))
