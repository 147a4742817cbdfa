"""What a linear is in a captured graph: a GEMM that reads a weight through moves. Reads single nodes only."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..shards import Sharding

aten = torch.ops.aten

Layout: TypeAlias = Literal["kn", "nk"]
GemmName: TypeAlias = Literal["output", "grad_input", "grad_weight"]
Role: TypeAlias = Literal["input", "weight", "grad_output"]
"""The operands of the three GEMMs of a linear; each reads two of them."""

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
    aten._scaled_mm.default: ((1, "kn"), (0, "nk")),
    aten._int_mm.default: ((1, "kn"), (0, "nk")),
}

# Ops that only move or round elements: a 2:4 mask commutes with re-running them on the masked weight.
MOVES = frozenset(
    [
        "permute",
        "t",
        "transpose",
        "numpy_T",
        "mT",
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


_FLIPS = (aten.permute.default, aten.t.default, aten.transpose.int, aten.numpy_T.default, aten.mT.default)


@dataclass(frozen=True, slots=True)
class Use:
    """A GEMM that reads the weight: ``gemm`` reads ``operand``, which ``chain`` made from the weight.

    ``chain`` runs from the node after the weight to ``operand``; it is empty if they are the same.
    """

    gemm: Node
    operand: Node
    chain: tuple[Node, ...]

    def reads(self, weight: Node) -> bool:
        """Whether it reads the weight itself, and not what something else computed from it."""
        return (self.chain[0].args[0] if self.chain else self.operand) is weight


@dataclass(frozen=True, slots=True)
class GradientGemm:
    """A GEMM that reads grad_output: ``mm(grad_output.T, input)`` of grad_weight, or ``mm(grad_output, weight)`` of
    grad_input, or the transpose of one of these, ``mm(input.T, grad_output)`` or ``mm(weight.T, grad_output.T)``."""

    name: GemmName
    gemm: Node
    place: Literal[0, 1]
    """Which operand is that of grad_output."""

    @property
    def shape(self) -> tuple[Any, Any, Any]:
        """(M, N, K) of the linear, as far as it is of this GEMM."""
        made, read = self.gemm.meta["val"].shape, operand_of(self.gemm, self.place).meta["val"].shape
        kept, contracted, k = made[self.place], read[1 - self.place], made[1 - self.place]
        return (kept, contracted, k) if self.name == "grad_input" else (contracted, kept, k)


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
    """Gradient of ``output.operand``, before it is brought to the layout of the weight; of a computed weight as its
    GEMM gives it."""
    grad_output: int | None = None
    """Position of the weight's gradient among the outputs of the graph; None for that of a computed weight."""
    grad_weight: GradientGemm | None = None
    """What made ``grad_operand``, where it is one matmul."""
    unplaced_grad_input: str = ""
    """Why ``grad_input`` may lack a GEMM of the backward; empty if all were found."""
    unplaced_grad_weight: str = ""
    """Why there is no ``grad_operand`` although the weight has a gradient; empty if it was found or there is none."""
    ambiguous: str = ""
    """Why the name may not mean this weight."""
    readers: tuple[Use, ...] = ()
    """What computes something from the weight on the way to the GEMMs of its calls: each as the `gemm` of a Use."""
    computes: bool = False
    """Whether the GEMM of output reads what ``readers`` computed, and not the weight itself."""
    again: tuple[Use, ...] = ()
    """GEMMs that compute the output once more, for the backward."""
    stray: tuple[Use, ...] = ()
    """Backward GEMMs that read the weight and of which it is not known to which of its calls they belong."""
    whole_gradient: bool = False
    """Whether a masked gradient is masked where the graph returns it: the products in it were not found one by one, but
    it is a sum of those of calls of this weight, and of nothing else."""
    sharding: Sharding | None = None
    """How ranks share the weight, where the graph has a shard of it."""
    half: str = ""
    """Why the scheme could not be kept in the whole call; then nothing of it is done."""

    @property
    def has_gradient(self) -> bool:
        """Whether the weight has a gradient that this call is part of, found or not."""
        return self.grad_operand is not None or bool(self.unplaced_grad_weight)


def weight_places(node: Node) -> tuple[tuple[int, Layout], ...]:
    """Where a GEMM may hold the weight, the usual place first; empty if the node is no GEMM."""
    if node.op != "call_function":
        return ()
    return _product_and_sum(node) if node.target is aten.mul.Tensor else _GEMMS.get(node.target, ())


_PRODUCTS = re.compile(r"mm|mv|matmul|linear|dot|einsum|attention")


def may_multiply(node: Node) -> bool:
    """Whether an op is a matmul of torch by its name, or of another library, whose ops may do anything."""
    return bool(weight_places(node)) or _may_multiply(node.target)


@functools.cache
def _may_multiply(target: Any) -> bool:
    library, _, name = str(target).partition(".")
    return library not in ("aten", "prims") or bool(_PRODUCTS.search(name))


