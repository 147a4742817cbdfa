"""Weights in the hands of an autograd.Function that Dynamo could not trace.

Dynamo then compiles the function's `forward` by itself, as a graph without a backward, and its `backward` runs
eagerly, with the dense weight that the function has saved.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_leaves

from .sources import running_scope


def held_by_functions() -> frozenset[int]:
    """Ids of the tensors that were given to a running autograd.Function, or are local to its forward or backward.

    Not those of the modules that such a function calls, as that of reentrant checkpointing does: they are compiled with
    their own backward when it runs them again.
    """
    return frozenset(id(value) for held in _held() for value in tree_leaves(held) if isinstance(value, torch.Tensor))


def _held() -> Iterator[object]:
    output = running_scope()
    if output is None:
        return
    if any(isinstance(value, FunctionCtx) for value in output.local_scope.values()):
        yield list(output.local_scope.values())
    frame = sys._getframe()
    while frame is not None:
        # Of these frames alone: Python 3.12 and older keep the locals that were asked for as long as the frame runs.
        if frame.f_code is _APPLY:
            # It is Python and calls the forward, whatever its name and whether it takes a ctx.
            yield [frame.f_locals.get("args"), frame.f_locals.get("kwargs")]
        elif frame.f_code.co_name == "backward":
            scope = frame.f_locals
            if any(isinstance(value, FunctionCtx) for value in scope.values()):
                yield list(scope.values())
        frame = frame.f_back  # type: ignore[assignment]


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
