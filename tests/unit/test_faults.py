"""Faults from outside: the library, the disk, other processes. Training goes on or stops with one clear sentence."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_printer import trains_as

import sparse_pass as sp
from sparse_pass.kernels import backends, cusparselt_library, probe, timings
from sparse_pass.kernels.timings import Timing
from sparse_pass.plan.limits import Limits

TIMING = Timing(4, 10.0, 20.0)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timings, "_KNOWN", {})
    timings._log_once.cache_clear()
    cusparselt_library._library.cache_clear()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "gpu.json"


def reread(file: Path) -> dict[str, Timing]:
    """As another process would."""
    timings._KNOWN.clear()
    return timings.known(file)


# The tuning cache


def test_cache_round_trip(file: Path) -> None:
    timings.remember(file, "a", TIMING)
    timings.remember(file, "b", TIMING)
    assert reread(file) == {"a": TIMING, "b": TIMING}
    assert [one.name for one in file.parent.iterdir()] == ["gpu.json"]


def test_cache_is_the_users_own(file: Path) -> None:
    timings.remember(file, "a", TIMING)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"a"',
        '{"a": 1}',
        '{"a": {}}',
        '{"a": {"algorithm": "x", "sparse_us": 1, "dense_us": 1}}',
        '{"a": {"algorithm": null, "sparse_us": 1, "dense_us": 1}}',
        '{"a": {"algorithm": 4, "sparse_us": [], "dense_us": 1}}',
        '{"a": {"algorithm": Infinity, "sparse_us": 1, "dense_us": 1}}',
        "\x00\x01",
        "__import__('os').abort()",
        "[" * 100_000,
    ],
    ids=lambda text: text[:20],
)
def test_corrupt_cache_counts_as_empty(file: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.mkdir()
    file.write_text(text)
    assert timings.known(file) == {}
    assert "cannot read" in caplog.text
    assert "measured again" in caplog.text
    timings.remember(file, "a", TIMING)
    assert reread(file) == {"a": TIMING}


def test_half_a_file_in_any_place(file: Path) -> None:
    """What a process that died left behind, were it to write in place."""
    timings.remember(file, "a", TIMING)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert reread(file) in ({}, {"a": TIMING})


def fail_to_write(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def write(handle: int, mode: str) -> Any:
        os.close(handle)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(timings.os, "fdopen", write)


def fail_to_create(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def create(**_: object) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(timings.tempfile, "mkstemp", create)


def fail_to_replace(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def replace(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(timings.os, "replace", replace)


@pytest.mark.parametrize(
    ("fail", "number"),
    [
        (fail_to_write, errno.ENOSPC),
        (fail_to_create, errno.EROFS),
        (fail_to_create, errno.EACCES),
        (fail_to_replace, errno.EIO),
    ],
    ids=["disk full", "read-only", "not ours", "input/output"],
)
def test_cache_that_cannot_be_written(
    file: Path, fail: Any, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The old file stays whole, no temporary one is left, memory has the timing, and the log says it once."""
    timings.remember(file, "a", TIMING)
    with monkeypatch.context() as patch:
        fail(patch, number)
        timings.remember(file, "b", TIMING)
        timings.remember(file, "c", TIMING)
        assert set(timings.known(file)) == {"a", "b", "c"}
    assert reread(file) == {"a": TIMING}
    assert [one.name for one in file.parent.iterdir()] == ["gpu.json"]
    assert caplog.text.count("cannot write") == 1
    assert os.strerror(number) in caplog.text


def test_folder_that_cannot_be_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    file = tmp_path / "cache" / "gpu.json"
    with timings.one_process_at_a_time(file):
        timings.remember(file, "a", TIMING)
    assert timings.known(file) == {"a": TIMING}
    assert "cannot write" in caplog.text


def _measure_and_remember(file: Path, worker: int, count: int, start: Any) -> None:
    start.wait()
    for one in range(count):
        with timings.one_process_at_a_time(file):
            name = f"shared {one}"
            if name not in timings.known(file):
                timings.remember(file, name, Timing(worker, float(worker), float(one)))
            timings.remember(file, f"{worker} {one}", TIMING)


