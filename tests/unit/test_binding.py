"""The binding of cuSPARSELt on a library that is not there: results, plans, and what a failing call costs.

Numerics and speed of the real library are tested on GPUs (gpu/test_kernels.py).
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_cusparselt import EXECUTION_FAILED, NOT_SUPPORTED, FakeCusparselt
from support import TOLERANCE, relative_error
from torch import Tensor

from sparse_pass.kernels import cusparselt, memory, recent, timings
from sparse_pass.kernels.problem import Problem
from sparse_pass.kernels.timings import Timing
from sparse_pass.ops import cuda
from sparse_pass.ops.reference import products
from sparse_pass.ops.reference import weights as reference
from sparse_pass.vocabulary import FORMS, PRODUCTS, Form

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the library itself is there")

M, K, N = 16, 128, 64


class Case:
    """One product, by the binding and dense."""

    def __init__(self, rows: int = M, *, bias: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
        self.weight = torch.randn(N, K).to(dtype)
        self.input = torch.randn(rows, K).to(dtype)
        self.bias = torch.randn(N).to(dtype) if bias else None
        self.packed = reference.sparsify(self.weight, "optimal", dtype)[0]

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, int]:
        return "linear", self.input, self.packed, N, self.bias

    def is_right(self, output: Tensor) -> bool:
        expected = products.product(*self.operands)
        return relative_error(output, expected) < TOLERANCE[self.weight.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_linear(library: FakeCusparselt, bias: bool, dtype: torch.dtype) -> None:
    case = Case(bias=bias, dtype=dtype)
    assert case.is_right(cusparselt.product(*case.operands))
    output = torch.empty(M, N, dtype=dtype)
    assert cusparselt.product(*case.operands, output) is output
    assert case.is_right(output)


@pytest.mark.parametrize("rows", [0, 1, 8, 13])
@pytest.mark.parametrize("tuned", [True, False])
def test_any_number_of_rows(library: FakeCusparselt, tuner: SimpleNamespace, rows: int, tuned: bool) -> None:
    """The library takes multiples of 8."""
    case = Case(rows)
    assert case.is_right(cuda.product(*case.operands, tuned))


def test_operands_between_two_steps_of_16_bytes(library: FakeCusparselt) -> None:
    case = Case()
    for name, tensor in (("input", case.input), ("packed", case.packed), ("bias", case.bias)):
        shifted = torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
        setattr(case, name, shifted)
    assert case.input.data_ptr() % 16
    assert case.is_right(cusparselt.product(*case.operands))


def test_one_plan_serves_calls_of_one_shape(library: FakeCusparselt) -> None:
    """With the bias of each call, not of the first."""
    for _ in range(3):
        case = Case()
        assert case.is_right(cusparselt.product(*case.operands))
    assert library.calls["MatmulPlanInit"] == 1
    assert library.calls["Init"] == 1
    case = Case(bias=False)
    assert case.is_right(cusparselt.product(*case.operands))
    assert library.calls["MatmulPlanInit"] == 2


def test_plans_are_limited_in_number(library: FakeCusparselt, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with dynamic shapes; the oldest go, and what the library holds for them."""
    monkeypatch.setattr(recent, "LIMIT", 2)
    for rows in (8, 16, 24, 32):
        case = Case(rows)
        assert case.is_right(cusparselt.product(*case.operands))
    gc.collect()
    assert len(cusparselt._PLANS) == 2
    assert library.calls["MatmulPlanDestroy"] == 2


