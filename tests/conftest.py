"""What every test gets: a fresh compiler without caches, a fixed seed, and no GPU tests without a GPU."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

# Inductor writes its loops for CPUs without vector instructions here. Otherwise new machines would compile programs for
# 10 s that try which instructions there are, and each loop would take longer to compile. It is all one to the pass.
# torch reads this when it is imported, also in the processes that tests start; 1 gives the loops that users get.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")
# Python's own collections are enough; one more after each compilation takes as long as a tenth of it.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

import pytest
import torch
from compile_time import no_loops, rare_collections
from support import fresh_compile

if TYPE_CHECKING:
    from fake_cusparselt import FakeCusparselt

ALL_LOOPS = "SPARSE_PASS_LOOPS" in os.environ


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rare_collections()
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fresh_compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """A graph from a compile cache never meets the pass: a test that reads it would test nothing.

    Tests of the caches themselves turn them on again. Inductor writes loops only for tests whose marker says so.
    """
    torch.manual_seed(0)
    loops = ALL_LOOPS or any(request.node.get_closest_marker(name) for name in ("loops", "gpu"))
    with fresh_compile(), nullcontext() if loops else no_loops():
        yield


@pytest.fixture
def tuning_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where timings go, empty, with nothing in memory either."""
    from sparse_pass.kernels import timings, tuner

    monkeypatch.setenv(timings.DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr(timings, "_KNOWN", {})
    monkeypatch.setattr(tuner, "_CHOSEN", {})
    timings.path.cache_clear()
    yield tmp_path
    timings.path.cache_clear()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[FakeCusparselt]:
    """A cuSPARSELt on the CPU. Nothing that it builds may outlive the test."""
    from fake_cusparselt import FakeCusparselt, install

    from sparse_pass.kernels import compressor, cusparselt, cusparselt_library

    fake = FakeCusparselt()
    install(monkeypatch, fake)
    yield fake
    # Log records hold errors, and those what was called.
    caplog.get_records("call").clear()
    chosen = getattr(sys.modules.get("sparse_pass.kernels.tuner"), "_CHOSEN", {})
    for built in (cusparselt._PLANS, compressor._COMPRESSORS, chosen):
        built.clear()
    if fake.alive:
        gc.collect()  # a traceback may hold one; this takes as long as most tests
    assert fake.alive == {}
    cusparselt_library._library.cache_clear()
    cusparselt._handle.cache_clear()
