"""Numbers at the edges: NaN and infinities, ties, zeros, denormals, the largest numbers, the same bits every time.

The rule is that of a dense matmul with the masked weight: what the mask drops is a zero, whatever it was, and what
it keeps is as it was. A zero of the masked weight times a NaN or an infinity of the input is a NaN then. The sparse
kernels of a GPU do not multiply by what the mask dropped: there that product is a zero, and all else the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TOLERANCE, Result, relative_error, run
from torch import Tensor, nn

import sparse_pass as sp

INF, NAN = float("inf"), float("nan")
W24 = sp.WeightSparsity()
SCHEMES = {
    "default": W24,
    "all": sp.WeightSparsity(mask="greedy", grad_weight="masked", decay=0.5),
}
INNERS = pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
MASKS = pytest.mark.parametrize("mask", ["optimal", "greedy"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def compiled(model: nn.Module, scheme: sp.WeightSparsity = W24, inner: str = "aot_eager") -> Callable[..., Tensor]:
    """Every linear of ``model`` by the scheme."""
    return torch.compile(model, backend=sp.sparse_backend({"re:.*": scheme}, model=model, inner=inner, tune="off"))


def masked(weight: Tensor, scheme: sp.WeightSparsity = W24) -> Tensor:
    """Not a product with the mask: an infinity times zero is a NaN."""
    return torch.where(sp.mask24(weight, scheme.mask), weight, torch.zeros_like(weight))


def dense(model: nn.Module, x: Tensor, scheme: sp.WeightSparsity = W24, **options: Any) -> Result:
    """What the contract says, by dense matmuls with the masked weights.

    The straight-through estimator's usual spelling, ``w + (S(w) - w).detach()``, is a NaN where w is not finite.
    """
    reference = copy.deepcopy(model)
    weights = {name: p for name, p in reference.named_parameters() if p.dim() == 2}
    for weight in weights.values():
        weight.data = masked(weight, scheme)
    result = run(reference, dict(reference.named_parameters()), [x], **options)
    for name in weights:
        gradient, weight = result.gradients.get(name), model.get_parameter(name).detach()
        if gradient is None:
            continue
        kept, zero = sp.mask24(weight, scheme.mask), torch.zeros_like(weight)
        if scheme.grad_weight == "masked":
            gradient = torch.where(kept, gradient, zero)
        if scheme.decay:
            gradient = gradient + torch.where(kept, zero, scheme.decay * weight)
        result.gradients[name] = gradient
    return result


def assert_same(actual: Result, expected: Result, tolerance: float) -> None:
    """NaNs and infinities in the same places, the rest within the tolerance."""
    names = [f"output {i}" for i in range(len(expected.outputs))] + list(expected.gradients)
    pairs = zip(
        [*actual.outputs, *actual.gradients.values()], [*expected.outputs, *expected.gradients.values()], strict=True
    )
    for name, (a, e) in zip(names, pairs, strict=True):
        assert (a is None) == (e is None), name
        if a is None or e is None:
            continue
        assert torch.equal(a.isnan(), e.isnan()), f"NaNs of {name}:\n{a}\n{e}"
        odd = ~e.isfinite() & ~e.isnan()
        assert torch.equal(a[odd], e[odd]), f"infinities of {name}:\n{a}\n{e}"
        finite = e.isfinite()
        zero = torch.zeros((), dtype=e.dtype)
        error = relative_error(torch.where(finite, a, zero), torch.where(finite, e, zero))
        assert error <= tolerance, f"{name}: relative error {error}"


# NaN and infinity


ODD_WEIGHTS = st.sampled_from([1.0, NAN, INF, -INF, 0.0, -0.0, -2.0, 3.0])
ODD_INPUTS = st.sampled_from([1.0, 1.0, 2.0, -3.0, 0.0, NAN, INF, -INF])


@pytest.mark.parametrize("scheme", SCHEMES)
@DTYPES
def test_not_finite(scheme: str, dtype: torch.dtype) -> None:
    """Any mix of numbers that are none, in weights and inputs, forward and backward."""
    model = nn.Sequential(nn.Linear(8, 4, dtype=dtype), nn.ReLU(), nn.Linear(4, 8, bias=False, dtype=dtype))
    call = compiled(model, SCHEMES[scheme])
    clean = st.lists(st.sampled_from([1.0, 2.0, -3.0, 0.5]), min_size=16, max_size=16)

    # What differs between examples are values alone: one compilation serves all.
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        weights=st.lists(ODD_WEIGHTS, min_size=64, max_size=64),
        inputs=st.one_of(clean, st.lists(ODD_INPUTS, min_size=16, max_size=16)),
    )
    def agrees(weights: list[float], inputs: list[float]) -> None:
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor(weights[:32]).view(4, 8))
            model[2].weight.copy_(torch.tensor(weights[32:]).view(8, 4))
        x = torch.tensor(inputs, dtype=dtype).view(2, 8).requires_grad_()
        actual = run(call, dict(model.named_parameters()), [x])
        assert_same(actual, dense(model, x, SCHEMES[scheme]), TOLERANCE[dtype])

    agrees()


def odd(*shape: int, seed: int, share: float = 0.05) -> Tensor:
    """Normal numbers, some of which are none."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    for value in (NAN, INF, -INF):
        values[torch.rand(shape, generator=generator) < share / 3] = value
    return values