@pytest.mark.parametrize("cols", [64, 128, 192, 256, 512])
def test_memory_past_the_end_of_a_packed_matrix(
    library: FakeCusparselt, monkeypatch: pytest.MonkeyPatch, cols: int
) -> None:
    """The library may read it where the last tile is not whole: it belongs to the matrix, of whatever origin."""
    monkeypatch.setattr(memory, "_empty_strided_cuda", cusparselt._empty_strided_cuda)
    weight, x = torch.randn(N, cols).bfloat16(), torch.randn(M, cols).bfloat16()
    exact = reference.sparsify(weight, "optimal", torch.bfloat16)[0]
    roomy = memory.empty_packed(N, cols).view(torch.bfloat16).copy_(exact)
    assert roomy.shape == exact.shape
    seen = []

    def matmul(handle: int, plan: int, alpha: int, packed: int, *rest: object) -> int:
        seen.append(packed)
        return 0

    monkeypatch.setattr(library, "Matmul", matmul, raising=False)
    for packed in (exact, roomy, memory.with_room(exact)):
        cusparselt.product("linear", x, packed, N)
    copied = cols % 256 != 0
    assert (seen[0] != exact.data_ptr()) == copied
    assert seen[1] == roomy.data_ptr()
    if copied:
        behind = roomy.untyped_storage().nbytes() - roomy.nbytes
        assert behind == memory.with_room(exact).untyped_storage().nbytes() - exact.nbytes == memory.ROOM
        assert torch.equal(memory.with_room(exact), exact)
        assert memory.with_room(roomy[8:]).data_ptr() == roomy[8:].data_ptr()
        assert memory.with_room(roomy) is roomy
        tail = torch.zeros(exact.numel() + memory.ROOM // 2, dtype=torch.bfloat16)[memory.ROOM // 2 :]
        assert memory.with_room(tail).data_ptr() != tail.data_ptr()


# What fails


@pytest.mark.parametrize("failing", ["DenseDescriptorInit", "MatmulAlgSelectionInit", "MatmulGetWorkspace"])
def test_plan_that_cannot_be_built(library: FakeCusparselt, failing: str) -> None:
    """One sentence with the call, the status and the shapes; nothing stays behind; the next call may succeed."""
    case = Case()
    library.statuses[failing] = NOT_SUPPORTED
    with pytest.raises(RuntimeError) as failure:
        cusparselt.product(*case.operands)
    for part in (f"cusparseLt{failing}", "status 10 (CUSPARSE_STATUS_NOT_SUPPORTED)", f"[{N}, {K}] x [{K}, {M}]"):
        assert part in str(failure.value)
    del failure
    gc.collect()
    assert library.alive == {}
    library.statuses.clear()
    assert case.is_right(cusparselt.product(*case.operands))


def test_launch_that_fails(library: FakeCusparselt) -> None:
    """The plan is not lost: the next call is right."""
    case = Case()
    assert case.is_right(cusparselt.product(*case.operands))
    library.statuses["Matmul"] = EXECUTION_FAILED
    other = Case()
    with pytest.raises(RuntimeError, match=rf"cusparseLtMatmul returned status 6 .* for linear: 2:4 \[{N}, {K}\]"):
        cusparselt.product(*other.operands)
    library.statuses.clear()
    assert other.is_right(cusparselt.product(*other.operands))
    assert case.is_right(cusparselt.product(*case.operands))


def test_bias_that_cannot_be_set(library: FakeCusparselt) -> None:
    """The next call does not take the bias of the one before."""
    case, other = Case(), Case()
    assert case.is_right(cusparselt.product(*case.operands))
    library.statuses["MatmulDescSetAttribute"] = EXECUTION_FAILED
    with pytest.raises(RuntimeError, match="cusparseLtMatmulDescSetAttribute returned status 6"):
        cusparselt.product(*other.operands)
    library.statuses.clear()
    assert other.is_right(cusparselt.product(*other.operands))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "linear"])
def test_products_of_every_form(library: FakeCusparselt, form: Form) -> None:
    rows, inner, cols = 64, 128, 24
    kept = torch.randn(rows, inner).bfloat16()
    packed = reference.sparsify(kept, "optimal", kept.dtype)[0]
    kept = kept * reference.mask24(kept, "optimal")
    dense = torch.randn(*((cols, inner) if PRODUCTS[form].b_transposed else (inner, cols))).bfloat16()
    expected = kept @ (dense.T if PRODUCTS[form].b_transposed else dense)
    expected = expected.T if PRODUCTS[form].d_transposed else expected
    output = cusparselt.product(form, dense, packed, rows)
    assert output.is_contiguous()
    assert relative_error(output, expected) < TOLERANCE[torch.bfloat16]


