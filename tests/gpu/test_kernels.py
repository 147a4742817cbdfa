"""The kernels on a GPU: sparsify against the reference bit for bit, the matmul against float64, and where they run."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from support import assert_same_packed, in_threads
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_pass import vocabulary
from sparse_pass.kernels import backends, cusparselt, probe, torch_cslt
from sparse_pass.kernels.problem import Problem
from sparse_pass.ops import definitions as ops
from sparse_pass.ops.reference import weights as reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

sparse = torch.ops.sparse_pass

DTYPES = [torch.bfloat16, torch.float16]
# Error against float64 over that of torch's dense matmul of the same dtype on the masked weight.
MAX_ERROR_RATIO = 1.5
# Relative difference of two runs: the order of additions may differ.
SAME = 5e-3


def sparsify_kernels():
    """Triton is not everywhere where this file is collected."""
    from sparse_pass.kernels import sparsify

    return sparsify


# Inputs


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def special(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """NaN, infinities, ties, zeros of both signs and denormals among normal values."""
    weight = torch.randn(rows, cols, device="cuda")
    weight[3] = float("inf")
    weight[8:11, 8:12] = float("nan")
    weight[16:18, 1] = -float("inf")
    weight[20:24, 20:24] = 0
    weight[40:44] *= 1e-6 if dtype is torch.float16 else 1e-39
    weight[44:52] = weight[44:52].round()
    weight[60:] = -0.0
    return weight.to(dtype)


def ties(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-2, 3, (rows, cols), device="cuda").to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def assert_as_exact_as_dense(output: Tensor, x: Tensor, masked: Tensor, bias: Tensor | None, about: object) -> None:
    """output = x masked^T + bias, with an error against float64 like that of the dense matmul."""
    assert (output.shape, output.dtype) == ((x.shape[0], masked.shape[0]), x.dtype), about
    assert output.is_contiguous(), about
    expected = F.linear(x.double(), masked.double(), None if bias is None else bias.double())
    dense = relative_error(F.linear(x, masked, bias), expected)
    error = relative_error(output, expected)
    assert error <= MAX_ERROR_RATIO * dense, f"{about}: error {error:.2e}, dense {dense:.2e}"


def linear_case(n: int, k: int, dtype: torch.dtype, mask: str = "optimal") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """masked weight, packed, packed_t, bias."""
    weight = normal(n, k, dtype=dtype)
    packed, packed_t = sparse.sparsify(weight, mask)
    return weight * ops.mask24(weight, mask), packed, packed_t, normal(n, dtype=dtype)


# Sparsify


def test_the_layout_of_this_device():
    found = probe.backend(torch.device("cuda"), torch.bfloat16)
    if torch.cuda.get_device_capability() == (9, 0):
        assert found is backends.SM90, found
    else:
        assert found in backends.BACKENDS, found


@pytest.mark.parametrize("mask", vocabulary.MASKS)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_sparsify_is_the_reference(source, target, mask):
    kernels = sparsify_kernels()
    for kind in (normal, special, ties):
        for rows, cols in ((64, 64), (64, 192), (320, 128), (512, 1024)):
            weight = kind(rows, cols, dtype=source)
            about = (kind.__name__, rows, cols, source, target, mask)
            kept = kernels.mask24(weight, mask)
            assert torch.equal(kept.cpu(), reference.mask24(weight.cpu(), mask)), about
            expected = reference.sparsify(weight.cpu(), mask, target)
            for actual, one in zip(kernels.sparsify(weight, mask, target), expected, strict=True):
                assert_same_packed(actual.cpu(), one, about)


@pytest.mark.parametrize("mask", vocabulary.MASKS)
def test_sparsify_takes_any_strides(mask):
    kernels = sparsify_kernels()
    weight = normal(192, 128, dtype=torch.bfloat16)
    expected = reference.sparsify(weight, mask, torch.bfloat16)
    wide = normal(192, 256, dtype=torch.bfloat16)
    wide[:, ::2] = weight
    offset = normal(192, 131, dtype=torch.bfloat16)
    offset[:, 3:] = weight
    for same in (weight.T.contiguous().T, wide[:, ::2], offset[:, 3:]):
        for actual, one in zip(kernels.sparsify(same, mask, torch.bfloat16), expected, strict=True):
            assert_same_packed(actual, one, (same.stride(), mask))
        assert torch.equal(kernels.mask24(same, mask), reference.mask24(weight, mask))


@pytest.mark.parametrize("mask", vocabulary.MASKS)
def test_mask24_of_shapes_that_are_no_blocks(mask):
    for rows, cols in ((4, 4), (20, 132), (68, 64), (1000, 36)):
        for dtype in (torch.float32, torch.float64):
            weight = torch.randn(rows, cols, device="cuda", dtype=dtype)
            assert torch.equal(ops.mask24(weight, mask).cpu(), reference.mask24(weight.cpu(), mask)), (
                rows,
                cols,
                dtype,
            )


def test_sparsify_of_a_large_weight():
    weight = normal(14336, 4096, dtype=torch.bfloat16)
    expected = reference.sparsify(weight, "optimal", torch.bfloat16)
    for actual, one in zip(sparse.sparsify(weight, "optimal"), expected, strict=True):
        assert_same_packed(actual, one, "[14336, 4096]")


def test_sparsify_of_float64_compares_in_float64():
    weight = torch.randn(64, 128, device="cuda", dtype=torch.float64)
    weight[::2] = weight[1::2] * (1 + 1e-12)
    expected = reference.sparsify(weight.cpu(), "optimal", torch.bfloat16)
    for actual, one in zip(sparse.sparsify(weight, "optimal", dtype=torch.bfloat16), expected, strict=True):
        assert_same_packed(actual.cpu(), one, "float64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_is_what_the_library_compresses(dtype):
    if probe.backend(torch.device("cuda"), dtype) is not backends.SM90:
        pytest.skip("another layout")
    weight = normal(320, 192, dtype=dtype)
    assert (weight != 0).all()
    masked = weight * ops.mask24(weight)
    for actual, dense in zip(sparse.sparsify(weight, "optimal"), (masked, masked.T), strict=True):
        assert_same_packed(actual, torch_cslt.compress(dense), dtype)


def test_greedy_is_that_of_torch_core():
    # Sixteen different magnitudes in each tile, exact in bfloat16: then the order of ties does not matter.
    ranks = torch.rand(64 * 32, 16, device="cuda").argsort(1) + 1.0
    signs = torch.randint(0, 2, ranks.shape, device="cuda") * 2 - 1
    weight = (ranks * signs).view(64, 32, 4, 4).permute(0, 2, 1, 3).reshape(256, 128).bfloat16()
    *_, threads_masks = torch._sparse_semi_structured_tile(
        weight, algorithm="largest_abs_values_greedy", use_cutlass=True
    )
    expected = torch._sparse_semi_structured_apply_dense(weight, threads_masks) != 0
    assert torch.equal(ops.mask24(weight, "greedy"), expected)


# The matmul


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", vocabulary.MASKS)
def test_linear_is_as_exact_as_dense(dtype, mask):
    for n, k in ((64, 64), (320, 192), (1024, 512)):
        masked, packed, packed_t, bias = linear_case(n, k, dtype, mask)
        for rows in (1, 7, 8, 100, 1024):
            x, grad = normal(rows, k, dtype=dtype), normal(rows, n, dtype=dtype)
            for b in (None, bias):
                about = (rows, n, k, dtype, mask, "bias" if b is not None else "no bias")
                assert_as_exact_as_dense(sparse.linear(x, packed, b, n), x, masked, b, about)
            about = (rows, n, k, dtype, mask, "grad_input")
            assert_as_exact_as_dense(sparse.linear(grad, packed_t, None, k), grad, masked.T, None, about)
        assert sparse.linear(normal(0, k, dtype=dtype), packed, bias, n).shape == (0, n)


def test_linear_takes_any_strides_and_alignment():
    masked, packed, _, bias = linear_case(128, 192, torch.bfloat16)
    x = normal(40, 192, dtype=torch.bfloat16)
    wide = normal(40, 384, dtype=torch.bfloat16)
    wide[:, ::2] = x
    flat = torch.empty(40 * 192 + 1, device="cuda", dtype=torch.bfloat16)
    shifted = flat[1:].view(40, 192).copy_(x)
    assert shifted.data_ptr() % 16
    views = {"transposed": x.T.contiguous().T, "every second": wide[:, ::2], "misaligned": shifted}
    for name, same in views.items():
        assert_as_exact_as_dense(sparse.linear(same, packed, bias, 128), x, masked, bias, name)
    row = x[:1].expand(16, -1)
    assert_as_exact_as_dense(sparse.linear(row, packed, bias, 128), row, masked, bias, "expanded")
    shifted_bias = torch.cat([bias[:1], bias])[1:]
    shifted_packed = torch.cat([packed[:1], packed])[1:]
    output = sparse.linear(x, shifted_packed, shifted_bias, 128)
    assert_as_exact_as_dense(output, x, masked, bias, "misaligned packed and bias")


def test_every_algorithm_is_right():
    """One that is not would be an upstream bug (pytorch#155333 on A100); here it names the ids."""
    if probe.backend(torch.device("cuda"), torch.bfloat16) is not backends.SM90:
        pytest.skip("another layout")
    masked, packed, _, bias = linear_case(512, 256, torch.bfloat16)
    x = normal(1024, 256, dtype=torch.bfloat16)
    problem = Problem(torch.cuda.current_device(), torch.bfloat16, 1024, 512, 256, True)
    count = cusparselt.Plan(problem, 0, bias).algorithms
    assert count > 1
    expected = F.linear(x.double(), masked.double(), bias.double())
    errors, refused = {}, {}
    for algorithm in range(count):
        try:
            errors[algorithm] = relative_error(cusparselt.Plan(problem, algorithm, bias)(x, packed, bias), expected)
        except RuntimeError as error:
            refused[algorithm] = str(error)
    assert 0 in errors, refused
    assert all(str(problem) in message for message in refused.values()), refused
    assert {a: e for a, e in errors.items() if not e < 5e-3} == {}


def test_a_wrong_algorithm_and_a_wrong_shape_are_refused_with_the_shapes():
    problem = Problem(torch.cuda.current_device(), torch.bfloat16, 64, 64, 64, False)
    with pytest.raises(RuntimeError, match=r"2:4 \[64, 64\] x \[64, 64\] .*algorithm 1000"):
        cusparselt.Plan(problem, 1000, None)
    with pytest.raises(RuntimeError, match=r"2:4 \[65, 64\]"):
        cusparselt.Plan(problem._replace(n=65), 0, None)


def test_one_plan_serves_every_bias():
    if probe.backend(torch.device("cuda"), torch.bfloat16) is not backends.SM90:
        pytest.skip("another layout")
    masked, packed, _, bias = linear_case(192, 64, torch.bfloat16)
    x = normal(72, 64, dtype=torch.bfloat16)
    before = len(cusparselt._PLANS)
    for scale in (1.0, -2.0, 100.0):
        b = bias * scale
        assert_as_exact_as_dense(sparse.linear(x, packed, b, 192), x, masked, b, f"bias times {scale}")
    assert len(cusparselt._PLANS) == before + 1


# Where it runs


def test_on_the_autograd_thread():
    masked, packed, packed_t, bias = linear_case(128, 64, torch.bfloat16)
    threads = []

    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return sparse.linear(x, packed, bias, 128)

        @staticmethod
        def backward(ctx, grad):
            threads.append(threading.get_ident())
            return sparse.linear(grad, packed_t, None, 64)

    x = normal(48, 64, dtype=torch.bfloat16).requires_grad_()
    grad = normal(48, 128, dtype=torch.bfloat16)
    Linear.apply(x).backward(grad)
    assert threads != [threading.get_ident()]
    assert_as_exact_as_dense(x.grad, grad, masked.T, None, "grad_input")


def test_on_another_stream():
    masked, packed, _, bias = linear_case(1024, 1024, torch.bfloat16)
    x = normal(2048, 1024, dtype=torch.bfloat16)
    sparse.linear(x, packed, bias, 1024)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # what is launched on a wrong stream is done before the input is there
        late = x * 2
        output = sparse.linear(late, packed, bias, 1024)
    torch.cuda.current_stream().wait_stream(stream)
    assert_as_exact_as_dense(output, x * 2, masked, bias, "side stream")


def test_threads_share_a_plan():
    _, packed, _, bias = linear_case(256, 128, torch.bfloat16)
    x = normal(64, 128, dtype=torch.bfloat16)
    biases = [bias * (i + 1) for i in range(4)]
    expected = [sparse.linear(x, packed, b, 256) for b in biases]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(200):
                output = sparse.linear(x, packed, biases[number], 256)
                torch.cuda.current_stream().synchronize()
                if relative_error(output, expected[number].double()) > SAME:
                    wrong.append(number)

    in_threads(work, range(4))
    assert wrong == []


@pytest.mark.parametrize("rows", [64, 61])
def test_in_a_cuda_graph(rows):
    weight = normal(256, 128, dtype=torch.bfloat16)
    x, bias = normal(rows, 128, dtype=torch.bfloat16), normal(256, dtype=torch.bfloat16)

    def step() -> tuple[Tensor, Tensor]:
        packed, packed_t = sparse.sparsify(weight, "optimal")
        hidden = sparse.linear(x, packed, bias, 256)
        return hidden, sparse.linear(hidden, packed_t, None, 128)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for _ in range(2):
        weight.normal_()
        x.normal_()
        bias.normal_()
        graph.replay()
        for actual, expected in zip(outputs, step(), strict=True):
            assert relative_error(actual, expected.double()) < SAME


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_on_a_device_that_is_not_current():
    assert torch.cuda.current_device() == 0
    weight = torch.randn(128, 64, device="cuda:1", dtype=torch.bfloat16)
    x = torch.randn(9, 64, device="cuda:1", dtype=torch.bfloat16)
    packed, _ = sparse.sparsify(weight, "optimal")
    output = sparse.linear(x, packed, None, 128)
    assert output.device == weight.device == packed.device
    assert_as_exact_as_dense(output, x, weight * ops.mask24(weight), None, "cuda:1")
    assert torch.cuda.current_device() == 0


# The compiler, and devices that cannot


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    weight = normal(64, 128, dtype=dtype)
    packed, _ = sparse.sparsify(weight, "optimal")
    torch.library.opcheck(sparse.mask24.default, (weight, "optimal"))
    torch.library.opcheck(sparse.sparsify.default, (weight, "greedy"))
    torch.library.opcheck(sparse.sparsify.default, (weight.float().T, "optimal"), {"dtype": dtype})
    for rows in (0, 5, 16):
        x = normal(rows, 128, dtype=dtype)
        torch.library.opcheck(sparse.linear.default, (x, packed, None, 64))
        torch.library.opcheck(sparse.linear.default, (x, packed, normal(64, dtype=dtype), 64))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode):
    def step(x, weight, bias):
        packed, packed_t = sparse.sparsify(weight, "optimal", dtype=torch.bfloat16)
        hidden = torch.nn.functional.gelu(sparse.linear(x.sin(), packed, bias, 256))
        return sparse.linear(hidden, packed_t, None, 128)

    torch._dynamo.reset()
    weight, bias = normal(256, 128), normal(256, dtype=torch.bfloat16)
    compiled = torch.compile(step, mode=mode, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            x = normal(72, 128, dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x, weight, bias), step(x, weight, bias), rtol=2e-2, atol=2e-2)