def test_not_finite_through_inductor() -> None:
    scheme = SCHEMES["all"]
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    call = compiled(model, scheme, "inductor")
    for seed in range(10):
        with torch.no_grad():
            model[0].weight.copy_(odd(16, 8, seed=seed))
        x = odd(5, 8, seed=seed, share=0.05 * (seed % 2)).requires_grad_()
        actual = run(call, dict(model.named_parameters()), [x])
        assert_same(actual, dense(model, x, scheme), TOLERANCE[torch.float32])


@pytest.mark.parametrize("share", [0.0, 0.02], ids=["finite_inputs", "odd_inputs"])
def test_not_finite_with_reference_kernels(share: float) -> None:
    """Packing keeps NaN and infinities; the CPU kernels multiply by the zeros, as a dense matmul does."""
    scheme = sp.WeightSparsity(backend="cusparselt", grad_weight="masked")
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    call = compiled(model, scheme)
    for seed in range(5):
        with torch.no_grad():
            model[0].weight.copy_(odd(64, 64, seed=seed, share=0.01))
        x = odd(5, 64, seed=seed, share=share).bfloat16().requires_grad_()
        actual = run(call, dict(model.named_parameters()), [x])
        assert_same(actual, dense(model, x, scheme), TOLERANCE[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["optimal", "greedy"])
def test_nan_of_the_input_with_sparse_kernels(mask: str) -> None:
    """A NaN reaches the outputs whose weights for it are kept; where they are dropped, at most."""
    model = nn.Sequential(nn.Linear(64, 128, bias=False)).cuda().bfloat16()
    x = torch.randn(8, 64, device="cuda").bfloat16()
    x[3, 17] = NAN
    y = compiled(model, sp.WeightSparsity(mask=mask))(x).detach()
    kept = sp.mask24(model[0].weight, mask)[:, 17]
    assert y[3][kept].isnan().all()
    others = [row for row in range(8) if row != 3]
    assert y[others].isfinite().all()
    clean = x.clone()
    clean[3, 17] = 0
    expected = clean @ masked(model[0].weight.detach(), sp.WeightSparsity(mask=mask)).T
    finite = ~y.isnan()
    assert relative_error(y[finite], expected[finite]) < TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_odd_weight_with_sparse_kernels(value: float) -> None:
    model = nn.Sequential(nn.Linear(64, 128, bias=False)).cuda().bfloat16()
    with torch.no_grad():
        model[0].weight[5, 6] = value
    x = torch.ones(8, 64, device="cuda").bfloat16()
    y = compiled(model)(x).detach()
    expected = x @ masked(model[0].weight.detach()).T
    assert torch.equal(y.isfinite(), expected.isfinite())
    # The sparse tensor cores of an H200 give NaN for a weight of -inf where the dense ones give -inf, by every
    # algorithm of cuSPARSELt and in both dtypes; +inf and NaN they give as dense ones do.
    if value != -INF:
        assert torch.equal(y.isnan(), expected.isnan())


@MASKS
@INNERS
def test_a_dropped_infinity_is_a_zero(mask: str, inner: str) -> None:
    """Three infinities in a row of four: one is dropped, and leaves no NaN."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[INF, INF, INF, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]))
    y = compiled(model, sp.WeightSparsity(mask=mask), inner)(torch.ones(2, 4))
    assert y[:, 0].eq(INF).all()
    assert y[:, 1:].isfinite().all()


def test_masked_gradient_of_a_nan_is_zero() -> None:
    """A NaN gradient of a dropped weight is masked like any other, not multiplied by zero."""
    model = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(3, 8)
    x[0, 2] = NAN
    compiled(model, sp.WeightSparsity(grad_weight="masked"))(x).sum().backward()
    gradient, kept = model[0].weight.grad, sp.mask24(model[0].weight)
    assert gradient is not None
    assert gradient[:, 2][kept[:, 2]].isnan().all()
    assert gradient[~kept].eq(0).all()


@MASKS
def test_decay_of_a_dropped_infinity(mask: str) -> None:
    """It is infinite for what is dropped and nothing for what is kept."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[INF, INF, INF, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]))
    compiled(model, sp.WeightSparsity(mask=mask, decay=0.5))(torch.ones(2, 4)).sum().backward()
    gradient, weight = model[0].weight.grad, model[0].weight.detach()
    kept = sp.mask24(weight, mask)
    assert gradient is not None
    assert gradient[kept].eq(2).all()
    assert torch.equal(gradient[~kept], 2 + 0.5 * weight[~kept])


@MASKS
@DTYPES
def test_pruned_weights_are_those_of_training(mask: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(16, 16, dtype=dtype))
    with torch.no_grad():
        model[0].weight.copy_(odd(16, 16, seed=1, share=0.3))
    scheme = sp.WeightSparsity(mask=mask)
    expected = masked(model[0].weight.detach(), scheme)
    x = torch.randn(3, 16, dtype=dtype)
    trained = run(compiled(model, scheme), {}, [x], backward=False)
    sp.prune_(model, {"0": scheme})
    assert torch.equal(model[0].weight.isnan(), expected.isnan())
    assert torch.equal(model[0].weight.nan_to_num(7), expected.nan_to_num(7))
    assert_same(trained, run(model, {}, [x], backward=False), TOLERANCE[dtype])


# Zeros and ties


@pytest.mark.parametrize("scheme", SCHEMES)
@INNERS
def test_zero_tiles(scheme: str, inner: str) -> None:
    """Tiles of zeros beside others: they give nothing and get the gradient that can bring them back."""
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[:4, 4:12] = 0
        model[2].weight.zero_()
    x = torch.randn(3, 16, requires_grad=True)
    actual = run(compiled(model, SCHEMES[scheme], inner), dict(model.named_parameters()), [x])
    assert_same(actual, dense(model, x, SCHEMES[scheme]), TOLERANCE[torch.float32])
    assert torch.equal(actual.outputs[0], model[2].bias.detach().expand(3, 8))
    gradient = actual.gradients["2.weight"]
    assert gradient is not None
    alive = torch.ones(8, 8, dtype=torch.bool) if scheme == "default" else sp.mask24(model[2].weight, "greedy")
    assert gradient[alive].ne(0).all()
    assert gradient[~alive].eq(0).all()


@MASKS
@DTYPES
def test_ties(mask: str, dtype: torch.dtype) -> None:
    """Weights of one magnitude, or of two: the same choice in training, in `mask24` and in `prune_`."""
    scheme = sp.WeightSparsity(mask=mask)
    model = nn.Sequential(nn.Linear(16, 16, dtype=dtype))
    call = compiled(model, scheme)
    for values in ([1.0, -1.0], [0.5, -0.5, 2.0, -2.0], [0.0, -0.0, 1.0]):
        with torch.no_grad():
            model[0].weight.copy_(torch.tensor(values)[torch.randint(len(values), (16, 16))])
        x = torch.randn(3, 16, dtype=dtype, requires_grad=True)
        actual = run(call, dict(model.named_parameters()), [x])
        assert_same(actual, dense(model, x, scheme), TOLERANCE[dtype])
        kept = sp.mask24(model[0].weight, mask)
        assert torch.equal(kept, sp.mask24(model[0].weight.abs(), mask)), "the sign decided"
        assert torch.equal(kept, sp.mask24(model[0].weight.float(), mask)), "the dtype decided"
        pruned = copy.deepcopy(model)
        sp.prune_(pruned, {"0": scheme})
        assert torch.equal(pruned[0].weight.ne(0), kept & model[0].weight.ne(0))


# The smallest and the largest numbers


SMALLEST = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
}
LARGEST_INTEGER = {torch.float64: 10_000, torch.float32: 10_000, torch.float16: 1000, torch.bfloat16: 120}


