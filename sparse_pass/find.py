"""Find the matmuls of linear layers in a captured ATen graph. Reads the graph, never edits it.

A linear is found by its forward GEMM; the backward GEMMs are found by what they compute: grad_input is
the backward GEMM that reads the same weight, grad_weight is what the gradient output of that weight is
made of. AOTAutograd gives the GEMMs of one call the same ``seq_nr``, which tells calls apart where
several share a weight.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import Graph, Node

from .fqn import from_source, normalize

aten = torch.ops.aten

Layout = Literal["kn", "nk"]

# Position of the operand that may hold the weight, and its layout as the op reads it: `kn` as in
# mm(input, weight.T), `nk` as in linear(input, weight) or in mv(weight, input).
_GEMMS: dict[Any, tuple[tuple[int, Layout], ...]] = {
    aten.mm.default: ((1, "kn"), (0, "nk")),
    aten.addmm.default: ((2, "kn"), (1, "nk")),
    aten.bmm.default: ((1, "kn"), (0, "nk")),
    aten.baddbmm.default: ((2, "kn"), (1, "nk")),
    aten.mv.default: ((0, "nk"),),
    aten.addmv.default: ((1, "nk"),),
    aten.matmul.default: ((1, "kn"), (0, "nk")),
    aten.linear.default: ((1, "nk"),),
    # Inductor's CPU decomposition of mm with one row: (input.T * weight.T).sum(0, keepdim=True).
    aten.mul.Tensor: ((1, "kn"),),
}

# Ops that only move or round elements: a 2:4 mask commutes with re-running them on the masked weight.
_MOVES = frozenset(
    [
        "permute",
        "t",
        "transpose",
        "numpy_T",
        "view",
        "_unsafe_view",
        "reshape",
        "flatten",
        "unflatten",
        "expand",
        "unsqueeze",
        "squeeze",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "lift_fresh_copy",
        "slice",
        "select",
        "narrow",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "convert_element_type",
        "_to_copy",
        "to",
    ]
)
# What stands between a GEMM's gradient and the gradient output of its weight.
_GRAD_MOVES = _MOVES | frozenset(
    [
        "add",
        "cat",
        "slice_backward",
        "select_backward",
        "slice_scatter",
        "select_scatter",
        "constant_pad_nd",
        "sum",
    ]
)


@dataclass(frozen=True, slots=True)
class Use:
    """A GEMM that reads the weight: ``gemm`` reads ``operand``, which ``chain`` made from the weight.

    ``chain`` runs from the node after the weight to ``operand``; it is empty if they are the same.
    """

    gemm: Node
    operand: Node
    chain: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Linear:
    """One call of a linear layer. Names are in normal form, the best one first."""

    names: tuple[str, ...]
    weight: Node
    """The tensor whose 2:4 mask is meant: a parameter, or what a parametrization computed."""
    output: Use
    layout: Layout
    shape: tuple[Any, int, int]
    """(M, N, K); M is an int or a SymInt."""
    grad_input: tuple[Use, ...] = ()
    grad_operand: Node | None = None
    """Gradient of ``output.operand``, before it is brought to the layout of the weight."""
    grad_output: int | None = None
    """Position of the weight's gradient among the outputs of the graph."""
    unplaced: str = ""
    """What of the backward was expected and not found."""


@dataclass(frozen=True, slots=True)
class Found:
    """What `find_linears` learned: the linears, and whether module names were there to be read."""

    linears: tuple[Linear, ...]
    has_stacks: bool


def find_linears(graph: Graph, parameters: Mapping[Node, tuple[str, ...]]) -> Found:
    """All linears of a joint, inference or exported ATen graph.

    Args:
        graph: functional ATen graph.
        parameters: names of the placeholders (or get_attr nodes) known to be parameters. Placeholders
            that are not in it count as weights only where a linear module reads them.
    """
    backward = _tangent_dependent(graph)
    forward: list[Linear] = []
    reads: dict[Node, list[Use]] = {}
    has_stacks = False
    for node in graph.nodes:
        if not _is_gemm(node):
            continue
        if node in backward:
            for use, root, _ in _operands(node):
                reads.setdefault(root, []).append(use)
        else:
            has_stacks |= bool(node.meta.get("nn_module_stack"))
            linear = _forward_linear(node, parameters)
            if linear is not None:
                forward.append(linear)
    sharing: dict[Node, list[Linear]] = {}
    for linear in forward:
        sharing.setdefault(linear.weight, []).append(linear)
    if backward:
        grad_outputs = _gradient_outputs(graph)
        forward = [_with_backward(one, sharing[one.weight], reads.get(one.weight, []), grad_outputs) for one in forward]
    return Found(tuple(forward), has_stacks)


