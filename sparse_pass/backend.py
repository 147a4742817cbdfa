"""The ways in: a torch.compile backend and an Inductor options dict."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from .capture import compile_aot_eager, copy_graph, report_graph
from .config import Config, Tune
from .graph_pass import SparsePass
from .model_names import check_names, input_names, read_names, uncaptured
from .recompiles import why_last
from .regions import guard_region
from .report import Report
from .rewrite_graph import Names

Inner: TypeAlias = Literal["inductor", "aot_eager"]


class PassChain(CustomGraphPass):
    """Graph passes in order. torch 2.11 takes one pass, not a list; the chain is one on every torch."""

    def __init__(self, passes: Sequence[Callable[[Graph], object]]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: Graph) -> None:
        for one in self.passes:
            one(graph)

    def uuid(self) -> object | None:
        ids = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.passes]
        # A pass without an id makes the graph uncacheable, as it does on its own.
        return None if any(one is None for one in ids) else ids

    @property
    def report(self) -> Report:
        """The report of the (last) SparsePass of the chain."""
        return next(one for one in reversed(self.passes) if isinstance(one, SparsePass)).report


class _SeeGraph(CustomGraphPass):
    """Pre-grad pass of `inductor_options`: shows a SparsePass what Dynamo captured. Changes nothing."""

    def __init__(self, sparse_pass: SparsePass) -> None:
        self._pass = sparse_pass

    def __call__(self, graph: Graph) -> None:
        module = graph.owning_module
        if module is not None:
            self._pass.see(graph_names(module, None), _Retrace(module))

    def uuid(self) -> str:
        return "sparse_pass"  # reads only

    def __getstate__(self) -> dict[str, object]:
        return {}  # torch 2.11 pickles this pass into the keys of its caches

    def __deepcopy__(self, memo: dict[int, Any]) -> _SeeGraph:
        return self  # configs of Inductor are copied


class _Retrace:
    """Reports a graph whose compiled form came from a cache: with equal ids the pass was not called.

    Holds what tracing depends on besides the graph: the inputs and the modes of the moment.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self._graph = copy_graph(graph_module)
        self._grad = torch.is_grad_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
        ]

    def __call__(self, sparse_pass: SparsePass) -> None:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, dtype in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            report_graph(self._graph, sparse_pass)


