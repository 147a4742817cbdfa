"""The probe, the timings and the tuner on a faked device: what they ask of it, and what becomes of the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cusparselt import FakeCusparselt
from fake_gpu import Clock, cuda_is_the_cpu, install_kernels
from support import TOLERANCE, relative_error
from torch import Tensor

from sparse_pass.kernels import backends, cusparselt, cusparselt_library, measure, probe, progress, timings, tuner
from sparse_pass.kernels.problem import Problem
from sparse_pass.kernels.timings import Timing
from sparse_pass.ops.reference import weights as reference
from sparse_pass.vocabulary import FORMS, Form

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the device itself is there")

BFLOAT16 = torch.bfloat16
Called = Counter[str]


@pytest.fixture
def called(library: FakeCusparselt, monkeypatch: pytest.MonkeyPatch, tuning_folder: Path) -> Iterator[Called]:
    """A GPU; the kernels that it has run, and how often."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Fake GPU (1)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(probe, "_backend", probe._backend.__wrapped__)
    kernels = install_kernels(monkeypatch)
    with cuda_is_the_cpu(monkeypatch):
        yield kernels


# The probe


@pytest.mark.parametrize("dtype", [torch.float16, BFLOAT16])
def test_kernels_that_work(called: Called, library: FakeCusparselt, dtype: torch.dtype) -> None:
    """Both directions, each without a bias and with two."""
    state = torch.get_rng_state()
    assert probe.availability(torch.device("cuda"), dtype) == ""
    assert probe.backend(torch.device("cuda", 1), dtype) is backends.SM90
    assert called == {"sparsify": 12}
    assert len(library.launched) == 12
    assert torch.equal(torch.get_rng_state(), state)


def test_library_that_keeps_the_bias_of_the_plan(
    called: Called, library: FakeCusparselt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be right in the first call of a plan."""
    set_attribute = library.MatmulDescSetAttribute

    def only_once(handle: int, address: int, *what: int) -> int:
        return 0 if library._products[address].bias else set_attribute(handle, address, *what)

    monkeypatch.setattr(library, "MatmulDescSetAttribute", only_once, raising=False)
    assert probe.backend(torch.device("cuda"), BFLOAT16) is backends.COMPRESS


def test_results_that_are_no_numbers(called: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(form: Form, input: Tensor, packed: Tensor, n: int, *_: object) -> Tensor:
        return input.new_full((len(input), n), torch.nan)

    broken = tuple(replace(one, multiply=wrong) for one in (backends.SM90, backends.COMPRESS))
    monkeypatch.setattr(backends, "BACKENDS", broken)
    reason = probe.availability(torch.device("cuda"), BFLOAT16)
    assert "sm90: wrong results, relative error inf; compress: wrong results, relative error inf" in reason


# Timings


def problem(form: Form = "linear", *, bias: bool = False, rows: int = 64) -> Problem:
    """As a tensor of the faked device gives it."""
    sizes = {"linear": (rows, 64, 128), "grad_weight": (128, 64, rows), "input": (64, rows, 128)}
    return Problem(-1, BFLOAT16, *sizes.get(form, (64, 128, rows)), bias, form)


def operands(of: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """A with its zeros, A packed, and B."""
    a = torch.randn(of.n, of.k).bfloat16()
    return a * reference.mask24(a, "optimal"), reference.sparsify(a, "optimal", BFLOAT16)[0], torch.randn(
        of.dense_shape
    ).bfloat16()  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_dense_matmul_is_the_same_product(called: Called, form: Form) -> None:
    """What is compared in time must be compared for the same work."""
    kept, packed, dense = operands(problem(form))
    bias = torch.randn(64).bfloat16() if form == "linear" else None
    expected = cusparselt.Plan(problem(form, bias=bias is not None), 0, bias)(dense, packed, bias)
    actual = measure.dense_matmul(problem(form), kept, dense, bias)()
    assert relative_error(actual, expected) < TOLERANCE[BFLOAT16]


@pytest.fixture
def times(called: Called, library: FakeCusparselt, monkeypatch: pytest.MonkeyPatch) -> dict[int | str, float]:
    """Microseconds by the algorithm or the kernel that is launched, or ``"dense"``; others take 50."""
    found: dict[int | str, float] = {"dense": 25.0}

    def time(launch: Callable[[], object]) -> float:
        library.launched.clear()
        called.clear()
        launch()
        ((what, *_),) = [list(library.launched) or list(called) or ["dense"]]
        return found.get(what, 50.0)

    monkeypatch.setattr(measure, "_time", time)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_fastest_wins(times: dict[int | str, float], form: Form) -> None:
    last = measure.algorithms((0, 8, 0), BFLOAT16, form, (9, 0))[-1]
    times[last] = 10.0
    assert measure.timing_of(problem(form), measure=True) == Timing(last, 10.0, 25.0)


def test_a_bias_is_measured_with_it(times: dict[int | str, float], library: FakeCusparselt) -> None:
    times[4] = 10.0
    assert measure.timing_of(problem(bias=True), measure=True) == Timing(4, 10.0, 25.0)
    assert library.calls["MatmulDescSetAttribute"] > 0


def test_what_was_measured_is_known(
    times: dict[int | str, float], library: FakeCusparselt, caplog: pytest.LogCaptureFixture, tuning_folder: Path
) -> None:
    """To the next process too; the log says once that something is measured."""
    progress._tell_once.cache_clear()
    assert measure.timing_of(problem(), measure=False) is None
    assert not library.launched
    times[20] = 10.0
    first = measure.timing_of(problem(), measure=True)
    launches = library.calls["Matmul"]
    timings._KNOWN.clear()
    assert measure.timing_of(problem(), measure=True) == measure.timing_of(problem(), measure=False) == first
    assert library.calls["Matmul"] == launches
    assert caplog.text.count("sparse_pass measures its kernels") == 1
    files = [one.name for one in tuning_folder.glob("*.json")]
    assert files == [f"Fake_GPU_1_-cusparselt0.8.0-torch{torch.__version__}.json"]


@pytest.mark.parametrize("off", ["environment", "pluggable"])
def test_nothing_is_measured_without_torchs_own_allocator(
    off: str, times: dict[int | str, float], library: FakeCusparselt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph capture would fail in the middle; what is known already is taken."""
    known = measure.timing_of(problem(), measure=True)
    if off == "environment":
        monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    else:
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "pluggable")
    with pytest.raises(RuntimeError, match="which want torch's own caching allocator"):
        measure.timing_of(problem(bias=True), measure=True)
    assert measure.timing_of(problem(), measure=True) == known


