"""The operators on CUDA devices: which kernels they call with what, and that the numbers are those of a CPU.

The kernels are fakes that compute the references; the kernels themselves are tested on GPUs (gpu/test_kernels.py) and
in Triton's interpreter (test_interpreter.py).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cusparselt import FakeCusparselt
from fake_gpu import OWN, Devices, install_kernels
from support import TOLERANCE, relative_error
from torch import Tensor

from sparse_pass import vocabulary
from sparse_pass.kernels import backends, measure, probe
from sparse_pass.kernels.backends import Backend
from sparse_pass.kernels.timings import Timing
from sparse_pass.ops import cuda
from sparse_pass.ops import definitions as ops
from sparse_pass.ops.reference import weights as reference
from sparse_pass.vocabulary import Layout

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the device itself is there")

BFLOAT16 = torch.bfloat16
SEED = torch.tensor([7])
N, K = 128, 256

LAYOUTS: dict[str, Layout] = {"sm80": "sm80", "cutlass": "cutlass", "library": "cutlass"}
"""What devices read whose backend is this; others read "sm90"."""
BY_TORCH = {"cutlass": "_sparse_semi_structured", "compress": "_cslt_sparse_mm"}
"""The functions that multiply, where the binding does not."""
DENSE = {"sparsify_mvue": "mvue24", "sparsify_mvue_sum": "mvue24_sum"}
"""The kernel that makes what a library packs, where it has another name than the operator."""


@dataclass
class Gpu:
    """A device with one of the layouts; ``called``: its kernels, and how often."""

    backend: Backend
    called: Counter[str]
    library: FakeCusparselt

    def layout_of(self, rows: int) -> Layout:
        return self.library.layout_of(rows) if self.backend.name == "sm80" else LAYOUTS.get(self.backend.name, "sm90")

    def unpack(self, packed: Tensor, rows: int, cols: int) -> Tensor:
        return reference.unpack(packed, rows, cols, self.layout_of(rows))


@pytest.fixture(params=backends.BACKENDS, ids=lambda backend: backend.name)
def gpu(
    request: pytest.FixtureRequest, library: FakeCusparselt, monkeypatch: pytest.MonkeyPatch, tuning_folder: Path
) -> Gpu:
    monkeypatch.setattr(cuda, "backend_of", lambda device, dtype: request.param)
    monkeypatch.setattr(cuda, "_has_triton", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake")
    monkeypatch.setattr(measure, "_race", lambda problem, candidates: Timing(candidates[-1], 1.0, 2.0))
    called = install_kernels(monkeypatch)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (8, 0) if request.param.name in LAYOUTS else (9, 0)
    )
    library.layout = LAYOUTS.get(request.param.name, "sm90")
    return Gpu(request.param, called, library)


def on_cuda(name: str, *arguments: Any, **options: Any) -> Any:
    """What the dispatcher calls for tensors of a CUDA device."""
    return getattr(ops, name.upper()).cuda(*arguments, **options)


def normal(*shape: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def makers(rows: int) -> Iterator[tuple[str, tuple[Any, ...], tuple[tuple[int, int], ...]]]:
    """Operators that make operands: name, arguments, and the shapes of what they pack."""
    weight, grad, x = normal(N, K), normal(rows, N), normal(rows, K)
    yield "sparsify", (weight, "optimal"), ((N, K), (K, N))
    yield "sparsify_one", (weight, "greedy", False), ((N, K),)
    yield "sparsify_one", (weight, "greedy", True), ((K, N),)
    padded = vocabulary.padded(rows)
    yield "sparsify_mvue", (grad, SEED), ((N, padded),)
    yield "sparsify_mvue", (grad.T, SEED), ((padded, N),)
    yield "sparsify_mvue_sum", (grad, SEED), ((N, padded),)
    yield "sparsify_input", (x, None, "optimal", "relu"), ((padded, K), (K, padded))
    yield "sparsify_input", (x, normal(rows, K), "optimal", "silu_gate"), ((padded, K), (K, padded))


@pytest.mark.parametrize("rows", [0, 1, 64, 70])
def test_operands_are_those_of_the_cpu(gpu: Gpu, rows: int) -> None:
    for name, arguments, shapes in makers(rows):
        gpu.called.clear()
        gpu.library.calls.clear()
        actual = on_cuda(name, *arguments)
        expected = on_cpu(name, *arguments)
        actual, expected = ((one,) if isinstance(one, Tensor) else one for one in (actual, expected))
        for one, other, shape in zip(actual, expected, shapes, strict=False):
            assert (one.dtype, one.shape) == (other.dtype, other.shape), name
            if one.numel():
                assert torch.equal(gpu.unpack(one, *shape), reference.unpack(other, *shape)), name
        for one, other in zip(actual[len(shapes) :], expected[len(shapes) :], strict=True):  # the sums
            torch.testing.assert_close(one, other)
        if rows:
            in_part = any(size % 128 for shape in shapes for size in shape)
            by_library = gpu.backend.name == "library" or (gpu.backend.name == "sm80" and in_part)
            by_torch = gpu.backend is backends.COMPRESS
            assert gpu.library.calls["SpMMACompress2"] == (len(shapes) if by_library else 0)
            assert gpu.called["_cslt_compress"] == (len(shapes) if by_torch else 0)
            if not by_torch:
                assert gpu.called == {DENSE.get(name, name) if by_library else name: 1}


def on_cpu(name: str, *arguments: Any) -> Any:
    return getattr(torch.ops.sparse_pass, name)(*arguments)


def products(rows: int, n: int, packed_by: Callable[..., Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Operators that multiply, with operands that a device packed; the same numbers every time. n: of a dense weight or
    gradient."""
    torch.manual_seed(0)
    x, grad = normal(rows, K), normal(rows, N)
    packed = packed_by("sparsify", normal(N, K), "optimal")
    for bias in (normal(N), None):
        yield "linear", (x, packed[0], bias, N)
    yield "linear", (grad, packed[1], None, K)
    yield "grad_weight", (packed_by("sparsify_mvue", grad, SEED), normal(rows, n), N)
    yield "grad_input", (packed_by("sparsify_mvue", grad.T, SEED), normal(N, n), rows)
    masked = packed_by("sparsify_input", x, None, "optimal", "none")
    yield "input_linear", (masked[0], normal(n, K), rows)
    yield "input_grad_weight", (masked[1], normal(rows, n), K)


