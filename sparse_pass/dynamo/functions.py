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
    forwards = _forwards()
    scope = list(output.local_scope.values())
    if _place(output.root_tx.f_code) in forwards or any(isinstance(value, FunctionCtx) for value in scope):
        yield scope
    frame = sys._getframe()
    while frame is not None:
        # Of these frames alone: Python 3.12 and older keep the locals that were asked for as long as the frame runs.
        if _place(frame.f_code) in forwards:
            yield list(frame.f_locals.values())
        elif frame.f_code.co_name == "backward":
            scope = list(frame.f_locals.values())
            if any(isinstance(value, FunctionCtx) for value in scope):
                yield scope
        frame = frame.f_back  # type: ignore[assignment]


def _place(code: CodeType) -> tuple[str, int]:
    """Where a function is written: of code that Dynamo has changed that is the same."""
    return code.co_filename, code.co_firstlineno


def _forwards() -> set[tuple[str, int]]:
    """Of all functions. A forward need not take a ctx, and newer torch calls it from C++."""
    found = set()
    classes = [torch.autograd.Function]
    while classes:
        several = classes.pop().__subclasses__()
        classes += several
        for one in several:
            forward = vars(one).get("forward")
            code = getattr(getattr(forward, "__func__", forward), "__code__", None)
            if code is not None:
                found.add(_place(code))
    return found
