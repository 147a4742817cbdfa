"""What spares a suite that compiles thousands of small graphs the time that does not belong to its claims."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch.fx import Node


def rare_collections() -> None:
    """Compilers allocate so much that a tenth of the suite's time would go to Python's collector."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@contextmanager
def quick_dynamo() -> Iterator[None]:
    """Dynamo traces and guards as ever, without what it does for its own statistics after each compilation."""
    trace = logging.getLogger("torch.__trace")
    with (
        # It flushes the processor's caches to time the guards once: 35 ms for a number in a log.
        mock.patch("torch._dynamo.guards.profile_guard_manager", _no_latency),
        # pytest adds handlers to a logger that does not propagate, in each phase of a test. With any, torch formats
        # every event of its trace log: 40% of a compile's time.
        mock.patch.object(trace, "handlers", []),
        mock.patch.object(trace, "propagate", True),
    ):
        yield


def _no_latency(*_: object) -> float:
    """In place of a mock, which would keep what it was called with: the model, for one."""
    return 0.0


@contextmanager
def no_loops() -> Iterator[None]:
    """Inductor calls ATen's kernels, where it would write loops in C++ and have them compiled, for 0.5 s and more each.

    Its passes over the graph, the lowering of this package's operators, the planning of memory and the code around the
    calls are those that users get. It is what torch has as ``mode="lite"``, of the lowering alone.
    """
    from torch._inductor import config, utils  # takes seconds, which a program that needs no Inductor saves

    by_default = utils.should_fallback_by_default

    def falls_back(node: Node) -> bool:
        return by_default(node) and getattr(node.target, "namespace", "") != "sparse_pass"

    with (
        config.patch(fallback_by_default=True),
        mock.patch("torch._inductor.graph.should_fallback_by_default", falls_back),
    ):
        yield
