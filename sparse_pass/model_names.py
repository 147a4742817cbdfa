"""Names of the linear weights of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

from torch import nn
from torch.nn.parameter import is_lazy

from .config import input_scheme, weight_scheme
from .fqn import Pattern, choose, nearest, normalize
from .plan.legal import why_shape_skipped


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter | None]:
    """Every name by which a config may call a 2-D weight: parameter names, and module names of ``*.weight``.

    The value is None where a linear module computes its weight, as parametrizations do, or where the tensor of its
    shape is kept elsewhere between the calls, as FSDP1 does. Tables of embeddings
    are no linear weights, unless a linear shares them, nor are the weights of ``nn.LSTM`` and its like, which
    Dynamo does not capture. Names are in normal form.
    """
    weights: dict[str, nn.Parameter | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.RNNBase)):
            continue
        if isinstance(module, nn.Linear) and _is_elsewhere(module) and normalize(name):
            weights[normalize(name)] = None
        for leaf, parameter in module._parameters.items():
            if parameter is None or is_lazy(parameter) or parameter.dim() != 2:
                continue
            weights[normalize(f"{name}.{leaf}" if name else leaf)] = parameter
            if leaf == "weight" and normalize(name):
                weights[normalize(name)] = parameter
    return weights


def _is_elsewhere(linear: nn.Linear) -> bool:
    weight = linear._parameters.get("weight")
    return weight is None or (not is_lazy(weight) and weight.dim() != 2)


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
                " (if this is a part of a model, as a pipeline stage is, give the model as whole=)"
            )
        weight = weights[named[0]]
        if pattern.exact and pattern.scheme is not None and weight is not None:
            reason = why_shape_skipped(weight.shape)
            if weight_scheme(pattern.scheme) is None:
                # Of a 2:4 input only K counts, and which of the dims it is shows in the graph.
                takes = input_scheme(pattern.scheme) is None or any(dim % 4 == 0 and dim for dim in weight.shape)
                reason = None if takes else reason
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


def is_model_of(module: nn.Module, patterns: Sequence[Pattern]) -> bool:
    """Whether the names of a config are names in this module."""
    try:
        check_names(module, patterns)
    except ValueError:
        return False
    return True


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` wraps. The wrapper may be gone soon, the module is the user's."""
    return getattr(model, "_orig_mod", model)