@DEVICES
@MASKS
@DTYPES
def test_mask_of_denormals(mask: str, dtype: torch.dtype, device: str) -> None:
    """Multiples of the smallest number rank as the integers do: none is taken for zero."""
    largest = LARGEST_INTEGER[dtype]
    integers = torch.randint(-largest, largest + 1, (64, 64)).to(torch.float64)
    weight = (integers * SMALLEST[dtype]).to(dtype)
    assert weight.count_nonzero() == integers.count_nonzero()
    assert torch.equal(sp.mask24(weight.to(device), mask).cpu(), sp.mask24(integers, mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_denormal_weights(dtype: torch.dtype) -> None:
    """Brought back to size by a large input."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False, dtype=dtype))
    with torch.no_grad():
        integers = torch.randint(-100, 101, (16, 16)).double()
        model[0].weight.copy_((integers * SMALLEST[dtype]).to(dtype))
    large = {torch.float32: 2.0**120, torch.float16: 2.0**10, torch.bfloat16: 2.0**110}[dtype]
    x = (torch.randn(3, 16) * large).to(dtype).requires_grad_()
    for scheme in SCHEMES.values():
        expected = dense(model, x, scheme)
        assert expected.outputs[0].count_nonzero()
        assert_same(run(compiled(model, scheme), dict(model.named_parameters()), [x]), expected, TOLERANCE[dtype])


@DEVICES
@MASKS
def test_mask_of_large_float16(mask: str, device: str) -> None:
    """Sums of magnitudes above 65504 are no infinities: scaling down changes no choice."""
    weight = torch.randint(-2047, 2048, (64, 64)).half() * 32
    assert weight.isfinite().all()
    assert weight.abs().max() > 60_000
    assert torch.equal(sp.mask24(weight.to(device), mask).cpu(), sp.mask24(weight.double() / 1024, mask))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_large_float16(scheme: str) -> None:
    """Sums that leave the range are infinities where those of the dense matmul are."""
    model = nn.Sequential(nn.Linear(16, 16)).half()
    with torch.no_grad():
        model[0].weight.copy_(torch.randint(-2047, 2048, (16, 16)) * 32)
    for size in (0.01, 10.0):
        x = (torch.randn(5, 16) * size).half().requires_grad_()
        actual = run(compiled(model, SCHEMES[scheme]), dict(model.named_parameters()), [x])
        assert_same(actual, dense(model, x, SCHEMES[scheme]), TOLERANCE[torch.float16])
        assert actual.outputs[0].isinf().any() == (size > 1)


@pytest.mark.parametrize("scheme", SCHEMES)
@INNERS
def test_weights_outside_of_the_range_of_autocast(scheme: str, inner: str) -> None:
    """Infinities after the cast to float16; the mask was chosen on the float32 weight before."""
    model = nn.Sequential(nn.Linear(16, 16))
    with torch.no_grad():
        model[0].weight.mul_(1e5)
        model[0].weight[:, ::3].mul_(100)
    assert model[0].weight.half().isinf().any()
    x = torch.rand(5, 16, requires_grad=True)

    def half() -> torch.autocast:
        return torch.autocast("cpu", torch.float16)

    actual = run(compiled(model, SCHEMES[scheme], inner), dict(model.named_parameters()), [x], context=half)
    assert_same(actual, dense(model, x, SCHEMES[scheme], context=half), TOLERANCE[torch.float16])
    assert not actual.outputs[0].isfinite().all()


@DEVICES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_of_the_largest_numbers(dtype: torch.dtype, device: str) -> None:
    """Their sums are infinite, so that the best mask is not known, but two of four are kept."""
    weight = (torch.rand(64, 64).double() * torch.finfo(dtype).max).to(dtype).to(device)
    kept = sp.mask24(weight)
    assert kept.view(-1, 4).sum(1).eq(2).all()
    assert kept.T.reshape(-1, 4).sum(1).eq(2).all()


# The same bits


@pytest.fixture
def deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def same_bits(one: Result, two: Result) -> bool:
    pairs = [*zip(one.outputs, two.outputs, strict=True), *((v, two.gradients[k]) for k, v in one.gradients.items())]
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend", ["auto", "cusparselt"])
@INNERS
def test_same_bits_in_every_call_and_compilation(backend: str, inner: str) -> None:
    scheme = sp.WeightSparsity(backend=backend, grad_weight="masked", decay=0.1)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).bfloat16()
    x = torch.randn(6, 64).bfloat16().requires_grad_()
    results = []
    for _ in range(2):
        torch._dynamo.reset()
        call = compiled(model, scheme, inner)
        results += [run(call, dict(model.named_parameters()), [x]) for _ in range(3)]
    assert all(same_bits(results[0], other) for other in results[1:])
    assert not results[0].outputs[0].eq(0).all()


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("scheme", [W24, sp.WeightSparsity(mask="greedy", grad_weight="masked", decay=0.1)], ids=str)
@INNERS
def test_deterministic_mode(scheme: sp.WeightSparsity, inner: str) -> None:
    """No op of a rewritten graph is refused, and the result is that without the mode."""
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    x = torch.randn(6, 16, requires_grad=True)
    result = run(compiled(model, scheme, inner), dict(model.named_parameters()), [x])
    assert_same(result, dense(model, x, scheme), TOLERANCE[torch.float32])
    torch._dynamo.reset()
    assert same_bits(result, run(compiled(model, scheme, inner), dict(model.named_parameters()), [x]))


@DEVICES
@MASKS
@DTYPES
@pytest.mark.usefixtures("deterministic")
def test_masks_in_deterministic_mode(mask: str, dtype: torch.dtype, device: str) -> None:
    weight = torch.randn(64, 64).to(dtype)
    assert torch.equal(sp.mask24(weight.to(device), mask).cpu(), sp.mask24(weight, mask))
