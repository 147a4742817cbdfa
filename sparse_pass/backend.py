"""The way in: a torch.compile backend."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeAlias, get_args

import torch
from torch import nn
from torch.fx import GraphModule

from .capture import compile_aot_eager
from .captured import Captured, captured
from .config import Config, Require, Tune
from .dynamo.recompiles import why_last
from .graph_pass import SparsePass
from .inductor import Retrace, with_pass
from .model_names import check_names, is_model_of, unwrapped
from .phases import Phase, report_of
from .report import Report
from .usage import by_position

Inner: TypeAlias = Literal["inductor", "aot_eager"]


class Switches(Protocol):
    """A schedule, which calls `SparseBackend.switch`."""

    def recipe(self) -> Callable[[SparseBackend], object]:
        """What makes this schedule again, for another backend; can be pickled."""


class SparseBackend:
    """A torch.compile backend; see :func:`sparse_backend`.

    Copies of it, as some trainers make, are the backend itself: there is one report. Pickled, it is made anew from its
    config, and takes the first model that fits the config for the one that names are names in; that of a part of a
    model then knows the names that its graphs have.
    """

    __name__ = "sparse_pass"

    def __init__(
        self,
        sparse_pass: SparsePass,
        model: nn.Module | None,
        inner: Inner,
        options: dict[str, Any],
        *,
        is_part: bool = False,
    ) -> None:
        self._pass = sparse_pass
        self._inner = inner
        self._options = options
        self._inductor: torch._TorchCompileInductorWrapper | None = None
        # Of a part no other process can tell whether a module is it.
        self._wants_model = model is not None and not is_part
        self._phase = Phase(self, sparse_pass, model)
        self._phases = {_key(sparse_pass.config): self._phase}
        self._called = False
        self.schedule: Switches | None = None

    def __call__(
        self,
        graph_module: GraphModule,
        inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        **_: Any,  # newer torch hands on more, such as the name given to torch.compile
    ) -> Callable[..., Any]:
        given = {**self._options, **(options or {})}
        phase, self._called = self._phase, True
        graph = self._look(graph_module, phase)
        if graph.names.ours:
            if self.schedule is not None:
                phase.guard.add()
            phase.watch.on_attempt()
            if last := why_last():
                phase.sparse_pass.note(last, graph.names)  # an error under strict: no later call can be watched
        compiled = self._compile(graph_module, inputs, graph, mode, given)
        model = phase.watch.model()
        if model is not None and graph.region.shared:
            compiled = phase.shared.observe(compiled, graph, model, phase.watch.settle)
        phase.watch.settle()
        return compiled

    def follow(self, schedule: Switches) -> None:
        """Be switched by a schedule from now on.

        Raises:
            ValueError: it has a schedule already, or has compiled something, which runs at all steps.
        """
        if self.schedule is not None:
            raise ValueError("this backend has a schedule: give the patterns that differ to one Schedule(patterns=...)")
        if self._called:
            raise ValueError("this backend has compiled graphs already: make its Schedule before the first call")
        self.schedule = schedule

    def switch(self, config: Config, steps: str) -> None:
        """Compute by another config from the next call on, and keep the graphs made so far for the way back.

        Args:
            config: keys as the backend's own.
            steps: of the schedule, in words.
        """
        key, before = _key(config), self._phase
        phase = self._phases.get(key)
        if phase is before and before.steps:
            return
        before.leave()
        if not before.steps:  # never used: its schedule has just been made
            del self._phases[_key(before.sparse_pass.config)]
            phase = None
        if phase is None:
            one = self._pass
            sparse_pass = SparsePass(config, strict=one.strict, tune=one.tune, require=one.require)
            phase = self._phases[key] = Phase(self, sparse_pass, before.watch.model(), steps)
            if self._called:
                phase.watch.on_attempt()  # what it watches is what is called already
        else:
            phase.enter()
        self._phase = phase

    def _look(self, graph_module: GraphModule, phase: Phase) -> Captured:
        model, patterns = phase.watch.model(), phase.sparse_pass.patterns
        graph = captured(graph_module, model, patterns)
        if self._wants_model and model is None:
            fitting = next((root for root in graph.roots if is_model_of(root, patterns)), None)
            if fitting is not None:
                phase.watch.take(fitting)
                graph = captured(graph_module, fitting, patterns)
        return graph

    def _compile(
        self,
        graph_module: GraphModule,
        inputs: Sequence[Any],
        graph: Captured,
        mode: str | None,
        options: dict[str, Any],
    ) -> Callable[..., Any]:
        sparse_pass = self._phase.sparse_pass
        if self._inner == "aot_eager":
            _refuse_options(mode, options)
            with sparse_pass.seeing(graph.names):
                return compile_aot_eager(graph_module, inputs, sparse_pass)
        retrace = Retrace(graph_module) if graph.names.ours else None
        with sparse_pass.seeing(graph.names, retrace):
            # What torch.compile(mode=..., options=...) would make of them, its errors included.
            options = with_pass(sparse_pass, options)
            self._inductor = torch._TorchCompileInductorWrapper(mode, options, None)
            return self._inductor(graph_module, inputs)  # type: ignore[no-any-return]

    def reset(self) -> None:
        """Called by torch.compile: let go of recorded CUDA graphs, as its own backend does."""
        if self._inductor is not None:
            self._inductor.reset()

    def __copy__(self) -> SparseBackend:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseBackend:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        one = self._pass
        settings = {"strict": one.strict, "tune": one.tune, "require": one.require}
        recipe = None if self.schedule is None else self.schedule.recipe()
        return _rebuilt, (one.config, settings, self._inner, self._options, self._wants_model), recipe

    def __setstate__(self, recipe: Callable[[SparseBackend], object]) -> None:
        recipe(self)

    @property
    def config(self) -> Config:
        """As it was given, whatever a schedule makes of it at the moment."""
        return self._pass.config

    @property
    def report(self) -> Report:
        """Every graph compiled so far, whether compiled now or taken from a cache."""
        return report_of(list(self._phases.values()), self._phase, self._pass.config)


def _refuse_options(mode: str | None, options: Mapping[str, Any]) -> None:
    if mode or options:
        raise ValueError(f"inner='aot_eager' takes no mode or Inductor options, got mode={mode!r}, options={options!r}")


def _key(config: Config) -> tuple[object, ...]:
    return tuple(config.items())


def _rebuilt(
    config: Config, settings: dict[str, Any], inner: Inner, options: dict[str, Any], wants_model: bool
) -> SparseBackend:
    """A backend that was pickled. Its model, if it had one, is the first that fits the config."""
    backend = SparseBackend(SparsePass(config, **settings), None, inner, options)
    backend._wants_model = wants_model
    return backend


def _hint(arguments: tuple[object, ...]) -> str:
    if isinstance(arguments[0], GraphModule):
        return "sparse_backend is no backend itself: write torch.compile(model, backend=sparse_backend(config))"
    if isinstance(arguments[1], nn.Module):
        return "give the model as a keyword: sparse_backend(config, model=model)"
    return f"sparse_backend takes the config alone by position, got {len(arguments)} arguments"


@by_position(1, _hint)
def sparse_backend(
    config: Config,
    *,
    model: nn.Module | None = None,
    whole: nn.Module | None = None,
    inner: Inner = "inductor",
    strict: bool = False,
    tune: Tune = "auto",
    require: Require | None = None,
    **inductor_options: Any,
) -> SparseBackend:
    """A backend for ``torch.compile(model, backend=...)`` that trains the named linears with 2:4 sparsity.

    Args:
        config: names to schemes, or to None (leave dense). ``blocks.0.mlp.fc1`` is an exact module or
            parameter name; ``*`` stands for anything inside one dotted part; ``re:...`` is a regular
            expression for the full name. An exact name beats patterns; among patterns the first wins.
        model: checks the names at once, makes them absolute where parts of the model are compiled one by one, and lets
            the backend tell which named layers no graph has read in the first step. No reference to its parameters is
            kept by the compiled code.
        whole: the model that ``model`` is a part of, as a stage of a pipeline is: names are names in it and checked
            against it, so that one config serves all ranks. Only names and shapes count; it may be on the meta device.
        inner: what compiles the rewritten graphs: ``"inductor"``, or ``"aot_eager"`` (runs op by op).
        strict: raise where a named linear would be skipped, and with ``model`` where one trains dense in the first
            step since no graph has read it.
        tune: ``"auto"`` or ``"off"``; see :class:`SparsePass`.
        require: ``"sparse"`` raises where a named linear on a CUDA device ends without any 2:4 kernel for another
            reason than a measurement, so that a job stops instead of training without them.
        **inductor_options: options for Inductor; give ``mode=`` and ``options=`` to torch.compile.

    Returns:
        SparseBackend: hand it to torch.compile; ``.report`` says what became of each named linear.

    Raises:
        ValueError: bad config or argument; with ``model``, a pattern that names no linear weight (lists
            the closest names) or an exactly named weight that cannot be 2:4 sparse.
        RuntimeError: an option that Inductor does not know.
        TypeError: arguments that are not for it, with what to write instead.
    """
    if inner not in get_args(Inner):
        raise ValueError(f"inner={inner!r}: expected one of {', '.join(map(repr, get_args(Inner)))}")
    for argument in inductor_options.keys() & {"mode", "options"}:
        raise ValueError(
            f"{argument}= is an argument of torch.compile: torch.compile(model, backend=sparse_backend(...),"
            f" {argument}=...); options of Inductor are keywords here, such as max_fusion_size=8"
        )
    sparse_pass = SparsePass(config, strict=strict, tune=tune, require=require)
    if model is not None:
        model = unwrapped(model)
        check_names(model if whole is None else unwrapped(whole), sparse_pass.patterns)
    elif whole is not None:
        raise ValueError("whole= says what model= is a part of: give the part, too, such as the stage of this rank")
    if inner == "aot_eager":
        _refuse_options(None, inductor_options)
    else:
        _check_options(inductor_options)
    return SparseBackend(sparse_pass, model, inner, inductor_options, is_part=whole is not None)


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse what Inductor does not know, in one line. Its own message lists all that it knows."""
    known = torch._inductor.config.get_config_copy()
    for name in options:
        if name.replace("-", "_") not in known:
            close = difflib.get_close_matches(name, known, n=5)
            raise RuntimeError(
                f"{name!r} is neither an argument of sparse_backend nor an option of Inductor;"
                f" closest: {', '.join(map(repr, close)) or 'none'} (torch._inductor.list_options() has all)"
            )
    torch._TorchCompileInductorWrapper(None, dict(options), None)  # raises for values of another type
