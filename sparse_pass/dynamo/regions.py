"""Keep parts of a model apart that Dynamo would let share one compiled graph.

``for block in model.blocks: block.compile(backend=...)`` runs one forward for all blocks, so Dynamo
reuses the graph of the first block wherever its guards hold. That is right while the config treats all
blocks alike. Where it does not, a guard on the block lets only blocks that are treated alike share.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch._dynamo.guards import GuardBuilder, get_verbose_code_parts
from torch._dynamo.source import LocalSource
from torch._guards import Guard, Source, TracingContext

from ..config import Scheme
from ..fqn import Pattern, choose, normalize
from ..model_names import linear_weights, names_by_identity
from .sources import Input, Place


@dataclass(frozen=True, slots=True)
class Region:
    """The part of a model that a graph was captured from."""

    name: str = ""
    """Of the module, in normal form; "" for the whole model, or for several parts at once."""
    shared: bool = False
    """Whether other parts of the model may run the same graph."""

    def own(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names of a weight, those that it has in this part first."""
        return type(names)(sorted(names, key=lambda name: not (self.name and name.startswith(self.name + "."))))


def guard_region(inputs: Sequence[Input], model: nn.Module, patterns: Sequence[Pattern]) -> Region:
    """Guard a graph that Dynamo captured from parts of ``model``; a no-op for the whole model.

    Args:
        inputs: the `parameter_inputs` of the graph. The first module on the way to each that is one of the model's is
            the part that runs.
    """
    paths: dict[int, str] = {}
    for name, module in model.named_modules():
        paths.setdefault(id(module), name)
    parts: dict[int, Place] = {}
    for one in inputs:
        place = next((place for place in one.way if id(place.module) in paths), None)
        if place is not None:
            parts.setdefault(id(place.module), place)
    # Handed over by themselves, as to a function of a weight: that may be called with any other one.
    alone = [one for one in inputs if not one.way]
    if id(model) in parts or not (parts or alone):
        return Region()
    chosen = _chosen(model, patterns)
    alike = [_guard_part(place, paths[part], model, chosen) for part, place in parts.items()]
    alike += [_guard_weight(one, model, chosen) for one in alone]
    name = normalize(paths[next(iter(parts))]) if len(parts) == 1 else ""
    return Region(name, any(count > 1 for count in alike))


def _guard_part(place: Place, path: str, model: nn.Module, chosen: Mapping[str, Scheme | None]) -> int:
    """Guard one part if the config treats another one of its class otherwise. Returns how many are treated alike."""
    treated = _below(normalize(path), chosen)
    same_class = [(name, module) for name, module in model.named_modules() if type(module) is type(place.module)]
    alike = frozenset(id(module) for name, module in same_class if _below(normalize(name), chosen) == treated)
    if len(alike) < len(same_class):
        _add_guard(place.source, alike, normalize(path))
    return len(alike)


def _guard_weight(one: Input, model: nn.Module, chosen: Mapping[str, Scheme | None]) -> int:
    """The same for a parameter that no module leads to. 0 if it is none of the model's linear weights."""
    schemes: dict[int, Scheme | None] = {}
    for name, weight in linear_weights(model).items():
        if weight is not None:
            schemes[id(weight)] = schemes.get(id(weight)) or chosen[name]
    if id(one.value) not in schemes:
        return 0
    alike = frozenset(weight for weight, scheme in schemes.items() if scheme == schemes[id(one.value)])
    if len(alike) < len(schemes):
        _add_guard(one.source, alike, "the one that it was compiled for")
    return len(alike)


def _chosen(model: nn.Module, patterns: Sequence[Pattern]) -> dict[str, Scheme | None]:
    # A name of a parameter names it in all parts that share it.
    weights, shared = linear_weights(model), names_by_identity(model)
    decisions = {name: choose(patterns, [name, *shared.get(id(weight), ())]) for name, weight in weights.items()}
    return {name: pattern.scheme if pattern else None for name, pattern in decisions.items()}


def _below(prefix: str, chosen: Mapping[str, Scheme | None]) -> dict[str, Scheme | None]:
    start = prefix + "."
    return {name[len(start) :]: scheme for name, scheme in chosen.items() if name.startswith(start)}


def _add_guard(source: Source, alike: frozenset[int], name: str) -> None:
    def SPARSE_PASS_REGION(builder: GuardBuilder, guard: Guard) -> None:
        builder.get_guard_manager(guard).add_lambda_guard(
            lambda value: id(value) in alike,
            get_verbose_code_parts([f"{guard.name} is treated by sparse_pass as {name} is"], guard),
            guard.user_stack,
        )
        if isinstance(source, LocalSource):
            # As Dynamo's own guards on a module do: recompile_limit then counts the graphs of each module, not
            # those of all treatments, which would soon use it up.
            builder.id_matched_objs[source.local_name] = weakref.ref(builder.get(guard))

    context = TracingContext.try_get()
    if context is not None:
        context.guards_context.dynamo_guards.add(source.make_guard(SPARSE_PASS_REGION))
