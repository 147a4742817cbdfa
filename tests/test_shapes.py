"""Exactness in odd cases: shapes, strides, ways to multiply by a weight, schemes, exported graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import (
    TOLERANCE,
    Config,
    check_invariants,
    compare,
    errors,
    graph_facts,
    relative_error,
    run,
    ste_reference,
)
from torch import Tensor, nn

import sparse_pass as sp

W24 = sp.WeightSparsity()
INNERS = pytest.mark.parametrize("inner", ["aot_eager", "inductor"])


class Two(nn.Module):
    """Two linears, so that both have all three GEMMs."""

    def __init__(self, dim: int = 8, hidden: int = 12, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias)
        self.down = nn.Linear(hidden, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


BOTH = {"up": W24, "down": W24}


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


# Inputs


SHAPES = {
    "rank 1": (8,),
    "rank 2": (6, 8),
    "one row": (1, 8),
    "rank 3": (2, 3, 8),
    "rank 4": (2, 1, 3, 8),
    "rank 5": (2, 2, 1, 3, 8),
    "no rows": (0, 8),
    "no rows, rank 3": (2, 0, 8),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_input_shape(shape: tuple[int, ...], bias: bool) -> None:
    compare(Two(bias=bias), BOTH, (leaf(*shape),))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (1, 1, 8)], ids=str)
def test_one_row_through_inductor(shape: tuple[int, ...], bias: bool) -> None:
    """Inductor's CPU decompositions make a product and a sum of a one-row matmul."""
    compare(Two(bias=bias), BOTH, (leaf(*shape),), inner="inductor")


@INNERS
def test_no_rows_through(inner: str) -> None:
    compare(Two(), BOTH, (leaf(0, 8),), inner=inner)


def strided(kind: str) -> Tensor:
    base = torch.randn(6, 5, 8)
    made = {
        "transposed": base.transpose(0, 1),
        "features outermost": torch.randn(8, 6).t(),
        "every second": torch.randn(6, 16)[:, ::2],
        "expanded rows": torch.randn(1, 8).expand(6, 8),
        "expanded batch": torch.randn(5, 8).expand(3, 5, 8),
        "expanded features": torch.randn(6, 1).expand(6, 8),
        "offset": torch.randn(100)[4:52].view(6, 8),
    }
    return made[kind].requires_grad_()


@pytest.mark.parametrize(
    "kind",
    ["transposed", "features outermost", "every second", "expanded rows", "expanded batch", "expanded features", "offset"],
)
def test_strides(kind: str) -> None:
    x = strided(kind)
    compare(Two(), BOTH, (x,))
    compare(Two(), BOTH, (x,), entry=lambda model: lambda x: model(x.movedim(-1, 0).movedim(0, -1)))


@pytest.mark.parametrize(
    ("k", "n"), [(4, 4), (4, 64), (68, 12), (100, 36), (64, 192), (20, 132)], ids=str
)
def test_widths(k: int, n: int) -> None:
    compare(Two(k, n), BOTH, (leaf(5, k),))


def test_linear_of_a_transposed_weight() -> None:
    """The parameter itself is not contiguous."""
    model = Two()
    model.up.weight = nn.Parameter(torch.randn(8, 12).t() / 3)
    compare(model, BOTH, (leaf(5, 8),))


@INNERS
def test_dynamic_rank_and_length(inner: str) -> None:
    batches = [(leaf(b, n, 8),) for b, n in ((2, 5), (3, 7), (4, 2))]
    compare(Two(), BOTH, *batches, dynamic=True, inner=inner)


def test_dynamic_to_one_and_to_none() -> None:
    """Sizes 0 and 1 are graphs of their own."""
    batches = [(leaf(b, 8),) for b in (4, 5, 1, 0)]
    compare(Two(), BOTH, *batches, dynamic=True, graphs=3)


# Ways to multiply


class By(nn.Module):
    """A GEMM between two other ops, written by hand."""

    def __init__(self, multiply: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.multiply = multiply
        self.w = nn.Parameter(torch.randn(*shape) / 3)
        self.b = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.multiply(torch.cos(x), self.w, self.b))


