"""The activation function that made the input of a linear, where a kernel can compute it while it sparsifies.

Which ops a function becomes depends on the decompositions of the backend and on the dtype: each function is traced,
with Inductor's decompositions and without, and the graph is compared with that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from .gemms import aten

# By the names of `ops.reference.inputs.ACTIVATIONS`, the most specific first, in every way that people write them.
_WRITTEN: tuple[tuple[str, Callable[..., torch.Tensor]], ...] = (
    ("squared_relu", lambda x: F.relu(x).square()),
    ("squared_relu", lambda x: F.relu(x) * F.relu(x)),
    ("relu", lambda x: F.relu(x)),
    ("gelu", lambda x: F.gelu(x)),
    ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
    ("silu_gate", lambda x, gate: F.silu(x) * gate),
    ("silu_gate", lambda x, gate: gate * F.silu(x)),
)
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})


@dataclass(frozen=True, slots=True)
class ActivationFunction:
    """``node`` is the function ``name`` of ``source``, and of ``gate`` if it has one."""

    name: str
    node: Node
    source: Node
    gate: Node | None


def activation_of(input: Node, readers: frozenset[Node]) -> ActivationFunction | None:
    """The function that made the input of a linear, if nothing but ``readers`` reads its result, or views of it."""
    node, made = input, {input}
    while node.target in _VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
        made.add(node)
    if not all(user in made or user in readers for one in made for user in one.users):
        return None
    dtype = node.meta["val"].dtype
    for decomposed in (True, False):
        for name, pattern in _patterns(dtype, decomposed):
            bound: dict[Node, Node] = {}
            (result,) = pattern.output_node().args
            if isinstance(result, Node) and _same(result, node, bound):
                source, gate, *_ = [*(bound[one] for one in pattern.nodes if one.op == "placeholder"), None]
                if source is not None and _shaped(source, node) and (gate is None or _shaped(gate, node)):
                    return ActivationFunction(name, node, source, gate)
    return None


def _shaped(source: Node, like: Node) -> bool:
    """Not broadcast, and not of another dtype."""
    value, other = source.meta["val"], like.meta["val"]
    return bool(value.shape == other.shape and value.dtype == other.dtype)


def _same(pattern: Node, node: object, bound: dict[Node, Node]) -> bool:
    """Whether a node is what the pattern computes; binds the pattern's inputs to nodes of the graph."""
    if not isinstance(node, Node):
        return False
    if pattern in bound or pattern.op == "placeholder":
        return bound.setdefault(pattern, node) is node
    if node.target != pattern.target or len(node.args) != len(pattern.args) or node.kwargs != pattern.kwargs:
        return False
    for wanted, found in zip(pattern.args, node.args, strict=True):
        if not (_same(wanted, found, bound) if isinstance(wanted, Node) else wanted == found):
            return False
    bound[pattern] = node
    return True


@functools.cache
def _patterns(dtype: torch.dtype, decomposed: bool) -> tuple[tuple[str, Graph], ...]:
    from torch._inductor.decomposition import select_decomp_table

    found = []
    for name, function in _WRITTEN:
        arguments = [torch.zeros(2, dtype=dtype) for _ in range(2 if name == "silu_gate" else 1)]
        # This runs in the middle of a compilation: under fake tensors, and perhaps autocast.
        with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
            table = select_decomp_table() if decomposed else {}
            found.append((name, make_fx(function, decomposition_table=table)(*arguments).graph))
    return tuple(found)
