"""Names of the linear weights of a model, and of the inputs of a graph that Dynamo captured from it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from torch import nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy

from .config import weight_scheme
from .fqn import Pattern, choose, from_source, nearest, normalize
from .legal import why_shape_skipped


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter | None]:
    """Every name by which a config may call a 2-D weight: parameter names, and module names of ``*.weight``.

    The value is None where a linear module computes its weight, as parametrizations do. Tables of embeddings
    are no linear weights, unless a linear shares them, nor are the weights of ``nn.LSTM`` and its like, which
    Dynamo does not capture. Names are in normal form.
    """
    weights: dict[str, nn.Parameter | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.RNNBase)):
            continue
        if isinstance(module, nn.Linear) and "weight" not in module._parameters and normalize(name):
            weights[normalize(name)] = None
        for leaf, parameter in module._parameters.items():
            if parameter is None or is_lazy(parameter) or parameter.dim() != 2:
                continue
            weights[normalize(f"{name}.{leaf}" if name else leaf)] = parameter
            if leaf == "weight" and normalize(name):
                weights[normalize(name)] = parameter
    return weights


def check_names(model: nn.Module, patterns: Iterable[Pattern]) -> None:
    """Refuse, before anything is captured, what cannot work on this model.

    Raises:
        ValueError: no module, a pattern that names no linear weight (lists the closest names) or one without a
            shape yet, or an exactly named weight that cannot be 2:4 sparse (gives its shape and the rule).
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r}: expected an nn.Module, whose layers the config names")
    weights = linear_weights(model)
    lazy = [normalize(name) for name, parameter in model.named_parameters() if is_lazy(parameter)]
    for pattern in patterns:
        for name in lazy:
            if pattern.names([name, name.removesuffix(".weight")]):
                raise ValueError(f"{pattern.text!r} names {name!r}, which has no shape yet: run the model once first")
        named = [name for name in weights if pattern.names([name])]
        if not named:
            for raw, parameter in model.named_parameters(remove_duplicate=False):
                if (
                    parameter.dim() > 2
                    and pattern.exact
                    and pattern.names([normalize(raw), normalize(raw.removesuffix(".weight"))])
                ):
                    shape = list(parameter.shape)
                    raise ValueError(
                        f"{pattern.text!r} is no linear weight of {type(model).__name__}: its shape is {shape}, and"
                        " 2:4 masks are defined for 2-D weights of linear layers"
                    )
            close = nearest(pattern.text.removeprefix("re:"), weights)
            count = len({name if weight is None else id(weight) for name, weight in weights.items()})
            known = ", ".join(map(repr, close)) if close else f"none; the model has {count} linear weight(s)"
            raise ValueError(
                f"{pattern.text!r} names no linear weight of {type(model).__name__}; closest names: {known}"
            )
        weight = weights[named[0]]
        if pattern.exact and pattern.scheme is not None and weight is not None:
            reason = why_shape_skipped(weight.shape)
            if weight_scheme(pattern.scheme) is None and any(dim % 4 == 0 and dim for dim in weight.shape):
                reason = None  # only K counts, and which of the dims it is shows in the graph
            if reason:
                raise ValueError(f"{pattern.text!r} cannot be sparsified: {reason}")


def chosen_weights(model: nn.Module, patterns: Sequence[Pattern]) -> list[tuple[str, nn.Parameter | None, Pattern]]:
    """The weights that the patterns choose, each once, under its best name (a module's before a parameter's)."""
    names: dict[object, list[str]] = {}
    weights = linear_weights(model)
    for name, parameter in weights.items():
        names.setdefault(name if parameter is None else id(parameter), []).append(name)
    found = []
    for known in names.values():
        known.sort(key=lambda name: name.endswith("weight"))
        pattern = choose(patterns, known)
        if pattern is not None and pattern.scheme is not None:
            found.append((known[0], weights[known[0]], pattern))
    return found


def names_by_identity(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """All names of each parameter; of a 2-D weight those that `linear_weights`, and with it `check_names` and `prune_`,
    knows: not that of the table of embeddings that a linear shares."""
    linear = linear_weights(model)
    names: dict[int, tuple[str, ...]] = {}
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        name, known = normalize(raw), names.get(id(parameter), ())
        other = is_lazy(parameter) or parameter.dim() != 2
        names[id(parameter)] = (*known, name) if other or name in linear else known
    return names


def input_names(graph_module: GraphModule, model: nn.Module | None = None) -> dict[int, tuple[str, ...]]:
    """Parameter names by position of the graph input.

    Args:
        graph_module: as Dynamo hands it to a backend; its placeholders know where they came from.
        model: makes names absolute where the graph is that of a part of the model. 2-D weights have the names
            that `linear_weights` knows then; those without any, and the parameters of other models in the same
            graph, have an empty tuple.
    """
    by_identity = {} if model is None else names_by_identity(model)
    parameters = list(_parameter_inputs(graph_module))
    holders = {_holder(text) for _, text, example in parameters if id(example) in by_identity}
    found: dict[int, tuple[str, ...]] = {}
    for index, text, example in parameters:
        path = from_source(text)
        if id(example) in by_identity:
            found[index] = by_identity[id(example)]
        elif holders and _holder(text) not in holders:
            found[index] = ()  # of another model, such as the teacher of this one
        elif path:
            # FSDP swaps parameters, so identity can fail where the path does not.
            known = () if model is None else model.named_parameters(remove_duplicate=False)
            longer = {normalize(name): id(one) for name, one in known if f".{normalize(name)}".endswith(f".{path}")}
            found[index] = by_identity[next(iter(longer.values()))] if len(longer) == 1 else (path,)
    return found


def read_names(graph_module: GraphModule, names: Mapping[int, tuple[str, ...]]) -> set[str]:
    """Names of the inputs that a graph reads by more than looking up rows, as an embedding does."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    return {
        name
        for index, several in names.items()
        if any("embedding" not in str(user.target) for user in placeholders[index].users)
        for name in several
    }


def uncaptured(model: nn.Module, patterns: Sequence[Pattern], read: Set[str]) -> dict[str, Pattern]:
    """The linears that the patterns choose and of which ``read`` has no name, each with its pattern."""
    weights = linear_weights(model)
    seen = {id(weights[name]) for name in read if weights.get(name) is not None}
    # A linear that computes its weight reads what lies below its own name.
    below = {name[:end] for name in read for end, character in enumerate(name) if character == "."}
    return {
        name: pattern
        for name, weight, pattern in chosen_weights(model, patterns)
        if name not in read and (name not in below if weight is None else id(weight) not in seen)
    }


def _parameter_inputs(graph_module: GraphModule) -> Iterator[tuple[int, str, object]]:
    """Position, source and value of the inputs that are parameters."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for index, node in enumerate(placeholders):
        source = getattr(node, "_dynamo_source", None)
        if source is None:
            continue
        text = source.name if isinstance(source.name, str) else source.name()
        argument = node.meta.get("grapharg")
        example = argument.example if argument is not None else None
        if "_parameters[" in text or isinstance(example, nn.Parameter):
            yield index, text, example


def _holder(source: str) -> str:
    """What holds the model that the parameter is of: ``L['self'].net``."""
    return re.split(r"\._(?:modules|parameters)\[", source, maxsplit=1)[0]