def _forward_linear(gemm: Node, parameters: Mapping[Node, tuple[str, ...]]) -> Linear | None:
    stack = list((gemm.meta.get("nn_module_stack") or {}).values())
    module, kind = (from_source(stack[-1][0]), stack[-1][1]) if stack else ("", None)
    in_linear = _is_linear_module(kind)
    for use, root, layout in _operands(gemm):
        known = parameters.get(root, ())
        canonical = use.operand is gemm.args[_GEMMS[gemm.target][0][0]]
        if known:
            names = _names(known, module, in_linear)
        elif in_linear and module and canonical:
            names = (module,)
        else:
            continue
        if root.target is aten.where.self and str(getattr(root.args[0], "target", "")).startswith("sparse_pass."):
            return None  # an earlier pass has masked this weight
        value = use.operand.meta["val"]
        if value.dim() < 2:
            continue
        n, k = value.shape[-2:] if layout == "nk" else reversed(value.shape[-2:])
        return Linear(names, root, use, layout, (_rows(gemm, n), n, k))
    return None


def _names(parameter_names: tuple[str, ...], module: str, in_linear: bool) -> tuple[str, ...]:
    """Module names first, then parameter names, for a weight known by ``parameter_names``."""
    owners = [name.rpartition(".")[0] for name in parameter_names if name.rpartition(".")[2] == "weight"]
    owned = [owner for owner in owners if owner == module or owner.endswith("." + module)] if module else []
    if owned:
        owners = owned
    elif in_linear and module:
        # A tied weight is known by its first owner's name; the module that runs here is the other one.
        owners = [module] if owners else []
    return tuple(dict.fromkeys(name for name in (*owners, *parameter_names) if name))


def _is_linear_module(kind: object) -> bool:
    if isinstance(kind, type) and issubclass(kind, nn.Linear):
        return True
    # torch.export records class names; transformers' Conv1D is a linear with a [K, N] weight.
    name = kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]
    return name.endswith("Linear") or name == "Conv1D"


def _is_gemm(node: Node) -> bool:
    if node.op != "call_function" or node.target not in _GEMMS:
        return False
    if node.target is not aten.mul.Tensor:
        return True
    # A one-row matmul in disguise: [K, 1] * [K, N], summed over K and nothing else.
    left, right = node.args
    if not (isinstance(left, Node) and isinstance(right, Node)):
        return False
    a, b = left.meta.get("val"), right.meta.get("val")
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dim() == b.dim() == 2):
        return False
    return (
        a.shape[1] == 1
        and a.shape[0] == b.shape[0]
        and bool(node.users)
        and all(user.target is aten.sum.dim_IntList and list(user.args[1:]) == [[0], True] for user in node.users)
    )


def _operands(gemm: Node) -> Iterator[tuple[Use, Node, Layout]]:
    for position, layout in _GEMMS[gemm.target]:
        operand = gemm.args[position]
        if isinstance(operand, Node):
            root, chain = _trace(operand)
            yield Use(gemm, operand, chain), root, layout


def _trace(operand: Node) -> tuple[Node, tuple[Node, ...]]:
    """The node that ``operand`` was made from by moves alone, and the moves in order."""
    chain: list[Node] = []
    node = operand
    while node.op == "call_function" and (node.target is operator.getitem or _packet(node) in _MOVES):
        source = node.args[0]
        if not isinstance(source, Node):
            break
        if node.target is operator.getitem and _packet(source) not in _MOVES:
            break
        chain.append(node)
        node = source
    return node, tuple(reversed(chain))


def _packet(node: Node) -> str:
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__ if packet is not None else ""


def _rows(gemm: Node, n: int) -> Any:
    """M: how many rows of N numbers the GEMM writes."""
    if gemm.target is aten.mul.Tensor:
        return 1
    rows = gemm.meta["val"].numel()
    return rows // n if n else 0