@pytest.mark.parametrize("tuned", [True, False])
@pytest.mark.parametrize(("rows", "n"), [(0, 8), (1, 48), (64, 48), (70, 5)])
def test_products_are_those_of_the_cpu(gpu: Gpu, rows: int, n: int, tuned: bool) -> None:
    on_both = zip(list(products(rows, n, on_cuda)), list(products(rows, n, on_cpu)), strict=True)
    for (name, arguments), (_, same) in on_both:
        gpu.library.launched.clear()
        gpu.called.clear()
        actual, expected = on_cuda(name, *arguments, tuned=tuned), on_cpu(name, *same)
        assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride()), name
        assert relative_error(actual, expected) < TOLERANCE[BFLOAT16], name
        by_library = gpu.library.launched
        by_torch = [one for one in gpu.called.elements() if one.startswith(BY_TORCH.get(gpu.backend.name, "none"))]
        assert (len(by_library), len(by_torch)) == ((0, rows > 0) if gpu.backend.name in BY_TORCH else (rows > 0, 0))
        if by_library:  # ids are known of SM90 alone
            form = "input" if name == "input_linear" else name
            ids = measure.algorithms((0, 8, 0), BFLOAT16, form, torch.cuda.get_device_capability(0))
            assert by_library == [ids[-1 if tuned else 0]], name


def test_operands_in_any_strides(gpu: Gpu) -> None:
    x, weight, grad = normal(16, K), normal(N, K), normal(16, N)
    packed = on_cuda("sparsify", weight, "optimal")
    expected = on_cuda("linear", x, packed[0], None, N)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    for same in (x.T.contiguous().T, shifted):
        assert torch.equal(on_cuda("linear", same, packed[0], None, N), expected)
    assert all(map(torch.equal, on_cuda("sparsify", weight.T.contiguous().T, "optimal"), packed))
    estimate = on_cuda("sparsify_mvue", grad, SEED)
    expected = on_cuda("grad_weight", estimate, x, N)
    assert torch.equal(on_cuda("grad_weight", estimate, x.T.contiguous().T, N), expected)