def test_out_of_memory_in_the_workspace(library: FakeCusparselt, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own error, which says how much was asked for; nothing was launched, and the next call is right."""
    case = Case()
    empty = cusparselt._empty_strided_cuda

    def fails(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if dtype == torch.uint8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 bytes")
        return empty(size, stride, dtype)

    monkeypatch.setattr(cusparselt, "_empty_strided_cuda", fails)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        cusparselt.product(*case.operands)
    assert library.calls["Matmul"] == 0
    monkeypatch.setattr(cusparselt, "_empty_strided_cuda", empty)
    assert case.is_right(cusparselt.product(*case.operands))


def test_default_algorithm_that_is_refused(library: FakeCusparselt) -> None:
    """Then the library's own default computes the same."""
    library.refused = set(range(1, 21))
    case = Case()
    assert case.is_right(cusparselt.product(*case.operands))
    (plan,) = cusparselt._PLANS.values()
    assert plan.algorithm == 0


@pytest.mark.parametrize("version", [(0, 7, 1), (0, 9, 0)])
def test_ids_of_another_version_are_not_guessed(library: FakeCusparselt, version: tuple[int, int, int]) -> None:
    library.version = version
    case = Case()
    assert case.is_right(cusparselt.product(*case.operands))
    (plan,) = cusparselt._PLANS.values()
    assert plan.algorithm == 0


# The tuner


@pytest.fixture
def tuner(library: FakeCusparselt, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """The tuner with a race that answers at once: `winner`, an id or an error; `races`, for how many rows."""
    from sparse_pass.kernels import measure, tuner

    state = SimpleNamespace(winner=12, races=[])

    def race(problem: Problem, candidates: tuple[int, ...]) -> Timing:
        state.races.append(problem.m)
        if isinstance(state.winner, Exception):
            raise type(state.winner)(*state.winner.args)
        return Timing(state.winner, 10.0, 20.0)

    monkeypatch.setattr(measure, "_race", race)
    monkeypatch.setattr(tuner, "_CHOSEN", {})
    monkeypatch.setattr(timings, "_KNOWN", {})
    monkeypatch.setattr(timings, "path", lambda device: tmp_path / "gpu.json")
    state.product = tuner.product
    return state


def algorithms() -> set[int]:
    return {plan.algorithm for plan in cusparselt._PLANS.values()}


def test_what_was_measured_is_used_and_remembered(tuner: SimpleNamespace) -> None:
    for _ in range(3):
        case = Case()
        assert case.is_right(tuner.product(*case.operands))
    assert algorithms() == {12}
    assert tuner.races == [64]
    timings._KNOWN.clear()  # as in another process
    tuner.product(*Case(rows=64).operands)
    assert tuner.races == [64]


def test_rows_that_change_measure_a_few_times(tuner: SimpleNamespace) -> None:
    for rows in (8, 56, 64, 72, 96, 104, 128, 136, 200, 256):
        case = Case(rows)
        assert case.is_right(tuner.product(*case.operands))
    assert tuner.races == [64, 96, 128, 192, 256]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("cusparseLtMatmul returned status 6")]
)
def test_measurement_that_fails(tuner: SimpleNamespace, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on with the default algorithm, and the log has the reason."""
    tuner.winner = error
    case = Case()
    assert case.is_right(tuner.product(*case.operands))
    assert f"could not be measured ({error}): the default algorithm is used" in caplog.text


def test_measured_algorithm_that_is_refused(
    tuner: SimpleNamespace, library: FakeCusparselt, caplog: pytest.LogCaptureFixture
) -> None:
    library.refused = {12}
    case = Case()
    assert case.is_right(tuner.product(*case.operands))
    assert "CUSPARSE_STATUS_NOT_SUPPORTED" in caplog.text
    assert "the default algorithm is used" in caplog.text


def test_library_that_refuses_all(tuner: SimpleNamespace, library: FakeCusparselt) -> None:
    tuner.winner = RuntimeError("not measured")
    library.statuses["MatmulPlanInit"] = NOT_SUPPORTED
    with pytest.raises(RuntimeError, match="cusparseLtMatmulPlanInit returned status 10"):
        tuner.product(*Case().operands)


def test_id_in_the_cache_that_is_not_tried_here(tuner: SimpleNamespace) -> None:
    """Of an older file, or edited: it may do anything, so the shape is measured again."""
    tuner.winner = 19
    tuner.product(*Case(rows=64).operands)
    tuner.winner = 12
    timings._KNOWN.clear()
    case = Case(rows=64)
    sys.modules["sparse_pass.kernels.tuner"]._CHOSEN.clear()
    assert case.is_right(tuner.product(*case.operands))
    assert tuner.races == [64, 64]