def _tangent_dependent(graph: Graph) -> set[Node]:
    """The nodes that need a gradient from outside: the backward, whatever the tags say."""
    found: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            described = type(node.meta.get("desc")).__name__
            if described.startswith("Tangent") or "tangents" in str(node.target):
                found.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _gradient_outputs(graph: Graph) -> dict[Any, int] | None:
    """Position of each gradient output by the descriptor of its input; None if outputs are not described."""
    output = graph.output_node()
    descriptors = output.meta.get("desc")
    values = output.args[0]
    if descriptors is None or not isinstance(values, (list, tuple)):
        return None
    return {
        descriptor.grad_of: index
        for index, (value, descriptor) in enumerate(zip(values, descriptors, strict=False))
        if isinstance(value, Node) and hasattr(descriptor, "grad_of")
    }


def _with_backward(
    linear: Linear, sharing: list[Linear], reads: list[Use], grad_outputs: Mapping[Any, int] | None
) -> Linear:
    """Add the backward GEMMs. ``sharing`` are all calls of its weight, ``reads`` all backward GEMMs that read it."""
    seq = linear.output.gemm.meta.get("seq_nr")
    grad_input = tuple(use for use in reads if _belongs(use, linear, sharing))
    unplaced = ""
    if any(not any(_belongs(use, one, sharing) for one in sharing) for use in reads):
        unplaced = "grad_input: a backward GEMM of the shared weight belongs to none of its calls; left dense"
    index = grad_operand = None
    if grad_outputs is None:
        unplaced = unplaced or "grad_weight: the graph does not describe its outputs; left as captured"
    else:
        index = grad_outputs.get(linear.weight.meta.get("desc"))
        if index is not None:
            gradient = linear.weight.graph.output_node().args[0][index]  # type: ignore[index]
            grad_operand = _gradient_of_operand(gradient, linear, seq)  # type: ignore[arg-type]
            if grad_operand is None:
                unplaced = unplaced or "grad_weight: not found in the graph; left as captured"
    return replace(
        linear,
        grad_input=grad_input,
        grad_operand=grad_operand,
        grad_output=index,
        unplaced=unplaced,
    )


def _belongs(use: Use, linear: Linear, sharing: list[Linear]) -> bool:
    """Whether a backward GEMM that reads the weight is the grad_input of this call."""
    if len(sharing) == 1:
        return True
    seq = use.gemm.meta.get("seq_nr")
    if seq is not None and any(one.output.gemm.meta.get("seq_nr") == seq for one in sharing):
        return bool(linear.output.gemm.meta.get("seq_nr") == seq)
    return not set(linear.output.chain).isdisjoint(use.chain)


def _gradient_of_operand(gradient: Node, linear: Linear, seq: int | None) -> Node | None:
    """Walk back from the weight's gradient to where this call's share of it leaves its GEMM."""
    if seq is None:
        return None
    shape = linear.output.operand.meta["val"].shape
    pending, seen = [gradient], set()
    while pending:
        node = pending.pop()
        if node in seen or node.op != "call_function":
            continue
        seen.add(node)
        # In the autograd node of the GEMM the last node has the operand's own layout.
        value = node.meta.get("val")
        if node.meta.get("seq_nr") == seq and isinstance(value, torch.Tensor) and value.shape == shape:
            return node
        if _packet(node) in _GRAD_MOVES:
            pending += [n for n in node.all_input_nodes if n not in seen]
    return None


def parameter_nodes(graph: Graph, names_by_input: Mapping[int, tuple[str, ...]]) -> dict[Node, tuple[str, ...]]:
    """Names of the nodes that hold parameters.

    Args:
        names_by_input: names by position of the graph input before AOTAutograd, as Dynamo numbers them.
    """
    found: dict[Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and isinstance(node.target, str):
            found[node] = (normalize(node.target),)
        elif node.op == "placeholder":
            names = _input_names(node.meta.get("desc"), names_by_input)
            if names:
                found[node] = names
    return found


def _input_names(descriptor: Any, names_by_input: Mapping[int, tuple[str, ...]]) -> tuple[str, ...]:
    while hasattr(descriptor, "base"):  # an inner tensor of a subclass such as DTensor
        descriptor = descriptor.base
    kind = type(descriptor).__name__
    if kind == "PlainAOTInput":
        return names_by_input.get(descriptor.idx, ())
    if kind == "ParamAOTInput":
        return (normalize(descriptor.target),)
    return ()
