"""What Inductor takes: the pass beside those that are there already, and the graph that it is shown before."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from .capture import copy_graph, report_graph
from .captured import captured
from .config import Config
from .graph_pass import SparsePass
from .model_names import check_names, unwrapped
from .one_graph import is_logged
from .report import Report


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


class SeeGraph(CustomGraphPass):
    """Pre-grad pass of `inductor_options`: shows a SparsePass what Dynamo captured. Changes nothing."""

    def __init__(self, sparse_pass: SparsePass, model: nn.Module | None = None) -> None:
        self._pass = sparse_pass
        # Options stay in Inductor's config, or with compiled code: a strong reference would keep the parameters alive.
        self._model = None if model is None else weakref.ref(model)

    def __call__(self, graph: Graph) -> None:
        module = graph.owning_module
        if module is not None:
            model = None if self._model is None else self._model()
            self._pass.see(captured(module, model, self._pass.patterns).names, Retrace(module))
            if is_logged():
                _report_after_compilation(self._pass)

    def uuid(self) -> str:
        return "sparse_pass"  # reads only

    def __getstate__(self) -> dict[str, object]:
        return {}  # torch 2.11 pickles this pass into the keys of its caches

    def __deepcopy__(self, memo: dict[int, Any]) -> SeeGraph:
        return self  # configs of Inductor are copied


def _report_after_compilation(sparse_pass: SparsePass) -> None:
    """Log what comes from a compile cache: nothing else calls the pass at the end of a compilation."""
    from torch._dynamo.callback import callback_handler

    if sparse_pass.catch_up not in callback_handler.end_callbacks:
        callback_handler.register_end_callback(sparse_pass.catch_up)


class Retrace:
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


def inductor_options(
    config: Config, options: Mapping[str, Any] | None = None, *, model: nn.Module | None = None
) -> dict[str, Any]:
    """Inductor options with the pass added: ``torch.compile(model, options=inductor_options(config))``.

    Also for ``torch._inductor.config.patch(inductor_options(config))``. Passes that ``options``, or else
    the global Inductor config, already have keep running, before this one. The report is at
    ``result["joint_custom_pre_pass"].report``.

    Args:
        config: names to schemes, as for :func:`sparse_backend`.
        options: Inductor options to build on; not changed.
        model: checks the names at once, and makes them absolute where parts of the model are compiled one by one. Which
            named layers no graph has read it cannot tell: for that use :func:`sparse_backend`.

    Raises:
        ValueError: bad config; with ``model``, what :func:`sparse_backend` refuses of names.
    """
    sparse_pass = SparsePass(config)
    if model is not None:
        model = unwrapped(model)
        check_names(model, sparse_pass.patterns)
    return with_pass(sparse_pass, dict(options or {}), SeeGraph(sparse_pass, model))


def with_pass(sparse_pass: SparsePass, options: dict[str, Any], see: SeeGraph | None = None) -> dict[str, Any]:
    """Options with the pass, and with what shows it the names of each graph, if nothing else does."""
    options = {key.replace("-", "_"): value for key, value in options.items()}
    options["joint_custom_pre_pass"] = _chained("joint_custom_pre_pass", options, sparse_pass)
    if see is not None:
        options["pre_grad_custom_pass"] = _chained("pre_grad_custom_pass", options, see)
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
