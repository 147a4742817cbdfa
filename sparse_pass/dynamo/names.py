"""Names of the parameters that a graph reads: by which parameter of which module each input is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule

from ..fqn import AllNames, from_source, normalize
from ..model_names import linear_weights, names_by_identity
from ..shards import Sharding, sharding_of
from .sources import Input, is_of_optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class InputNames:
    """What is known of the names in one graph."""

    by_input: Mapping[int, tuple[str, ...]]
    """By position of the input: `AllNames` where the parameter itself is known. Empty for what is known to be no linear
    weight, or to be of another model."""
    by_attribute: Mapping[str, tuple[str, ...]]
    """Of parameters that are attributes of the graph."""
    of_model: bool
    """False where modules lead to the parameters, and none of them is the model's: it is a copy."""


def input_names(graph_module: GraphModule, inputs: Sequence[Input], model: nn.Module | None = None) -> InputNames:
    """Names of the parameters of a graph that Dynamo captured.

    Args:
        graph_module: as Dynamo hands it to a backend.
        inputs: its `parameter_inputs`.
        model: makes names absolute where the graph is that of a part of the model. Parameters of other models in the
            same graph, such as a teacher, have no names then.
    """
    own = _Names(model) if model is not None else None
    found: dict[int, tuple[str, ...]] = own.known(inputs) if own is not None else {}
    others = bool(found)  # in a graph of this model
    roots: dict[int, _Names] = {}
    for one in inputs:
        if one.index in found:
            continue
        holder = one.way[0].module if one.way else None
        if own is not None and others and holder is not None and not own.holds(one):
            found[one.index] = ()
            continue
        names: tuple[str, ...] | None = None
        if holder is not None and not (own is not None and own.holds(one)):
            # Not of the model in hand: there is none, or this is a copy of it.
            root = roots.setdefault(id(holder), _Names(holder))
            names = root.of(one)
        if names is None and (path := from_source(one.text)):
            names = (own.ending(path) if own is not None else ()) or (path,)
        if names is not None:
            found[one.index] = names
    by_attribute: dict[str, tuple[str, ...]] = {}
    for name, parameter in graph_module.named_parameters():
        if is_of_optimizer(name):
            by_attribute[name] = ()
        elif own is not None and id(parameter) in own.by_identity:
            by_attribute[name] = own.by_identity[id(parameter)]
    ways = [one for one in inputs if one.way]
    of_model = others or own is None or not ways or any(own.holds(one) for one in ways)
    return InputNames(by_input=found, by_attribute=by_attribute, of_model=of_model)


def read_names(graph_module: GraphModule, names: Mapping[int, tuple[str, ...]]) -> frozenset[str]:
    """Names of the inputs that a graph reads by more than looking up rows, as an embedding does."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    return frozenset(
        name
        for index, several in names.items()
        if any("embedding" not in str(user.target) for user in placeholders[index].users)
        for name in several
    )


def parameter_shardings(graph_module: GraphModule, inputs: Sequence[Input]) -> dict[int, Sharding]:
    """How ranks share the inputs that are DTensors, by position."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    values = {one.index: placeholders[one.index].meta.get("example_value") for one in inputs}
    found = {index: sharding_of(value) for index, value in values.items() if hasattr(value, "placements")}
    return {index: sharding for index, sharding in found.items() if sharding is not None}


class _Names:
    """The names of one model's parameters and modules."""

    def __init__(self, model: nn.Module) -> None:
        self.by_identity = names_by_identity(model)
        self._linear = linear_weights(model)
        self._modules: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            self._modules.setdefault(id(module), []).append(name)

    def of(self, one: Input) -> AllNames | None:
        """All names of an input; None if it is not known to be of this model."""
        if id(one.value) in self.by_identity:
            return AllNames(self.by_identity[id(one.value)])
        if not one.leaf or id(one.way[-1].module) not in self._modules:
            return None
        # FSDP and others put another tensor in the place of the parameter for the length of a call.
        owners = self._modules[id(one.way[-1].module)]
        names = [(normalize(owner), normalize(f"{owner}.{one.leaf}" if owner else one.leaf)) for owner in owners]
        matrix = getattr(one.value, "ndim", 0) == 2
        return AllNames(name for owner, name in names if not matrix or owner in self._linear or name in self._linear)

    def known(self, inputs: Sequence[Input]) -> dict[int, tuple[str, ...]]:
        return {one.index: names for one in inputs if (names := self.of(one)) is not None}

    def holds(self, one: Input) -> bool:
        """Whether the way to an input leads through this model."""
        return any(id(place.module) in self._modules for place in one.way)

    def ending(self, path: str) -> tuple[str, ...]:
        """The names of the one parameter whose name ends in ``path``; none if several do."""
        same = {name: names for names in self.by_identity.values() for name in names if f".{name}".endswith(f".{path}")}
        return next(iter(same.values())) if len(set(same.values())) == 1 else ()
