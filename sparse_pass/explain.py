"""What the pass would do to a model, without training it."""

from __future__ import annotations

import logging
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
from .predict.costs import Predicted
from .predict.forecast import forecast, with_others
from .predict.gpus import gpu
from .predict.work import Work
from .report import Report
from .usage import by_position


@by_position(2, lambda _: "explain(model, config) returns a function of the model's inputs: explain(model, config)(x)")
def explain(model: nn.Module, config: Config, *, device: str | None = None) -> Callable[..., Report]:
    """Report what the pass would do: ``print(explain(model, config)(*args, **kwargs))``.

    Runs one forward of the model op by op to capture its graphs; under ``torch.no_grad()`` the graphs are
    those of inference. Gradients, buffers and random state are as before afterwards.

    With ``device="h100"`` it is the report of that GPU, wherever the model is: on a CPU, or on the meta device, where a
    model of any size takes no memory. Kernels are chosen by times that are interpolated from shipped measurements, and
    the report, a `Forecast`, has them: by layer and GEMM, of the whole step, and what share of the FLOPs of all linears
    the config names. GEMMs are predicted in the dtype of the graph: take a bfloat16 model, or call it under autocast.

    Args:
        model: eager or compiled module.
        config: names to schemes, as for :func:`sparse_backend`. A pattern that names nothing is no error
            here: the report lists it, and the closest names in a note.
        device: the GPU to predict for, ``"h100"`` or ``"h200"``; None for the device that the model is on, where
            kernels are measured.

    Returns:
        A function that takes the model's inputs and returns a Report.

    Raises:
        TypeError: inputs of the model beside the config.
        ValueError: bad config; a ``device`` without measurements; from the returned function, an exactly named linear
            that cannot be 2:4 sparse.
    """
    patterns = SparsePass(config).patterns  # raises now for a bad config
    costs = None if device is None else Predicted(gpu(device))
    model = unwrapped(model)

    def run(*args: Any, **kwargs: Any) -> Report:
        if costs is None:
            report, ran = _report(model, SparsePass(config), _forward, args, kwargs)
            return _completed(model, patterns, report, ran)
        others, everything = with_others(config)
        sparse_pass = SparsePass(everything)
        sparse_pass.limits, sparse_pass.costs = costs.limits, costs
        work = Work()
        with _quiet():
            report, ran = _report(model, sparse_pass, work.counting, args, kwargs)
        report = replace(report, unmatched=tuple(text for text in report.unmatched if text in config))
        return forecast(_completed(model, patterns, report, ran), others, costs, work, model)

    return run


def _report(
    model: nn.Module,
    sparse_pass: SparsePass,
    forward: Callable[[GraphModule], Callable[..., Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Report, set[str]]:
    """What the pass reports of one call of the model, and the names of all linears in its graphs."""
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
        return forward(graph_module)

    # Sizes of one call are no reason to make those of the next one dynamic.
    with _untouched(model), torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        try:
            torch.compile(_fresh(_call), backend=report_only)(model, args, kwargs)
        except BackendCompilerFailed:
            if refused:
                raise refused[0] from None
            raise
    return sparse_pass.report, sparse_pass.captured()


@contextmanager
def _quiet() -> Iterator[None]:
    """Log no linear that is skipped: most of them nobody has named."""
    one_graph = logging.getLogger(f"{__package__}.one_graph")
    one_graph.addFilter(_nothing)
    try:
        yield
    finally:
        one_graph.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _completed(model: nn.Module, patterns: Sequence[Pattern], report: Report, ran: set[str]) -> Report:
    missing = tuple(uncaptured(model, patterns, ran))
    notes = report.notes + _suggestions(model, patterns, report.unmatched)
    return replace(report, notes=notes, uncaptured=missing)


def _forward(graph_module: GraphModule) -> Callable[..., Any]:
    return graph_module.forward


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