WAYS = {
    "F.linear": (lambda x, w, b: F.linear(x, w, b), (12, 8), (5, 8)),
    "F.linear, no bias": (lambda x, w, b: F.linear(x, w), (12, 8), (5, 8)),
    "x @ w.T": (lambda x, w, b: x @ w.T, (12, 8), (5, 8)),
    "x @ w.T, rank 3": (lambda x, w, b: x @ w.T + b, (12, 8), (2, 5, 8)),
    "x @ w": (lambda x, w, b: x @ w + b, (8, 12), (5, 8)),
    "x @ w, rank 4": (lambda x, w, b: x @ w, (8, 12), (2, 3, 5, 8)),
    "w @ x": (lambda x, w, b: w @ x, (12, 8), (8, 5)),
    "w.T @ x": (lambda x, w, b: w.T @ x, (8, 12), (8, 5)),
    "w @ x, rank 3": (lambda x, w, b: w @ x, (12, 8), (2, 8, 5)),
    "w @ vector": (lambda x, w, b: w @ x + b, (12, 8), (8,)),
    "vector @ w": (lambda x, w, b: x @ w + b, (8, 12), (8,)),
    "mv": (lambda x, w, b: torch.mv(w, x), (12, 8), (8,)),
    "addmv": (lambda x, w, b: torch.addmv(b, w, x, beta=2, alpha=3), (12, 8), (8,)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w.T), (12, 8), (5, 8)),
    "addmm, scaled": (lambda x, w, b: torch.addmm(b, x, w.T, beta=0.5, alpha=2), (12, 8), (5, 8)),
    "addmm, full bias": (lambda x, w, b: torch.addmm(x @ w.T, x.sin(), w.T), (12, 8), (5, 8)),
    "addmm, weight left": (lambda x, w, b: torch.addmm(b[:, None], w, x, alpha=2), (12, 8), (8, 5)),
    "einsum": (lambda x, w, b: torch.einsum("bnk,ok->bno", x, w), (12, 8), (2, 5, 8)),
    "einsum, heads": (
        lambda x, w, b: torch.einsum("bnk,hdk->bhnd", x, w.view(3, 4, 8)), (12, 8), (2, 5, 8)
    ),
    "first rows": (lambda x, w, b: F.linear(x, w[:4], b[:4]), (12, 8), (5, 8)),
    "middle columns": (lambda x, w, b: F.linear(x[..., 2:6], w[:, 2:6], b), (12, 8), (5, 8)),
    "every second row": (lambda x, w, b: F.linear(x, w[::2]), (12, 8), (5, 8)),
    "chunks": (
        lambda x, w, b: torch.cat([F.linear(x, c).pow(i + 1) for i, c in enumerate(w.chunk(3))], -1),
        (12, 8), (5, 8),
    ),
    "one chunk of three": (lambda x, w, b: F.linear(x, w.chunk(3)[1]), (12, 8), (5, 8)),
    "split": (
        lambda x, w, b: F.linear(x, w.split([4, 8])[1]) + F.linear(x, w.split([4, 8])[0]).sum(),
        (12, 8), (5, 8),
    ),
    "overlapping slices": (lambda x, w, b: F.linear(x, w[:8]) * F.linear(x.sin(), w[4:]), (12, 8), (5, 8)),
    "bmm, expanded": (lambda x, w, b: torch.bmm(x, w.T.expand(2, 8, 12)), (12, 8), (2, 5, 8)),
    "baddbmm, expanded": (
        lambda x, w, b: torch.baddbmm(b, x, w.T.expand(2, 8, 12), beta=2, alpha=0.5), (12, 8), (2, 5, 8)
    ),
    "viewed flat and back": (lambda x, w, b: F.linear(x, w.reshape(-1).view(12, 8)), (12, 8), (5, 8)),
    "cast": (lambda x, w, b: F.linear(x.double(), w.double()).float(), (12, 8), (5, 8)),
    "also used elsewhere": (lambda x, w, b: F.linear(x, w) + w.sum() + w.square().mean(), (12, 8), (5, 8)),
    "also multiplied by itself": (lambda x, w, b: F.linear(x, w) @ w, (12, 8), (5, 8)),
}  # fmt: skip
"""Name: (product, shape of the weight, shape of the input)."""
