"""What the pass would do to a model, without training it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

from .capture import copy_graph, report_graph
from .captured import captured
from .config import Config
from .fqn import Pattern, nearest
from .graph_pass import SparsePass
from .model_names import linear_weights, uncaptured, unwrapped
from .report import Report
from .usage import by_position


@by_position(2, lambda _: "explain(model, config) returns a function of the model's inputs: explain(model, config)(x)")
def explain(model: nn.Module, config: Config) -> Callable[..., Report]:
    """Report what the pass would do: ``print(explain(model, config)(*args, **kwargs))``.

    Runs one forward of the model op by op to capture its graphs; under ``torch.no_grad()`` the graphs are
    those of inference. Gradients, buffers and random state are as before afterwards.

    Args:
        model: eager or compiled module.
        config: names to schemes, as for :func:`sparse_backend`. A pattern that names nothing is no error
            here: the report lists it, and the closest names in a note.

    Returns:
        A function that takes the model's inputs and returns a Report.

    Raises:
        TypeError: inputs of the model beside the config.
        ValueError: bad config; from the returned function, an exactly named linear that cannot be 2:4 sparse.
    """
    SparsePass(config)  # raises now for a bad config
    model = unwrapped(model)

    def run(*args: Any, **kwargs: Any) -> Report:
        sparse_pass = SparsePass(config)
        refused: list[ValueError] = []

        def report_only(graph_module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            names = captured(graph_module, model).names
            if not names.ours:
                return graph_module.forward
            with sparse_pass.seeing(replace(names, checked=True)):
                try:
                    report_graph(copy_graph(graph_module), sparse_pass)
                except ValueError as error:
                    refused.append(error)
                    raise
            return graph_module.forward

        # Sizes of one call are no reason to make those of the next one dynamic.
        with _untouched(model), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            try:
                torch.compile(_fresh(_call), backend=report_only)(model, args, kwargs)
            except BackendCompilerFailed:
                if refused:
                    raise refused[0] from None
                raise
        report = sparse_pass.report
        missing = tuple(uncaptured(model, sparse_pass.patterns, sparse_pass.captured()))
        notes = report.notes + _suggestions(model, sparse_pass.patterns, report.unmatched)
        return replace(report, notes=notes, uncaptured=missing)

    return run


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return model(*args, **kwargs)


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with a code object of its own: Dynamo keeps compiled graphs, and their limit, by code object."""
    assert isinstance(function, FunctionType)
    return FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    # The objects and their values: a forward may write into a buffer or put another in its place.
    tables = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    compiled = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None  # module.compile() would bring its own backend
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, implementation in compiled:
            module._compiled_call_impl = implementation
        for table, objects in tables:
            table.clear()
            table.update(objects)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def _suggestions(model: nn.Module, patterns: Sequence[Pattern], unmatched: tuple[str, ...]) -> tuple[str, ...]:
    known = linear_weights(model)
    return tuple(
        f"{pattern.text!r} names no linear that ran; closest names: {', '.join(map(repr, close)) or 'none'}"
        for pattern in patterns
        if pattern.text in unmatched and not pattern.names(known)
        for close in [nearest(pattern.text.removeprefix("re:"), known)]
    )
