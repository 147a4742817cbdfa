"""What every test gets: a fresh compiler without caches, a fixed seed, and no GPU tests without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor_config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """A graph from a compile cache never meets the pass: a test that reads it would test nothing.

    Tests of the caches themselves patch `force_disable_caches` back to False.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    with inductor_config.patch(force_disable_caches=True):
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
