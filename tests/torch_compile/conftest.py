"""What tests of several files of this folder get."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest
import torch.distributed as dist
from stack import HAS_GLOO


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group with one rank."""
    if not HAS_GLOO:
        pytest.skip("needs torch.distributed with gloo")
    with tempfile.TemporaryDirectory() as folder:  # the store may have removed its file when the group goes
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()