def test_the_probe_leaves_no_trace():
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    with FakeTensorMode(), torch.autocast("cuda", dtype=torch.bfloat16):
        found = probe._backend.__wrapped__(torch.cuda.current_device(), torch.float16)
    assert found in backends.BACKENDS, found
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
    assert probe.availability(torch.device("cuda"), torch.float16) == ""
    assert "float32" in probe.availability(torch.device("cuda"), torch.float32)
    assert "meta" in probe.availability(torch.device("meta"), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_layouts_go_through_torch(dtype, monkeypatch):
    monkeypatch.setattr(probe, "backend", lambda *_: backends.COMPRESS)
    for source in (dtype, torch.float32):
        weight = normal(128, 192, dtype=source)
        packed, packed_t = sparse.sparsify(weight, "optimal", dtype=dtype)
        masked, bias = (weight * ops.mask24(weight)).to(dtype), normal(128, dtype=dtype)
        x, grad = normal(20, 192, dtype=dtype), normal(20, 128, dtype=dtype)
        assert_as_exact_as_dense(sparse.linear(x, packed, bias, 128), x, masked, bias, "output")
        assert_as_exact_as_dense(sparse.linear(grad, packed_t, None, 192), grad, masked.T, None, "grad_input")


def test_a_device_without_kernels_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    reason = probe._backend.__wrapped__(0, torch.bfloat16)
    assert "SM 7.5" in reason
    monkeypatch.setattr(probe, "backend", lambda *_: reason)
    with pytest.raises(RuntimeError, match=r"SM 7\.5.*masked dense"):
        sparse.sparsify(normal(64, 64, dtype=torch.bfloat16), "optimal")