def test_another_process_measured_meanwhile(
    times: dict[int | str, float], library: FakeCusparselt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While this one waited for its turn."""
    theirs = Timing(12, 3.0, 4.0)
    monkeypatch.setattr(timings, "known", _later({}, {timings.key(problem()): theirs}))
    assert measure.timing_of(problem(), measure=True) == theirs
    assert not library.launched


def _later(*answers: dict[str, Timing]) -> Callable[[Path], dict[str, Timing]]:
    remaining = list(answers)
    return lambda file: remaining.pop(0)


def test_algorithms_that_are_wrong_or_refused(
    times: dict[int | str, float], library: FakeCusparselt, caplog: pytest.LogCaptureFixture
) -> None:
    times.update({4: 1.0, 10: 2.0, 12: 3.0})
    library.refused, library.wrong = {4}, {10}
    assert measure.timing_of(problem(), measure=True) == Timing(12, 3.0, 25.0)
    assert "algorithm 10 disagrees with algorithm 0 or with itself: not used" in caplog.text


def test_ids_that_the_library_does_not_have(
    times: dict[int | str, float], monkeypatch: pytest.MonkeyPatch, library: FakeCusparselt
) -> None:
    times.update({20: 1.0, 21: 1.0, 3: 5.0})
    monkeypatch.setattr(measure, "algorithms", lambda *_: (21, 3))  # the fake has 0 to 20
    assert measure.timing_of(problem(), measure=True) == Timing(3, 5.0, 25.0)


def test_results_that_change_from_launch_to_launch(
    times: dict[int | str, float], library: FakeCusparselt, caplog: pytest.LogCaptureFixture
) -> None:
    """Of every algorithm: then the library's own default is as good as any."""
    library.unsteady = True
    times[4] = 1.0
    assert measure.timing_of(problem(), measure=True) == Timing(0, 50.0, 25.0)
    assert caplog.text.count("disagrees") == len(measure.algorithms((0, 8, 0), BFLOAT16, "linear", (9, 0)))


@pytest.mark.parametrize(
    ("operand", "mask", "sparse", "dense"),
    [
        ("S(W)", "greedy", "sparsify", "mask24"),
        ("S(X)", "optimal", "sparsify_input", "mask24"),
        ("MVUE(dY)", "", "sparsify_mvue", "mvue24"),
        ("MVUE(dY^T)", "", "sparsify_mvue", "mvue24"),
    ],
)
def test_what_an_operand_costs(
    times: dict[int | str, float], called: Called, operand: Any, mask: str, sparse: str, dense: str
) -> None:
    """Packed, and dense with zeros; of rows that are no multiple of four too."""
    times.update({sparse: 3.0, dense: 7.0})
    rows = 64 if operand == "S(W)" else 70

    def cost() -> Timing:
        packers = measure.Packers("sm90", backends.SM90.packer)
        return measure.preparation_of(packers, operand, -1, (rows, 64), (BFLOAT16, BFLOAT16), mask)

    assert cost() == Timing(0, 3.0, 7.0)
    called.clear()
    assert cost() == Timing(0, 3.0, 7.0)
    assert not called


def test_time_of_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of replays of a graph of four launches; before it, one launch, a replay and 20 ms to warm up."""
    replays = [999.0, 8.0, *[9.0] * 3, 8.0, 4.0, 2.0, 400.0, 1.0]
    clock = Clock(monkeypatch, replays)
    launched: list[bool] = []
    assert measure._time(lambda: launched.append(clock.capturing)) == pytest.approx(1000.0)
    assert replays == []
    assert launched == [False, True, True, True, True]
    assert clock.mode == "thread_local"  # other threads, as the one of autograd, may go on
    assert clock.captured_on is clock.stream  # of the device that is current; by default it may be of another
    assert clock.waits == 2  # for what made the operands, and for the first launch


def test_a_sample_is_long_enough_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a millisecond: of launches of 31 us four replays of four, whatever the first one took."""
    samples = [0.125] * 4 + [0.25] * 4 + [0.375] * 12
    replays = [5.0, 0.25, *[0.125] * 80, *samples]
    Clock(monkeypatch, replays)
    assert measure._time(lambda: None) == pytest.approx(93.75)
    assert replays == []


# The tuner


def test_products_measure_once_per_step_of_the_grid(times: dict[int | str, float], library: FakeCusparselt) -> None:
    times[2] = 1.0
    for rows in (64, 192, 256, 256):
        kept, packed, dense = operands(problem("grad_weight", rows=rows))
        actual = tuner.product("grad_weight", dense, packed, 64)
        assert relative_error(actual, kept @ dense) < TOLERANCE[BFLOAT16]
        assert library.launched[-1] == 2
    assert len(tuner._CHOSEN) == 3
    (file,) = timings._KNOWN.values()
    assert sorted(file) == [f"grad_weight bfloat16 M=128 N=64 K={rows}" for rows in (192, 256, 64)]


def test_nothing_is_measured_in_a_graph_capture(
    times: dict[int | str, float], library: FakeCusparselt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the default, and asks again after the capture."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    times[4] = 1.0
    kept, packed, dense = operands(problem())
    for capturing, algorithm in ((True, 17), (False, 4)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        actual = tuner.product("linear", dense, packed, 64)
        assert relative_error(actual, dense @ kept.T) < TOLERANCE[BFLOAT16]
        assert library.launched[-1] == algorithm
        assert len(tuner._CHOSEN) == (0 if capturing else 1)


# Where things are


def test_folder_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(timings.DIRECTORY_VARIABLE, "/chosen")
    assert timings.directory() == Path("/chosen")
    monkeypatch.delenv(timings.DIRECTORY_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert timings.directory() == Path("/cache/sparse_pass")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert timings.directory() == tmp_path / ".cache" / "sparse_pass"


def test_library_in_its_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the system does not know it by its name."""
    file = tmp_path / "cusparselt" / "lib" / "libcusparseLt.so.0"
    file.parent.mkdir(parents=True)
    file.touch()
    tried = []

    def load(path: str) -> Any:
        tried.append(path)
        if path != str(file):
            raise OSError(path)
        return "loaded"

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    specs = {"nvidia": Spec()}
    monkeypatch.setattr(cusparselt_library.importlib.util, "find_spec", specs.get)
    monkeypatch.setattr(cusparselt_library.ctypes, "CDLL", load)
    assert cusparselt_library._load() == "loaded"
    assert tried == ["libcusparseLt.so.0", str(file)]
