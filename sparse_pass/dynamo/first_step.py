"""Tells when the first training step under a backend ends, so that a layer which no graph read is not dense in silence.

Two events say so. A named weight gets its gradient: what no graph of training has read by then has just been computed
dense. An optimizer has gradients and is about to step, or has called its closure: a forward and a backward have run.
Both count only if the compiled model was called at all, since the same model may be trained dense on purpose first:
Dynamo captured a graph, or tried to, or a module of the model is compiled in place, so that calling it is calling what
was compiled.

All hooks go as soon as nothing is missing, which is before the first backward where all went well. Until then they
break the graph of a compiled optimizer step: traced, they could tell nobody.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Watcher(Protocol):
    """Who wants to know."""

    def on_gradient(self, name: str) -> None:
        """The weight of this name has its gradient."""

    @property
    def backend(self) -> Callable[[], object]:
        """What was handed to torch.compile; None if it is gone."""

    def on_step(self, held: frozenset[int]) -> bool:
        """A step has come to its end. held: ids of the parameters of its optimizer. Returns whether that was a step of
        what was compiled: then later ones of the optimizer are of no interest."""

    def on_attempt(self) -> None:
        """Dynamo tries to capture something in a call of what was compiled with this backend."""


class FirstStep:
    """The hooks of one watcher, which they do not keep alive."""

    def __init__(self, watcher: Watcher, model: nn.Module, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        """named: the parameters to watch, with their names."""
        from torch._dynamo.callback import callback_handler

        there, its_model = weakref.ref(watcher), weakref.ref(model)
        handles: list[Any] = [
            parameter.register_post_accumulate_grad_hook(_when_gradient(there, name))
            for name, parameter in named
            if parameter.requires_grad and parameter.is_leaf
        ]
        handles.append(register_optimizer_step_pre_hook(_when_step(there, its_model, with_closure=False)))
        handles.append(register_optimizer_step_post_hook(_when_step(there, its_model, with_closure=True)))
        attempt = _when_attempt(there)
        callback_handler.register_start_callback(attempt)
        self._remove = weakref.finalize(watcher, _remove, handles, attempt)
        self._remove.atexit = False

    def over(self) -> None:
        """Take all hooks away."""
        self._remove()


def _remove(handles: list[Any], attempt: Callable[..., None]) -> None:
    from torch._dynamo.callback import callback_handler

    for handle in handles:
        handle.remove()
    if attempt in callback_handler.start_callbacks:  # torch._dynamo.reset() forgets them
        callback_handler.remove_start_callback(attempt)


def _when_gradient(watcher: weakref.ref[Watcher], name: str) -> Callable[[torch.Tensor], None]:
    def sparse_pass_gradient(_: torch.Tensor) -> None:
        there = watcher()
        if there is not None:
            there.on_gradient(name)

    return cast(Callable[[torch.Tensor], None], torch.compiler.disable(sparse_pass_gradient))


def _when_step(
    watcher: weakref.ref[Watcher], model: weakref.ref[nn.Module], *, with_closure: bool
) -> Callable[..., None]:
    """The hook before a step, or after one that runs forward and backward by itself."""

    over: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def sparse_pass_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        there, its_model = watcher(), model()
        if optimizer in over or _makes_state():
            return
        closure = any(callable(one) for one in (*args[1:], *kwargs.values()))
        if there is None or its_model is None or closure != with_closure:
            return
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        own = {id(parameter) for parameter in its_model.parameters()}
        ran = any(id(parameter) in own and (with_closure or parameter.grad is not None) for parameter in held)
        if ran and there.on_step(frozenset(map(id, held))):
            over.add(optimizer)

    return cast(Callable[..., None], torch.compiler.disable(sparse_pass_step))


def _makes_state() -> bool:
    """Whether a step is none of training: ``torch.distributed.checkpoint`` takes one with gradients of zero, so that an
    optimizer has a state to load into."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_init_optim_state":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _when_attempt(watcher: weakref.ref[Watcher]) -> Callable[..., None]:
    def sparse_pass_attempt(*_: Any) -> None:
        there, frame = watcher(), sys._getframe()
        while there is not None and frame is not None:
            if (
                frame.f_code.co_name == "compile_wrapper"
                and backend_of(frame.f_locals.get("callback")) is there.backend()
            ):
                there.on_attempt()
                return
            frame = frame.f_back  # type: ignore[assignment]

    return sparse_pass_attempt


def is_compiled_in_place(model: nn.Module, backend: object) -> bool:
    """Whether ``module.compile(backend=backend)`` was called on the model or on a part of it."""
    return any(
        backend_of(_callback(module._compiled_call_impl)) is backend
        for module in model.modules()
        if module._compiled_call_impl is not None
    )


def _callback(compiled: Any) -> object:
    """What Dynamo calls back for a compiled callable; None if it is no such callable."""
    code, cells = getattr(compiled, "__code__", None), getattr(compiled, "__closure__", None)
    held = dict(zip(code.co_freevars, cells, strict=True)) if code is not None and cells else {}
    return held["callback"].cell_contents if "callback" in held else None


def backend_of(callback: Any) -> object:
    """The backend that the user gave to torch.compile."""
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return getattr(callback, "compiler_fn", callback)
