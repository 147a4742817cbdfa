"""Find the matmuls of linear layers in a captured ATen graph. Reads the graph, never edits it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from ..fqn import AllNames, from_source
from ..shards import Sharding
from .backward import tangent_dependent
from .calls import complete
from .derived import Derived, derive
from .gemms import Linear, Use, aten, operands, strip_moves, weight_places
from .inputs import input_of
from .parameters import multiplying_readers, other_readers
from .whole_step import step_backward, with_step_gradients


@dataclass(frozen=True, slots=True)
class OtherWeight:
    """A parameter of two dims or more of which no matmul was found, but other ops that read it."""

    node: Node
    names: tuple[str, ...]
    """The name of the module whose ``weight`` it is comes first."""
    readers: tuple[str, ...]
    """Ops that read it, as they are spelt in the graph."""
    as_input: tuple[str, ...]
    """Names of the linears whose input it is."""


@dataclass(frozen=True, slots=True)
class Found:
    """What there is in a graph."""

    linears: tuple[Linear, ...]
    """Each call of one, in graph order."""
    others: tuple[OtherWeight, ...]
    nameless: bool
    """Whether there are matmuls, and none carries the name of a module."""


def find_linears(
    graph: Graph,
    parameters: Mapping[Node, tuple[str, ...]],
    shardings: Mapping[Node, Sharding] | None = None,
    *,
    whole_step: bool = False,
) -> Found:
    """All linears of a joint, inference or exported ATen graph.

    Args:
        graph: functional ATen graph.
        parameters: names of the placeholders (or get_attr nodes) known to be parameters; none for parameters
            known to be of another model, or to be no linear weight. Placeholders that are not in it count as
            weights only where a linear module reads them.
        shardings: how ranks share those that are shards.
        whole_step: whether the graph is that of a whole training step, see `whole_step`.
    """
    backward = step_backward(graph, parameters) if whole_step else tangent_dependent(graph)
    derived = derive(graph, backward)
    forward: list[Linear] = []
    # Forward GEMMs that read a weight and are no linears: their backward is not the linear's.
    others: dict[Node, list[Use]] = {}
    stacks: set[bool] = set()
    for node in derived.matmuls:
        if node not in backward:
            stacks.add(bool(node.meta.get("nn_module_stack")))
            linear = _forward_linear(node, parameters, derived)
            if linear is not None:
                forward.append(linear)
            else:
                for use, root, _ in operands(node):
                    for weight in {root, *derived.holds.get(root, ())}:
                        others.setdefault(weight, []).append(use)
    forward = complete(graph, forward, others, backward, derived)
    if whole_step:
        forward = with_step_gradients(forward, backward)
    linears = _tell_apart(forward, parameters)
    if shardings:
        linears = tuple(replace(one, sharding=shardings.get(one.weight)) for one in linears)
    return Found(linears, tuple(_other_weights(parameters, linears, backward)), stacks == {False})


def _other_weights(
    parameters: Mapping[Node, tuple[str, ...]], linears: Sequence[Linear], backward: Set[Node]
) -> Iterator[OtherWeight]:
    """Weights that the graph reads, but by no matmul that could be found: fused ops, products, branches.

    Of more than two dims those of matmuls, as of the experts of a grouped one, and not the kernels of convolutions.
    """
    found = {linear.weight for linear in linears}
    named = {name for linear in linears for name in linear.names}
    for node, names in parameters.items():
        value = node.meta.get("val")
        if node in found or not isinstance(value, torch.Tensor) or value.dim() < 2 or not named.isdisjoint(names):
            continue
        readers = other_readers(node, backward) if value.dim() == 2 else multiplying_readers(node)
        if readers:
            owners = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
            as_input = [linear.names[0] for linear in linears if _is_input(node, linear)]
            known = tuple(dict.fromkeys([*owners, *names]))
            yield OtherWeight(node, known, tuple(readers), tuple(dict.fromkeys(as_input)))


def _is_input(node: Node, linear: Linear) -> bool:
    input = input_of(linear.output)
    return input is not None and strip_moves(input.node)[0] is node


def _tell_apart(linears: list[Linear], parameters: Mapping[Node, tuple[str, ...]]) -> tuple[Linear, ...]:
    """Drop or mark the linears whose module name means, or could mean, another weight, as of a LoRA matrix.

    A tensor without a name that a linear module multiplies by stands for the module's weight only if the
    module multiplies by nothing else.
    """
    named = {name for one in linears if one.weight in parameters for name in one.names}
    linears = [one for one in linears if one.weight in parameters or named.isdisjoint(one.names)]
    weights: dict[tuple[str, ...], set[Node]] = {}
    for one in linears:
        if one.weight not in parameters:
            weights.setdefault(one.names, set()).add(one.weight)
    reason = (
        "the module multiplies by {} weights and their names are not visible to a pass that sees the ATen graph only;"
        " use sparse_backend or inductor_options"
    )
    return tuple(
        replace(one, ambiguous=reason.format(len(weights[one.names])))
        if one.weight not in parameters and len(weights[one.names]) > 1
        else one
        for one in linears
    )


def _forward_linear(gemm: Node, parameters: Mapping[Node, tuple[str, ...]], derived: Derived) -> Linear | None:
    stack = list((gemm.meta.get("nn_module_stack") or {}).values())
    module, kind = (from_source(stack[-1][0]), stack[-1][1]) if stack else ("", None)
    in_linear = _is_linear_module(kind)
    read = [
        (use, weight, layout, weight is not root)
        for use, root, layout in operands(gemm)
        for weight in [_computed_from(root, parameters, derived, module if in_linear else None) or root]
    ]
    # A linear module may multiply from the left: then what stands in the usual place is the input. A weight that is
    # read as it is comes before one that something is computed from, which may be an input that a table was added to.
    read.sort(key=lambda one: (not _owners(parameters.get(one[1], ()), module), one[3] and not in_linear))
    for use, weight, layout, computes in read:
        known = parameters.get(weight)
        canonical = use.operand is gemm.args[weight_places(gemm)[0][0]]
        if known is not None:
            names = _names(known, module, in_linear)
            if in_linear:
                # A table of embeddings that the linear shares goes by the linear's name here.
                tables = _lookups(weight)
                names = tuple(name for name in names if name.removesuffix(".weight") not in tables)
        elif in_linear and module and canonical:
            names = (module,)
        else:
            continue
        if not names:
            continue
        if strip_moves(use.operand)[0] in derived.masked:
            return None
        sources = [strip_moves(other)[0] for other in gemm.args if isinstance(other, Node)]
        if sum(weight in {source, *derived.holds.get(source, ())} for source in sources) > 1:
            return None  # a weight times itself, as in a regularizer, is no linear
        value = use.operand.meta["val"]
        if value.dim() < 2:
            continue
        n, k = value.shape[-2:] if layout == "nk" else reversed(value.shape[-2:])
        return Linear(names, weight, use, layout, (_rows(gemm, n, k), n, k), computes=computes)
    return None


def _computed_from(
    root: Node, parameters: Mapping[Node, tuple[str, ...]], derived: Derived, linear_module: str | None
) -> Node | None:
    """The one stored weight that the graph computes ``root`` from, as a quantizer does; None if there is none.

    What `weight_norm` and other parametrizations compute has no stored weight of its own: several tensors make it, or
    one by another name.

    Args:
        linear_module: name of the linear module that multiplies by ``root``; None if it is no linear module.
    """
    held = derived.holds.get(root, frozenset())
    if len(held) != 1 or root in held:
        return None
    (weight,) = held
    others, known = derived.sources[root] - held, parameters.get(weight)
    if known is None:
        # Without any names the module has to tell, and its weight to be all that is read.
        nameless = not parameters and linear_module and not others
        return weight if nameless and not _is_parametrized(root, weight) else None
    if linear_module is not None:
        return weight if any(_is_modules(owner, linear_module) for owner in _weights(known)) else None
    stored = any(not _PARAMETRIZED.search(name) for name in known)
    # Of two dims: an activation, or a second weight.
    return weight if stored and all(one.meta["val"].dim() < 2 for one in others if "val" in one.meta) else None


_PARAMETRIZED = re.compile(r"(^|\.)(parametrizations\..*|\w+_(g|v|orig))$")


def _is_modules(owner: str, module: str) -> bool:
    return not owner or not module or f".{owner}".endswith(f".{module}") or f".{module}".endswith(f".{owner}")


def _is_parametrized(root: Node, weight: Node) -> bool:
    """Whether a parametrization is among what computes ``root`` from ``weight``."""
    pending, seen = [root], set()
    while pending:
        node = pending.pop()
        if node in seen or node is weight:
            continue
        seen.add(node)
        if any("parametrizations" in str(where) for where, _ in (node.meta.get("nn_module_stack") or {}).values()):
            return True
        pending += node.all_input_nodes
    return False


def _names(parameter_names: tuple[str, ...], module: str, in_linear: bool) -> tuple[str, ...]:
    """Module names first, then parameter names, for a weight known by ``parameter_names``."""
    owners = _weights(parameter_names)
    owned = _owners(parameter_names, module)[:1]  # of a part of a model the first is that part's
    if not owned:
        # A function or an object that holds the model puts its own path in front of the module's.
        owned = sorted((owner for owner in owners if module.endswith("." + owner)), key=len)[-1:]
    if owned:
        owners = owned
    elif in_linear and module and not (isinstance(parameter_names, AllNames) and any(owners)):
        # A tied weight is known by its first owner's name; the module that runs here is the other one.
        owners = [module] if owners else []
    return tuple(dict.fromkeys(name for name in (*owners, *parameter_names) if name))


def _lookups(weight: Node) -> set[str]:
    """Names of the modules that look up rows of ``weight``, as of an embedding."""
    stacks = [user.meta.get("nn_module_stack") for user in weight.users if user.target is aten.embedding.default]
    return {from_source(list(stack.values())[-1][0]) for stack in stacks if stack}


def _weights(parameter_names: tuple[str, ...]) -> list[str]:
    return [name.rpartition(".")[0] for name in parameter_names if name.rpartition(".")[2] == "weight"]


def _owners(parameter_names: tuple[str, ...], module: str) -> list[str]:
    """The names of the module that runs here, by which the parameter is its weight."""
    return [owner for owner in _weights(parameter_names) if module and f".{owner}".endswith(f".{module}")]


def _is_linear_module(kind: object) -> bool:
    if isinstance(kind, type) and issubclass(kind, nn.Linear):
        return True
    # torch.export records class names; transformers' Conv1D is a linear with a [K, N] weight.
    name = kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]
    return name.endswith("Linear") or name == "Conv1D"


def _rows(gemm: Node, n: int, k: int) -> Any:
    """M: how many rows of N numbers the GEMM writes."""
    numel = gemm.meta["val"].numel()
    per_row = n * k if gemm.target is aten.mul.Tensor else n
    return numel // per_row if per_row else 0
