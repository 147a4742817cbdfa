"""2:4 gradients and inputs on a GPU: the kernels are their references, and products are as exact as dense ones."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import assert_same_packed, assert_unbiased, bits, errors, fresh_compile, run
from torch import Tensor, nn

import sparse_pass as sp
from sparse_pass.kernels import backends, probe
from sparse_pass.kernels.problem import Problem, algorithms
from sparse_pass.ops.reference import gradients as reference_gradients
from sparse_pass.ops.reference import inputs as reference_inputs
from sparse_pass.ops.reference import weights as reference
from sparse_pass.vocabulary import FORMS, PRODUCTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

sparse = torch.ops.sparse_pass
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
INF, NAN = float("inf"), float("nan")
# Error against float64 over that of torch's dense matmul of the same dtype on the same operands.
MAX_ERROR_RATIO = 1.5


@pytest.fixture(autouse=True)
def _sm90_layout() -> None:
    if probe.backend(torch.device("cuda"), torch.bfloat16) is not backends.SM90:
        pytest.skip("another layout")


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def seed(number: int) -> Tensor:
    return torch.tensor([number], device="cuda")


def strides(matrix: Tensor) -> list[Tensor]:
    """The same matrix, its transpose contiguous, and every second column of a wider one."""
    wide = matrix.new_zeros(matrix.shape[0], 2 * matrix.shape[1])
    wide[:, ::2] = matrix
    return [matrix, matrix.T.contiguous().T, wide[:, ::2]]


# 2:4 gradients


def gradient(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """NaN, infinities, zeros of both signs, ties and denormals among numbers of all sizes."""
    grad = torch.randn(rows, cols) * torch.randn(rows, 1).exp()
    grad[0, 0], grad[1, 5], grad[2, 6] = NAN, INF, -INF
    grad[:, 7], grad[:, 9:11] = 0, -0.0
    grad[:, 20:30] = torch.randint(-2, 3, (rows, 10)).float()
    grad[:, 40:50] *= 1e-6 if dtype is torch.float16 else 1e-39
    return grad.to(dtype).cuda()


@DTYPES
def test_gradients_are_the_reference(dtype):
    torch.manual_seed(0)
    for number, (rows, cols) in enumerate(((3, 64), (64, 192), (70, 128), (1024, 320), (1000, 64))):
        grad, one = gradient(rows, cols, dtype), seed(2**40 * number + 3)
        dense = reference_gradients.mvue24(grad.cpu(), one.cpu())
        packed, sums = reference_gradients.sparsify_mvue_sum(grad.cpu(), one.cpu())
        about = (rows, cols, dtype)
        for same in strides(grad) if rows == 70 else [grad]:
            assert torch.equal(bits(sparse.mvue24(same, one).cpu()), bits(dense)), (*about, same.stride())
            assert_same_packed(sparse.sparsify_mvue(same, one).cpu(), packed, (*about, same.stride()))
        again, their_sums = sparse.sparsify_mvue_sum(grad, one)
        assert_same_packed(again.cpu(), packed, about)
        # Another order of additions, of terms that may cancel.
        scale = float(grad.float().nan_to_num(0, 0, 0).abs().max())
        torch.testing.assert_close(their_sums.cpu(), sums, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)
    for grad in (gradient(70, 51, dtype), gradient(70, 128, dtype).T):  # no multiple of 64, as of a transpose; and that
        on_cpu = grad.cpu(), one.cpu()
        assert torch.equal(bits(sparse.mvue24(grad, one).cpu()), bits(reference_gradients.mvue24(*on_cpu)))
        assert_same_packed(
            sparse.sparsify_mvue(grad, one).cpu(), reference_gradients.sparsify_mvue(*on_cpu), grad.shape
        )
    assert sparse.sparsify_mvue(grad.new_empty(0, 64), one).numel() == 0


@DTYPES
def test_unbiased_with_the_variance_of_the_closed_form(dtype):
    torch.manual_seed(1)
    grad = (torch.randn(12, 5) * torch.randn(12, 1).exp()).to(dtype)
    on_gpu, seeds = grad.cuda(), torch.arange(10_000, device="cuda").split(1)
    draws = torch.stack([sparse.mvue24(on_gpu, one) for one in seeds])
    assert_unbiased(draws.cpu().double(), grad)


# 2:4 inputs


@DTYPES
@pytest.mark.parametrize("activation", ["none", "relu", "squared_relu"])
def test_inputs_are_the_reference(activation, dtype):
    torch.manual_seed(0)
    for rows, cols in ((128, 64), (70, 192)):
        x = gradient(rows, cols, dtype)
        if activation != "none":
            x = x + 0.0  # torch's relu may keep the sign of a zero
        expected = reference_inputs.sparsify_input(x.cpu(), None, "optimal", activation)
        for same in strides(x) if (activation, rows) == ("none", 70) else [x]:
            for actual, one in zip(sparse.sparsify_input(same, None, "optimal", activation), expected, strict=True):
                assert_same_packed(actual.cpu(), one, (activation, rows, same.stride(), dtype))


def test_inputs_with_a_greedy_mask_are_the_reference():
    x = gradient(70, 192, torch.bfloat16)
    expected = reference_inputs.sparsify_input(x.cpu(), None, "greedy", "none")
    for actual, one in zip(sparse.sparsify_input(x, None, "greedy", "none"), expected, strict=True):
        assert_same_packed(actual.cpu(), one, "greedy")


@DTYPES
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu_gate"])
def test_functions_by_the_exponential_of_the_gpu(activation, dtype):
    """Their last bits differ, and masks with them where two are as good."""
    torch.manual_seed(0)
    rows, cols = 200, 192
    x, both = 3 * normal(rows, cols, dtype=dtype), normal(rows, 2 * cols, dtype=dtype)
    gate = both[:, cols:] if activation in reference_inputs.GATED else None
    packed, packed_t = (one.cpu() for one in sparse.sparsify_input(x, gate, "optimal", activation))
    kept = reference.unpack(packed, 256, cols)
    assert torch.equal(kept, reference.unpack(packed_t, cols, 256).T)
    assert not kept[rows:].any()
    y = reference_inputs.activate(x, gate, activation).cpu()
    chosen = kept[:rows] != 0
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(kept[:rows][chosen], y[chosen], rtol=2 * eps, atol=1e-6)
    magnitude = y.double().abs()
    best = (magnitude * sp.mask24(F.pad(y, (0, 0, 0, -rows % 4)))[:rows]).sum()
    assert (magnitude * chosen).sum() >= (1 - eps) * best


# Products


def assert_as_exact_as_dense(actual: Tensor, left: Tensor, right: Tensor, about: object) -> None:
    """left @ right."""
    exact = left.double() @ right.double()
    assert (actual.shape, actual.dtype) == (exact.shape, left.dtype), about
    assert actual.is_contiguous(), about
    error, dense = (float((one.double() - exact).norm() / exact.norm()) for one in (actual, left @ right))
    assert error <= MAX_ERROR_RATIO * dense, f"{about}: error {error:.2e}, dense {dense:.2e}"


@DTYPES
@pytest.mark.parametrize("tuned", [False, True], ids=["default", "tuned"])
def test_products_are_as_exact_as_dense(tuned, dtype, tuning_folder):
    for rows, n, k in ((1024, 512, 256), (70, 64, 192), (1001, 320, 128)):
        x, weight, grad = (normal(*size, dtype=dtype) for size in ((rows, k), (n, k), (rows, n)))
        masked = torch.where(sparse.input_mask24(x, "optimal"), x, 0)
        packed, packed_t = sparse.sparsify_input(x, None, "optimal", "none")
        one = seed(rows)
        about = (rows, n, k, dtype, tuned)
        output = sparse.input_linear(packed, weight, rows, tuned=tuned)
        assert_as_exact_as_dense(output, masked, weight.T, ("input_linear", *about))
        grad_weight = sparse.input_grad_weight(packed_t, grad, k, tuned=tuned)
        assert_as_exact_as_dense(grad_weight, grad.T, masked, ("input_grad_weight", *about))
        grad_weight = sparse.grad_weight(sparse.sparsify_mvue(grad, one), x, n, tuned=tuned)
        assert_as_exact_as_dense(grad_weight, sparse.mvue24(grad, one).T, x, ("grad_weight", *about))
    assert len(list(tuning_folder.glob("*.json"))) == tuned


def test_products_of_odd_sizes_and_strides():
    """N or K of a dense operand may be anything; here it is padded."""
    dtype = torch.bfloat16
    for rows, n, k in ((64, 44, 64), (70, 5, 128)):
        x, weight, grad = (normal(*size, dtype=dtype) for size in ((rows, k), (n, k), (rows, n)))
        masked = torch.where(sparse.input_mask24(x, "optimal"), x, 0)
        packed, packed_t = sparse.sparsify_input(x, None, "optimal", "none")
        for w, g in zip(strides(weight), strides(grad), strict=True):
            assert_as_exact_as_dense(sparse.input_linear(packed, w, rows), masked, weight.T, (rows, n, k))
            assert_as_exact_as_dense(sparse.input_grad_weight(packed_t, g, k), grad.T, masked, (rows, n, k))
        grad, odd = normal(rows, 64, dtype=dtype), normal(rows, n, dtype=dtype)
        drawn, estimate = sparse.sparsify_mvue(grad, seed(1)), sparse.mvue24(grad, seed(1))
        for same in strides(odd):
            assert_as_exact_as_dense(sparse.grad_weight(drawn, same, 64), estimate.T, odd, (rows, n))
        weight, estimate = normal(64, n, dtype=dtype), sparse.mvue24(grad.T, seed(1))
        for same in strides(weight):
            product = sparse.grad_input(sparse.sparsify_mvue(grad.T, seed(1)), same, rows)
            assert_as_exact_as_dense(product, estimate.T, weight, (rows, n))


@DTYPES
@pytest.mark.parametrize("form", FORMS)
def test_nothing_reads_the_old_memory_of_the_output(form, dtype):
    from sparse_pass.kernels.cusparselt import Plan
    from sparse_pass.kernels.cusparselt_library import version

    problem = Problem(torch.cuda.current_device(), dtype, 192, 256, 320, False, form)
    weight, dense = normal(problem.n, problem.k, dtype=dtype), normal(*problem.dense_shape, dtype=dtype)
    packed, _ = sparse.sparsify(weight, "optimal")
    kept = torch.where(sparse.mask24(weight, "optimal"), weight, 0).double()
    expected = kept @ (dense.double().T if PRODUCTS[form].b_transposed else dense.double())
    expected = expected.T if PRODUCTS[form].d_transposed else expected
    default = Plan(problem, 0, None)
    for algorithm in algorithms(version(), dtype, form, torch.cuda.get_device_capability()):
        if algorithm >= default.algorithms:
            continue
        try:
            plan = default if algorithm == 0 else Plan(problem, algorithm, None)
        except RuntimeError:
            continue  # ids are not promised for every shape
        for old in (NAN, INF):
            output = torch.full(problem.output_shape, old, device="cuda", dtype=dtype)
            assert plan(dense, packed, None, output) is output
            error = float((output.double() - expected).norm() / expected.norm())
            assert error < 1e-2, f"{plan} over {old}: {error}"


# End to end


W24 = sp.WeightSparsity()
MVUE = sp.WeightSparsity(grad_weight="mvue")
ACT = sp.ActivationSparsity()
CONFIGS = {
    "mvue": {"fc1": MVUE, "fc2": MVUE},
    "input": {"fc2": ACT},
    "both": {"fc1": MVUE, "fc2": (ACT, W24)},
}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(256, 512), nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)).square())


def model_and_input(rows: int = 192) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Mlp().to("cuda", torch.bfloat16), normal(rows, 256, dtype=torch.bfloat16).requires_grad_()


def dense(scheme: object) -> object:
    """The same mathematics without the kernels."""
    if isinstance(scheme, tuple):
        return tuple(map(dense, scheme))
    return replace(scheme, backend="masked_dense")


@pytest.mark.parametrize("rows", [192, 200], ids=["whole tiles", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_trains_like_masked_dense(name, rows):
    model, x = model_and_input(rows)
    found, config = [], CONFIGS[name]
    for schemes in (config, {key: dense(scheme) for key, scheme in config.items()}):
        backend = sp.sparse_backend(schemes, model=model, tune="off")
        with fresh_compile():
            compiled = torch.compile(model, backend=backend)
            torch.manual_seed(1)
            found.append(run(compiled, dict(model.named_parameters()), [x]))
        if schemes is config:
            for site in backend.report.sites:
                kernels = (site.output, site.grad_input, site.grad_weight)
                grad_input = "dense" if config[site.fqn] is ACT else "cusparselt"
                assert kernels == ("cusparselt", grad_input, "cusparselt"), str(backend.report)
                assert site.fused == ("squared_relu" if name != "mvue" and site.fqn == "fc2" else None)
                assert (site.status, site.reason) == ("sparse", "")
        else:
            assert {site.status for site in backend.report.sites} == {"masked_dense"}
    difference = errors(*found)
    # What is drawn for fc1, and which inputs fc2 keeps behind a sparse fc1, hangs on last bits, which differ: some
    # percent, where another seed or another mask makes 0.3.
    drawn = difference.pop("gradient of fc1.weight") if name != "input" else 0.0
    assert drawn < 0.1
    assert max(difference.values()) < (4e-2 if name == "both" else 2e-2), difference


def gradients(call, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Of both weights, copied out of what a CUDA graph writes over."""
    call(x).float().square().mean().backward()
    found = [model.get_submodule(name).weight.grad.clone() for name in ("fc1", "fc2")]
    model.zero_grad()
    return found


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_new_in_every_step_and_reproduced_by_the_seed(mode):
    """Also where a step is the replay of a CUDA graph."""
    model, x = model_and_input()
    x = x.detach()
    backend = sp.sparse_backend(CONFIGS["mvue"], model=model, tune="off")
    call = torch.compile(model, backend=backend, mode=mode)
    for _ in range(4):  # warms up, records
        gradients(call, model, x)
    torch.manual_seed(1)
    first, second = gradients(call, model, x), gradients(call, model, x)
    torch.manual_seed(1)
    again = gradients(call, model, x)
    for one, two, three in zip(first, second, again, strict=True):
        assert torch.equal(one, three)
        assert float((one - two).norm() / one.norm()) > 0.1


@pytest.mark.parametrize("name", CONFIGS)
def test_reduce_overhead_trains(name):
    model, x = model_and_input()
    target = x.detach()
    backend = sp.sparse_backend(CONFIGS[name], model=model, tune="off")
    call = torch.compile(model, backend=backend, mode="reduce-overhead")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = (call(target) - target).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(earlier != later for earlier, later in itertools.pairwise(losses))