def weight_place(use: Use) -> int:
    """Which operand of a GEMM is the weight."""
    return next(at for at, _ in weight_places(use.gemm) if use.gemm.args[at] is use.operand)


def other_place(gemm: Node, place: int) -> int:
    """Where a GEMM has the operand that it multiplies by the one at ``place``."""
    with_bias = gemm.target in (aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
    return (3 if with_bias else 1) - place


def operand_of(gemm: Node, place: int) -> Node:
    """The tensor that a GEMM reads there, as the graph has it now."""
    return cast(Node, gemm.args[place])


def bias_of(gemm: Node) -> object:
    """The bias of an addmm or a linear; None if it has none, or for an mm."""
    if gemm.target is aten.addmm.default:
        return gemm.args[0]
    return gemm.args[2] if len(gemm.args) > 2 else None


def fused_bias(gemm: Node) -> Node | None:
    """The bias, if it has a number for each feature of the output: kernels add it themselves."""
    bias = bias_of(gemm)
    is_row = isinstance(bias, Node) and bias.meta["val"].shape == gemm.meta["val"].shape[-1:]
    return bias if is_row else None  # type: ignore[return-value]  # mypy does not follow the flag


def _product_and_sum(mul: Node) -> tuple[tuple[int, Layout], ...]:
    """The same for matmuls of one row as Inductor decomposes them.

    mm is ``([K, 1] * [K, N]).sum([0], True)`` on a CPU and ``([1, K, 1] * [1, K, N]).sum([1])`` on a GPU with
    coordinate descent tuning, where bmm is ``([B, 1, K, 1] * [B, 1, K, N]).sum([2])``; mv is
    ``([N, K] * [K]).sum([1])``.
    """
    if not all(user.target is aten.sum.dim_IntList for user in mul.users):
        return ()
    left, right = (n.meta.get("val") if isinstance(n, Node) else None for n in mul.args)
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return ()
    dims = left.dim()
    if (dims, right.dim()) == (2, 1) and _all_sum(mul, [1]):
        return ((0, "nk"),) if statically_known_true(left.shape[1] == right.shape[0]) else ()
    if dims != right.dim() or dims not in (2, 3, 4) or not _all_sum(mul, [dims - 2], *([True] if dims == 2 else [])):
        return ()
    ones = (left.shape[-1], *left.shape[-3:-2])
    fits = all(statically_known_true(size == 1) for size in ones) and left.shape[-2] == right.shape[-2]
    return ((1, "kn"),) if statically_known_true(fits) else ()


def _all_sum(product: Node, *how: Any) -> bool:
    """Whether a product is summed in this way and not read otherwise."""
    return bool(product.users) and all(
        user.target is aten.sum.dim_IntList and user.args[1:] == how and not user.kwargs for user in product.users
    )


def operands(gemm: Node) -> Iterator[tuple[Use, Node, Layout]]:
    for position, layout in weight_places(gemm):
        operand = gemm.args[position]
        if isinstance(operand, Node):
            root, chain = strip_moves(operand)
            yield Use(gemm, operand, chain), root, layout


def is_move(node: Node) -> bool:
    return node.target is operator.getitem or packet_name(node) in MOVES


def is_flip(node: Node) -> bool:
    """Whether a node transposes a matrix."""
    if node.target not in _FLIPS or node.meta["val"].dim() != 2:
        return False
    dims = node.args[1] if node.target is aten.permute.default else node.args[1:]
    places = [dim % 2 for dim in dims]  # type: ignore[operator,union-attr]
    return places in ([], [1, 0]) or (places == [0, 1] and node.target is aten.transpose.int)


def reads_rows(use: Use) -> bool:
    """Whether the GEMM contracts over the columns of the stored weight, as ``linear(input, weight)`` does.

    Then it takes S(W) packed, otherwise its transpose. For mm, addmm and linear with the weight on the right.
    """
    transposed = sum(is_flip(node) for node in use.chain) % 2 == 1
    return not transposed if use.gemm.target is aten.linear.default else transposed


def strip_moves(operand: Node) -> tuple[Node, tuple[Node, ...]]:
    """The node that ``operand`` was made from by moves alone, and the moves in order."""
    chain: list[Node] = []
    node = operand
    while is_move(node):
        source = node.args[0]
        if not isinstance(source, Node):
            break
        if node.target is operator.getitem and packet_name(source) not in MOVES:
            break
        chain.append(node)
        node = source
    return node, tuple(reversed(chain))


def made_by(gradient: Node) -> Node:
    """The op that a gradient came from, before it was moved and scaled by a number."""
    node, _ = strip_moves(gradient)
    while packet_name(node) == "mul" and isinstance(node.args[0], Node) and not isinstance(node.args[1], Node):
        node, _ = strip_moves(node.args[0])
    return node


def packet_name(node: Node) -> str:
    """The name of an op without its overload, such as ``add``; empty for what is no op."""
    return _packet_name(node.target) if node.op == "call_function" else ""


@functools.cache
def _packet_name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", None)
    return packet.__name__ if packet is not None else ""
