"""Graphs of a whole training step, as ``make_fx`` traces them: forward, loss and ``torch.autograd.grad`` in one graph.

Nothing describes their inputs and outputs, and there are no gradients from outside: where the backward begins is seen
by what autograd starts from, and which product is the gradient of which weight by the tensors that are multiplied. An
optimizer may follow in the graph.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence, Set
from dataclasses import replace
from typing import Any, Literal

from torch.fx import Graph, Node

from ..fqn import normalize
from .backward import reached
from .gemms import (
    GradientGemm,
    Linear,
    Use,
    aten,
    is_flip,
    is_move,
    operand_of,
    operands,
    packet_name,
    strip_moves,
    weight_places,
)
from .inputs import input_of


def step_parameters(graph: Graph, fqns: Sequence[str]) -> dict[Node, tuple[str, ...]]:
    """The names of the leading placeholders.

    Raises:
        ValueError: more names than placeholders.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    if len(fqns) > len(placeholders):
        raise ValueError(
            f"parameters= has {len(fqns)} names, and the graph {len(placeholders)} placeholders: give the names of the"
            " parameters in the order of the placeholders, which they must come first in"
        )
    return {node: (normalize(fqn),) for node, fqn in zip(placeholders, fqns, strict=False)}


def step_backward(graph: Graph, parameters: Collection[Node]) -> set[Node]:
    """The backward, and what is computed from it: all that depends on where autograd starts.

    A tracer that preserves metadata marks the nodes of the backward. Without marks it is where the gradient of a
    scalar, the loss, is made, a one. A constant of the forward may look the same: from that, the first product of some
    parameter is computed. Empty where there is neither.

    Args:
        parameters: the placeholders that hold them.
    """
    marked = [node for node in graph.nodes if node.meta.get("autograd_backward")]
    if marked:
        return _computed_from(marked)
    first: dict[Node, Node] = {}
    for node in graph.nodes:
        for use, root, _ in operands(node):
            if root in parameters:
                first.setdefault(root, use.gemm)
    found: set[Node] = set()
    for node in graph.nodes:
        if _is_one(node) and not (after := _computed_from([node])) & set(first.values()):
            found |= after
    return found


def _computed_from(nodes: Iterable[Node]) -> set[Node]:
    """These calls, and all that depend on them."""
    calls = [node for node in nodes if node.op == "call_function"]
    return reached(calls, lambda node: [user for user in node.users if user.op == "call_function"])


def _is_one(node: Node) -> bool:
    """Whether a node makes a scalar one, as autograd does of a loss."""
    if packet_name(node) not in ("ones_like", "full_like", "full", "ones") or node.meta["val"].dim() != 0:
        return False
    return packet_name(node).startswith("ones") or bool(node.args[1] == 1)


def with_step_gradients(linears: Sequence[Linear], backward: Set[Node]) -> list[Linear]:
    """Add to each call the gradient of its weight.

    It is the one product of the call's input and of what its grad_input multiplies by the weight. Without a grad_input,
    as of a first layer, it is the one product of the input that no other call has.

    Args:
        backward: as `step_backward` gives it.
    """
    done: dict[int, Linear] = {}
    products: set[Node] = set()
    # The calls whose grad_input tells leave fewer products for the others.
    for place, linear in sorted(enumerate(linears), key=lambda one: not one[1].grad_input):
        gemm, reason = _product(linear, backward, products)
        if gemm is None:
            done[place] = replace(linear, unplaced_grad_weight=reason)
            continue
        products.add(gemm.gemm)
        operand = _as_operand(gemm, linear)
        done[place] = replace(
            linear,
            grad_operand=operand,
            grad_output=_returned(operand or gemm.gemm),
            grad_weight=gemm if operand is not None else None,
            unplaced_grad_weight="" if operand is not None else _UNTURNED,
        )
    return [done[place] for place in range(len(linears))]


_SEVERAL = "several products of its input may be the gradient of the weight; left as traced"
_NONE_KNOWN = "no product of its input is known to be the gradient of the weight; left as traced"
_UNTURNED = "the graph brings the gradient to no layout of the weight; left as traced"


def _product(linear: Linear, backward: Set[Node], taken: Set[Node]) -> tuple[GradientGemm | None, str]:
    """The product, or why it is not known; neither where the graph has none."""
    input = input_of(linear.output)
    if input is None or not backward:
        return None, ""
    root = strip_moves(input.node)[0]
    of_input = [gemm for gemm in _products_of(root, backward) if gemm not in taken]
    grad_outputs = {strip_moves(operand)[0] for use in linear.grad_input for operand in _others(use)}
    of_gradient = [gemm for one in grad_outputs for gemm in _products_of(one, backward) if _fits(gemm, linear)]
    found = [gemm for gemm in of_input if _fits(gemm, linear) and (not grad_outputs or gemm in of_gradient)]
    if len(found) > 1:
        return None, _SEVERAL
    if not found:
        left = bool(of_input or set(of_gradient) - taken)
        return None, _NONE_KNOWN if left else ""
    place: Literal[0, 1] = 1 if strip_moves(operand_of(found[0], 0))[0] is root else 0
    return GradientGemm("grad_weight", found[0], place), ""


def _products_of(root: Node, backward: Set[Node]) -> list[Node]:
    """The matmuls of the backward that read a tensor through moves, and one of the backward."""
    pending, seen, found = [root], {root}, []
    while pending:
        for user in pending.pop().users:
            if user in seen:
                continue
            seen.add(user)
            if weight_places(user):
                if user in backward and any(strip_moves(one)[0] in backward for one in user.all_input_nodes):
                    found.append(user)
            elif is_move(user):
                pending.append(user)
    return found


def _fits(gemm: Node, linear: Linear) -> bool:
    _, n, k = linear.shape
    return gemm.target is aten.mm.default and tuple(gemm.meta["val"].shape) in ((n, k), (k, n))


def _others(use: Use) -> list[Node]:
    return [one for one in use.gemm.all_input_nodes if one is not use.operand]


def _as_operand(made: GradientGemm, linear: Linear) -> Node | None:
    """The product in the layout that the forward GEMM reads the weight in: itself, or its transpose."""
    gemm = made.gemm
    if ("nk" if made.place == 0 else "kn") == linear.layout:
        return gemm
    flips = [user for user in gemm.users if is_flip(user)]
    return flips[0] if len(gemm.users) == 1 and flips else None


def _returned(gradient: Node) -> int | None:
    """Which output of the graph it is, through moves alone; None if it returns none such."""
    values: Any = gradient.graph.output_node().args[0]
    if not isinstance(values, (list, tuple)):
        return None
    for place, value in enumerate(values):
        if isinstance(value, Node) and gradient in (strip_moves(value)[0], *strip_moves(value)[1]):
            return place
    return None