def inductor_options(config: Config, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Inductor options with the pass added: ``torch.compile(model, options=inductor_options(config))``.

    Also for ``torch._inductor.config.patch(inductor_options(config))``. Passes that ``options``, or else
    the global Inductor config, already have keep running, before this one. The report is at
    ``result["joint_custom_pre_pass"].report``.

    Args:
        config: names to schemes, as for :func:`sparse_backend`.
        options: Inductor options to build on; not changed.

    Raises:
        ValueError: bad config.
    """
    return _with_pass(SparsePass(config), dict(options or {}), see_graph=True)


def _with_pass(sparse_pass: SparsePass, options: dict[str, Any], *, see_graph: bool) -> dict[str, Any]:
    options = {key.replace("-", "_"): value for key, value in options.items()}
    options["joint_custom_pre_pass"] = _chained("joint_custom_pre_pass", options, sparse_pass)
    if see_graph:
        options["pre_grad_custom_pass"] = _chained("pre_grad_custom_pass", options, _SeeGraph(sparse_pass))
        if hasattr(inductor_config, "pre_grad_pass_timing"):
            # Before the cache lookup, as torch 2.11 does: a warm start must show the graph too.
            options["pre_grad_pass_timing"] = "early"
    return options


def _chained(slot: str, options: Mapping[str, Any], last: CustomGraphPass) -> CustomGraphPass:
    existing = options.get(slot, getattr(inductor_config, slot))
    if existing is None:
        return last
    if isinstance(existing, PassChain):
        return PassChain([*existing.passes, last])
    return PassChain([*existing, last] if isinstance(existing, (list, tuple)) else [existing, last])


def graph_names(graph_module: GraphModule, model: nn.Module | None) -> Names:
    """Names of the parameters of a graph that Dynamo captured."""
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    return Names(
        by_input=input_names(graph_module, model),
        last_graph=not (reason is not None and reason.graph_break),
        checked=model is not None,
    )


class SparseBackend:
    """A torch.compile backend; see :func:`sparse_backend`."""

    __name__ = "sparse_pass"

    def __init__(
        self,
        sparse_pass: SparsePass,
        model: nn.Module | None,
        inner: Inner,
        options: dict[str, Any],
    ) -> None:
        self._pass = sparse_pass
        # Compiled code holds the backend; a strong reference would keep the parameters alive with it.
        self._model = None if model is None else weakref.ref(model)
        self._inner = inner
        self._options = options
        self._inductor: torch._TorchCompileInductorWrapper | None = None
        self._read: set[str] = set()

    def __call__(
        self,
        graph_module: GraphModule,
        inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        given = {**self._options, **(options or {})}
        model = self._live_model()
        names = graph_names(graph_module, model)
        if model is not None:
            self._read |= read_names(graph_module, names.by_input)
            region = guard_region(graph_module, model, self._pass.patterns)
            by_input = {index: region.own(known) for index, known in names.by_input.items()}
            names = replace(names, by_input=by_input, serves=region.serves)
            self._read.update(region.serves)
        last = why_last()
        if last:
            self._pass.note(last, names)
        if self._inner == "aot_eager":
            _refuse_options(mode, given)
            with self._pass.seeing(names):
                return compile_aot_eager(graph_module, inputs, self._pass)
        with self._pass.seeing(names, _Retrace(graph_module)):
            # What torch.compile(mode=..., options=...) would make of them, its errors included.
            options = _with_pass(self._pass, given, see_graph=False)
            self._inductor = torch._TorchCompileInductorWrapper(mode, options, None)
            return self._inductor(graph_module, inputs)  # type: ignore[no-any-return]

    def reset(self) -> None:
        """Called by torch.compile: let go of recorded CUDA graphs, as its own backend does."""
        if self._inductor is not None:
            self._inductor.reset()

    def _live_model(self) -> nn.Module | None:
        if self._model is None:
            return None
        model = self._model()
        if model is None:
            raise RuntimeError(
                "the model given as model= to sparse_backend is gone; make a backend for the model in use"
            )
        return model

    @property
    def report(self) -> Report:
        """Every graph compiled so far, whether compiled now or taken from a cache."""
        model = None if self._model is None else self._model()
        report = self._pass.report
        if model is None:
            return report
        missing = uncaptured(model, self._pass.patterns, self._read)
        if report.graphs:
            self._pass.warn_uncaptured(missing)
        return replace(report, uncaptured=tuple(missing))


def _refuse_options(mode: str | None, options: Mapping[str, Any]) -> None:
    if mode or options:
        raise ValueError(f"inner='aot_eager' takes no mode or Inductor options, got mode={mode!r}, options={options!r}")


def sparse_backend(
    config: Config,
    *,
    model: nn.Module | None = None,
    inner: Inner = "inductor",
    strict: bool = False,
    tune: Tune = "auto",
    **inductor_options: Any,
) -> SparseBackend:
    """A backend for ``torch.compile(model, backend=...)`` that trains the named linears with 2:4 sparsity.

    Args:
        config: names to schemes, or to None (leave dense). ``blocks.0.mlp.fc1`` is an exact module or
            parameter name; ``*`` stands for anything inside one dotted part; ``re:...`` is a regular
            expression for the full name. An exact name beats patterns; among patterns the first wins.
        model: checks the names at once, and makes them absolute where parts of the model are compiled
            one by one. No reference to its parameters is kept by the compiled code.
        inner: what compiles the rewritten graphs: ``"inductor"``, or ``"aot_eager"`` (runs op by op).
        strict: raise where a named linear would be skipped.
        tune: ``"auto"`` or ``"off"``; see :class:`SparsePass`.
        **inductor_options: options for Inductor; give ``mode=`` and ``options=`` to torch.compile.

    Returns:
        SparseBackend: hand it to torch.compile; ``.report`` says what became of each named linear.

    Raises:
        ValueError: bad config or argument; with ``model``, a pattern that names no linear weight (lists
            the closest names) or an exactly named weight that cannot be 2:4 sparse.
        RuntimeError: an option that Inductor does not know.
    """
    if inner not in get_args(Inner):
        raise ValueError(f"inner={inner!r}: expected one of {', '.join(map(repr, get_args(Inner)))}")
    for argument in inductor_options.keys() & {"mode", "options"}:
        raise ValueError(
            f"{argument}= is an argument of torch.compile: torch.compile(model, backend=sparse_backend(...),"
            f" {argument}=...); options of Inductor are keywords here, such as max_fusion_size=8"
        )
    sparse_pass = SparsePass(config, strict=strict, tune=tune)
    if model is not None:
        check_names(model, sparse_pass.patterns)
    if inner == "aot_eager":
        _refuse_options(None, inductor_options)
    else:
        torch._TorchCompileInductorWrapper(None, inductor_options, None)  # raises for unknown options
    return SparseBackend(sparse_pass, model, inner, inductor_options)
