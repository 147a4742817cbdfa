"""The backend that torch.compile knows by name: ``torch.compile(model, backend="sparse_pass", options={...})``.

torch finds it by the entry point ``torch_dynamo_backends`` of the installed package, for programs whose only way in is
the name of a backend, such as a trainer's flag.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from .backend import SparseBackend, sparse_backend
from .captured import captured
from .config import Scheme
from .dynamo.callers import calling_modules
from .fqn import Pattern, parse_config
from .model_names import is_model_of, unwrapped
from .report import Report
from .serialize import config_to_dict, load_config

VARIABLE = "SPARSE_PASS_CONFIG"
"""Environment variable: the path of a JSON or YAML file with the config, or the config as JSON."""


class RegisteredBackend:
    """The backend ``"sparse_pass"``. Its options are the arguments of :func:`sparse_backend`.

    ``options={"config": ...}`` is a config: a mapping of names to schemes or to their plain form (see
    :func:`config_from_dict`), or the path of a JSON or YAML file. Without it the environment variable
    ``SPARSE_PASS_CONFIG`` has the path, or the config as JSON. ``strict``, ``tune``, ``require`` and ``inner`` are
    those of :func:`sparse_backend`; all other options go to Inductor.

    Names are names in the outermost module that is being called and in which every name of the config names a linear
    weight: the model, also where parts of it are compiled one by one. Where there is none, names are those in the
    graph, and what names nothing is in the report as unmatched.
    """

    __name__ = "sparse_pass"

    def __init__(self) -> None:
        # A backend for each model, and one for the graphs of no model, by all that it was made with.
        self._of_models: weakref.WeakKeyDictionary[nn.Module, dict[str, SparseBackend]] = weakref.WeakKeyDictionary()
        self._of_none: dict[str, SparseBackend] = {}

    def __call__(
        self,
        graph_module: GraphModule,
        inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Callable[..., Any]:
        given = dict(options or {})
        config = _config(given.pop("config", None))
        for name in given.keys() & {"model", "whole"}:
            raise ValueError(f"backend='sparse_pass' finds the model itself: leave the option {name!r} out")
        backend = self._backend(graph_module, config, given)
        return backend(graph_module, inputs, mode=mode)

    def _backend(
        self, graph_module: GraphModule, config: Mapping[str, Scheme | None], options: dict[str, Any]
    ) -> SparseBackend:
        key = repr((config_to_dict(config), sorted(options.items())))
        model = self._model(captured(graph_module, None).roots, parse_config(config), key)
        kept = self._of_none if model is None else self._of_models.setdefault(model, {})
        if key not in kept:
            kept[key] = sparse_backend(config, model=model, **options)
        return kept[key]

    def _model(self, roots: Sequence[nn.Module], patterns: Sequence[Pattern], key: str) -> nn.Module | None:
        """The model that a graph is of, known by the modules that its frame holds."""
        known = [model for model, kept in self._of_models.items() if key in kept]
        if not roots:  # a graph without parameters, as after a graph break
            return known[-1] if known else None
        held = set(roots)
        # Of parts that are compiled by themselves the frame holds the part alone.
        part_of = [model for model in known if not held.isdisjoint(model.modules())]
        if part_of:
            return part_of[0]
        candidates = (*(unwrapped(one) for one in calling_modules(roots)), *roots)
        return next((one for one in candidates if is_model_of(one, patterns)), None)

    def reset(self) -> None:
        """Called by torch.compile: let go of recorded CUDA graphs, as its own backend does."""
        for kept in (*self._of_models.values(), self._of_none):
            for one in kept.values():
                one.reset()

    @property
    def report(self) -> Report:
        """Every graph that was compiled by this name so far, of all models that are alive."""
        reports = [one.report for kept in (*self._of_models.values(), self._of_none) for one in kept.values()]
        if not reports:
            return Report(notes=("no graph was compiled by backend='sparse_pass' yet",))
        merged = reports[0]
        for one in reports[1:]:
            merged = replace(
                merged,
                sites=merged.sites + one.sites,
                unmatched=tuple(dict.fromkeys(merged.unmatched + one.unmatched)),
                notes=tuple(dict.fromkeys(merged.notes + one.notes)),
                graphs=merged.graphs + one.graphs,
                inference_graphs=merged.inference_graphs + one.inference_graphs,
                uncaptured=tuple(dict.fromkeys(merged.uncaptured + one.uncaptured)),
            )
        return merged


def _config(given: Any) -> dict[str, Scheme | None]:
    source = os.environ.get(VARIABLE) if given is None else given
    if not source:
        raise ValueError(
            "backend='sparse_pass' has no config: give torch.compile(..., options={'config': ...}), a mapping of names"
            f" to schemes or the path of a JSON or YAML file, or set the environment variable {VARIABLE} to a path."
            " sparse_pass.suggest(model)(x) proposes one"
        )
    return load_config(source)


backend = RegisteredBackend()
"""What the entry point names; ``torch._dynamo.lookup_backend("sparse_pass")`` is this object."""