def test_processes_write_at_once(file: Path) -> None:
    """Nothing is lost, nothing is half written, and what one has measured the others take."""
    context = multiprocessing.get_context("fork")
    start = context.Event()
    workers = [context.Process(target=_measure_and_remember, args=(file, one, 10, start)) for one in range(4)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    found = reread(file)
    assert set(found) == {f"shared {i}" for i in range(10)} | {f"{w} {i}" for w in range(4) for i in range(10)}
    assert all(found[f"shared {i}"].sparse_us == found[f"shared {i}"].algorithm for i in range(10))


def test_forget(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(timings.DIRECTORY_VARIABLE, str(file.parent))
    timings.remember(file, "a", TIMING)
    assert timings.forget() == 1
    assert reread(file) == {}


def test_cache_is_plain_json(file: Path) -> None:
    timings.remember(file, "a", TIMING)
    assert json.loads(file.read_text()) == {"a": {"algorithm": 4, "sparse_us": 10.0, "dense_us": 20.0}}


# The library


class FakeLibrary:
    """Functions that return a status; `GetProperty` gives a version."""

    def __init__(self, version: tuple[int, int, int] = (0, 8, 0), status: int = 0) -> None:
        self._version = version
        for name in cusparselt_library._PROTOTYPES:
            setattr(self, f"cusparseLt{name}", Function(lambda *_: status))
        self.cusparseLtGetProperty = Function(self._get)
        self.cusparseLtGetErrorString = Function(lambda code: b"CUSPARSE_STATUS_NOT_SUPPORTED")

    def _get(self, part: int, address: int) -> int:
        cusparselt_library.ctypes.c_int.from_address(address).value = self._version[part]
        return 0


class Function:
    """One that takes attributes, as ctypes' do."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


def test_library_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str) -> Any:
        raise OSError(f"{path}: cannot open shared object file")

    monkeypatch.setattr(cusparselt_library.ctypes, "CDLL", load)
    with pytest.raises(RuntimeError, match=r"libcusparseLt\.so\.0 was not found: install the wheel"):
        cusparselt_library.version()


def test_library_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt_library, "_load", lambda: FakeLibrary((0, 6, 3)))
    with pytest.raises(RuntimeError, match=r"cuSPARSELt 0\.6\.3 is older than 0\.7\.0: update the wheel"):
        cusparselt_library.version()


def test_status_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt_library, "_load", lambda: FakeLibrary(status=10))
    with pytest.raises(
        RuntimeError, match=r"cusparseLtInit returned status 10 \(CUSPARSE_STATUS_NOT_SUPPORTED\) for it"
    ):
        cusparselt_library.call("Init", "it", 0)


# What the pass makes of kernels that do not work


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that claims to be one, as far as the probe asks."""
    monkeypatch.setattr(probe, "_backend", probe._backend.__wrapped__)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


DEVICE = torch.device("cuda", 0)


def test_no_kernel_works(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason has the failure of each, in one line."""

    def broken(backend: Any, device: int, dtype: torch.dtype) -> float:
        cusparselt_library.check(10, "Init", "cuda:0")
        return 0.0

    monkeypatch.setattr(cusparselt_library, "_load", lambda: FakeLibrary(status=10))
    monkeypatch.setattr(probe, "_error_of", broken)
    reason = probe.availability(DEVICE, torch.bfloat16)
    assert reason.startswith(
        "2:4 kernels do not work on cuda:0 with torch.bfloat16 (sm90: RuntimeError: cusparseLtInit"
    )
    assert "compress: RuntimeError" in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("capability", "hip", "capturing", "dtype", "reason"),
    [
        ((9, 0), "7.0", False, torch.bfloat16, "no 2:4 kernels for ROCm"),
        (
            (9, 0),
            None,
            False,
            torch.float32,
            "no 2:4 kernels for torch.float32, only for float16, bfloat16 and float8_e4m3fn",
        ),
        ((7, 5), None, False, torch.float16, "SM 7.5 has no 2:4 tensor cores; they begin with SM 8.0"),
        ((9, 0), None, True, torch.float16, "must be tried before a CUDA graph capture: run the model once first"),
    ],
)
def test_devices_that_are_not_tried(
    hopper: None, monkeypatch: pytest.MonkeyPatch, capability: Any, hip: Any, capturing: bool, dtype: Any, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert reason in probe.availability(DEVICE, dtype)
    assert probe.availability(torch.device("cpu"), dtype) == "no 2:4 kernels on cpu"


@pytest.mark.parametrize("error", [1.1, float("inf")])
def test_wrong_results_are_no_kernel(hopper: None, monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    monkeypatch.setattr(probe, "_error_of", lambda *_: error)
    assert f"sm90: wrong results, relative error {error:.1e}" in probe.availability(DEVICE, torch.bfloat16)


def test_the_next_layout_is_tried(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_error_of", lambda backend, *_: 0.0 if backend is backends.COMPRESS else 1.1)
    assert probe.availability(DEVICE, torch.bfloat16) == ""
    assert probe.backend(DEVICE, torch.bfloat16) is backends.COMPRESS


def test_training_goes_on_masked_dense_with_the_reason() -> None:
    """Whatever the probe says; here of a CPU, whose matmuls need no GPU."""
    limits = Limits(device="cuda", capability=(9, 0), unavailable="libcusparseLt.so.0 was not found")
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).bfloat16()
    backend, reports = trains_as(limits, model, {"0": sp.WeightSparsity()})
    torch.compile(model, backend=backend)(torch.randn(8, 64).bfloat16()).sum().backward()
    (site,) = reports[0].sites
    assert (site.status, site.reason) == ("masked_dense", "libcusparseLt.so.0 was not found")