def test_on_a_device_that_is_not_current(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run, and allocate, where the operands are; the current device is the one before again."""
    devices = Devices(monkeypatch)
    for name, arguments in itertools.chain(((name, given) for name, given, _ in makers(70)), products(70, 16, on_cuda)):
        on_cuda(name, *arguments)
        assert devices.current == 3, name
    for name, argument in (("mask24", "optimal"), ("input_mask24", "greedy"), ("mvue24", SEED)):
        on_cuda(name, normal(64, 64), argument)
    assert devices.current == 3
    assert gpu.called["mask24"] >= 2
    assert gpu.called["mvue24"] >= 1


def test_masks_and_estimates_are_those_of_the_cpu(gpu: Gpu) -> None:
    matrix = normal(20, 36, dtype=torch.float32)
    for mask in vocabulary.MASKS:
        assert torch.equal(on_cuda("mask24", matrix, mask), reference.mask24(matrix, mask))
    assert gpu.called == {"mask24": 2}
    expected = torch.ops.sparse_pass.input_mask24(matrix[:18], "optimal")
    assert torch.equal(on_cuda("input_mask24", matrix[:18], "optimal"), expected)
    assert gpu.called == {"mask24": 3}
    grad = normal(20, 36)
    assert torch.equal(on_cuda("mvue24", grad, SEED), torch.ops.sparse_pass.mvue24(grad, SEED))
    assert gpu.called == {"mask24": 3, "mvue24": 1}


def test_dtypes_that_the_kernels_do_not_take(gpu: Gpu) -> None:
    """float64, which is compared in float64, and gradients of 32 bits: the reference on the device."""
    weight = torch.randn(N, K, dtype=torch.float64)
    weight[::2] = weight[1::2] * (1 + 1e-12)
    assert torch.equal(on_cuda("mask24", weight, "optimal"), reference.mask24(weight, "optimal"))
    expected = reference.sparsify(weight, "optimal", BFLOAT16)
    shapes = ((N, K), (K, N))
    for actual, other, shape in zip(
        on_cuda("sparsify", weight, "optimal", dtype=BFLOAT16), expected, shapes, strict=True
    ):
        assert torch.equal(gpu.unpack(actual, *shape), reference.unpack(other, *shape))
    one = on_cuda("sparsify_one", weight, "optimal", True, dtype=BFLOAT16)
    assert torch.equal(gpu.unpack(one, K, N), reference.unpack(expected[1], K, N))
    for grad in (torch.randn(9, 8), normal(0, 8)):
        assert torch.equal(on_cuda("mvue24", grad, SEED), torch.ops.sparse_pass.mvue24(grad, SEED))
    assert gpu.called.keys() <= {"_cslt_compress"}


@pytest.mark.parametrize(
    ("triton", "capability", "used"), [(True, (8, 0), True), (True, (7, 5), False), (False, (9, 0), False)]
)
def test_masks_without_triton(
    monkeypatch: pytest.MonkeyPatch, triton: bool, capability: tuple[int, int], used: bool
) -> None:
    """Any device can mask."""
    called = install_kernels(monkeypatch)
    Devices(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: object() if triton else None)
    cuda._has_triton.cache_clear()
    weight = normal(8, 8)
    assert torch.equal(on_cuda("mask24", weight, "optimal"), reference.mask24(weight, "optimal"))
    assert called == ({"mask24": 1} if used else {})
    cuda._has_triton.cache_clear()


@pytest.mark.parametrize("found", backends.BACKENDS, ids=lambda backend: backend.name)
def test_the_backend_is_what_the_probe_finds(monkeypatch: pytest.MonkeyPatch, found: backends.Backend) -> None:
    monkeypatch.setattr(probe, "backend", lambda device, dtype: found)
    assert cuda.backend_of(torch.device("cuda"), BFLOAT16) is found


def test_a_device_without_kernels_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: OWN)
    with pytest.raises(RuntimeError, match=r"^no 2:4 kernels on cpu; use the masked dense weight"):
        on_cuda("sparsify", normal(64, 64), "optimal")


def test_checks_are_those_of_the_cpu() -> None:
    """Before anything is launched."""
    with pytest.raises(ValueError, match="multiples of 64"):
        on_cuda("sparsify", normal(20, 64), "optimal")
    with pytest.raises(ValueError, match="must be one int64"):
        on_cuda("mvue24", normal(8, 8), SEED.int())
    with pytest.raises(ValueError, match="needs a gate"):
        on_cuda("sparsify_input", normal(8, 64), None, "optimal", "silu_gate")
