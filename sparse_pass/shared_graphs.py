"""Which parts of a model run the graph of one of them: seen in the calls, since Dynamo does not tell.

Parts that are compiled one by one share a graph where Dynamo's guards hold. The graph takes the parameters as inputs,
so each call shows whose they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from .captured import Captured
from .graph.parameters import Names
from .model_names import names_by_identity
from .report import Report, Site


@dataclass(slots=True, eq=False)
class _Readers:
    """What one graph was called with."""

    known: dict[int, tuple[str, ...]]
    """Names by position of the input, those of the part that the graph was captured from."""
    names: dict[int, list[tuple[str, ...]]] = field(default_factory=dict)
    """Names of what else stood there in a call."""
    seen: set[int] = field(default_factory=set)
    """Ids of parameters that stood there."""


class SharedGraphs:
    """The calls of the graphs of one backend that parts of a model may share."""

    def __init__(self) -> None:
        self._readers: dict[Names, _Readers] = {}
        self.served: set[str] = set()
        """Names of the parameters that a graph was called with and had not been captured with."""

    def observe(
        self, compiled: Callable[..., Any], graph: Captured, model: nn.Module, changed: Callable[[], None]
    ) -> Callable[..., Any]:
        """The compiled graph, with a look at its parameters in each call.

        changed: called when a call has shown a new parameter.
        """
        known = {index: names for index, names in graph.names.by_input.items() if names}
        readers = self._readers[graph.names] = _Readers(known)
        readers.seen.update(id(one.value) for one in graph.inputs)
        its_model = weakref.ref(model)

        def call(*inputs: Any) -> Any:
            if any(id(inputs[index]) not in readers.seen for index in known):
                self._see(readers, inputs, its_model())
                changed()
            return compiled(*inputs)

        return call

    def _see(self, readers: _Readers, inputs: Sequence[Any], model: nn.Module | None) -> None:
        names = {} if model is None else names_by_identity(model)
        for index, own in readers.known.items():
            if id(inputs[index]) not in readers.seen:
                readers.seen.add(id(inputs[index]))
                other = names.get(id(inputs[index]), ())
                if other and set(other).isdisjoint(own) and other not in readers.names.setdefault(index, []):
                    readers.names[index].append(other)
                    self.served.update(other)

    def told(self, names: Names | None, report: Report) -> Report:
        """A report whose rows say which other layers ran them."""
        readers = self._readers.get(names) if names is not None else None
        if readers is None or not readers.names:
            return report
        sites = []
        for site in report.sites:
            index = next((i for i, own in readers.known.items() if site.fqn in _modules(own) or site.fqn in own), None)
            is_module = index is not None and site.fqn not in readers.known[index]
            others = readers.names.get(index, []) if index is not None else []
            serves = tuple((_modules(other) if is_module else other)[0] for other in others)
            sites.append(replace(site, serves=serves))
        return replace(report, sites=tuple(sites), notes=(*report.notes, *_notes(sites)))


def with_sharing(report: Report, sharing: Sequence[tuple[tuple[str, ...], ...]]) -> Report:
    """A report whose rows say which layers run the graph of a region that bears the name of one of them."""
    sites = list(report.sites)
    for place, site in enumerate(sites):
        for group in sharing:
            modules = [(_modules(names)[0], *names) for names in group]
            own = next((names for names in modules if site.fqn in names), None)
            if own is not None:
                at = own.index(site.fqn)
                serves = tuple(names[at] for names in modules if names is not own)
                sites[place] = replace(site, serves=serves)
    return replace(report, sites=tuple(sites), notes=(*report.notes, *_notes(sites)))


def _notes(sites: Sequence[Site]) -> list[str]:
    parts: dict[str, list[str]] = {}
    for site in sites:
        for name in site.serves:
            part, other = _parts(site.fqn, name)
            if other not in parts.setdefault(part, []):
                parts[part].append(other)
    return [f"the graph of {part} also serves {', '.join(others)}" for part, others in parts.items()]


def _parts(one: str, other: str) -> tuple[str, str]:
    """Two names without the dotted parts at the end that they have in common."""
    left, right = one.split("."), other.split(".")
    while len(left) > 1 and len(right) > 1 and left[-1] == right[-1]:
        left, right = left[:-1], right[:-1]
    return ".".join(left), ".".join(right)


def _modules(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.removesuffix(".weight") for name in names if name.endswith(".weight")) or tuple(names)
