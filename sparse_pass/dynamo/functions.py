"""Weights in the hands of an autograd.Function that Dynamo could not trace.

Dynamo then compiles the function's `forward` by itself, as a graph without a backward, and its `backward` runs
eagerly, with the dense weight that the function has saved.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import CodeType

import torch
from torch.autograd.function import FunctionCtx

from .sources import running_scope

_WAYS = frozenset({"forward", "backward"})


def held_by_functions() -> frozenset[int]:
    """Ids of the tensors that are local to a running ``forward`` or ``backward`` of an autograd.Function.

    Not those of the modules that such a function calls, as that of reentrant checkpointing does: they are compiled with
    their own backward when it runs them again.
    """
    return frozenset(
        id(value) for scope in _scopes() for value in _flat(scope.values()) if isinstance(value, torch.Tensor)
    )


def _scopes() -> Iterator[dict[str, object]]:
    output = running_scope()
    if output is None:
        return
    if any(isinstance(value, FunctionCtx) for value in output.local_scope.values()):
        yield output.local_scope
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in _WAYS and isinstance(_first(frame.f_code, frame.f_locals), FunctionCtx):
            yield frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]


def _first(code: CodeType, scope: dict[str, object]) -> object:
    return scope.get(code.co_varnames[0]) if code.co_varnames else None


def _flat(values: object) -> Iterator[object]:
    for value in values:  # type: ignore[attr-defined]
        if isinstance(value, (tuple, list)):
            yield from value
        else:
            yield value
