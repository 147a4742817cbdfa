"""``scale``: S(W) is a multiple of the kept weights, in the forward, in the backward and in `prune_`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_printer import capture, printed
from support import errors, fresh_compile, invariants_checked, run
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sparse_pass as sp
from sparse_pass.config import NORM_SCALE

NORM = sp.WeightSparsity(scale="norm")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_compile():
        yield


class StraightThrough(nn.Module):
    """In its backward the gradient goes to the weight as if there were neither a mask nor a scale."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        kept = torch.where(sp.mask24(weight), weight * self.scale, 0)
        return Replaced.apply(weight, kept)


class Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: Tensor) -> Tensor:
        return kept.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False))


def by_hand(model: nn.Module, scale: float) -> nn.Module:
    reference = copy.deepcopy(model)
    for linear in (reference[0], reference[2]):
        parametrize.register_parametrization(linear, "weight", StraightThrough(scale))
    return reference


def gradients(model: nn.Module) -> dict[str, Tensor]:
    names = {"parametrizations.weight.original": "weight"}
    found = {}
    for name, parameter in model.named_parameters():
        for old, new in names.items():
            name = name.replace(old, new)
        found[name] = parameter
    return dict(sorted(found.items()))


@pytest.mark.parametrize(
    ("backend", "inner", "autocast"),
    [
        ("auto", "aot_eager", False),
        ("auto", "inductor", True),
        ("cusparselt", "aot_eager", True),
        ("cusparselt", "inductor", True),
    ],
)
def test_output_and_gradients(backend: Any, inner: Any, autocast: bool) -> None:
    model, x = network(), torch.randn(16, 64, requires_grad=True)
    scheme = sp.WeightSparsity(scale=1.25, backend=backend)
    compiled = torch.compile(model, backend=sp.sparse_backend({"*": scheme}, model=model, inner=inner))
    reference = by_hand(model, 1.25)

    def context() -> Any:
        return torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    with invariants_checked():
        actual = run(compiled, gradients(model), [x], context=context)
    expected = run(reference, gradients(reference), [x], context=context)
    assert max(errors(actual, expected).values()) < (2e-2 if autocast else 1e-5)
    unscaled = by_hand(model, 1.0)
    assert errors(run(unscaled, gradients(unscaled), [x], context=context), expected)["output 0"] > 0.1


@pytest.mark.parametrize("backend", ["masked_dense", "cusparselt"])
def test_pruned_weights_are_those_of_training(backend: Any) -> None:
    """Bit for bit, also where autocast rounds them."""
    model, scheme = network(), sp.WeightSparsity(scale="norm", backend=backend)
    compiled = torch.compile(model, backend=sp.sparse_backend({"*": scheme}, model=model, inner="aot_eager"))
    x = torch.randn(16, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = compiled(x)
        sp.prune_(model, {"*": scheme})
        torch._dynamo.reset()
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("mask", "digits"), [("optimal", 1.1053), ("greedy", 1.1047)])
def test_norm_of_normal_weights(mask: Any, digits: float) -> None:
    weight = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0))
    ratio = float(weight.norm() / weight[sp.mask24(weight, mask)].norm())
    assert abs(ratio - digits) < 5e-4
    assert abs(ratio - NORM_SCALE) < 1e-3
    assert (NORM.factor, sp.WeightSparsity(scale=2).factor) == (NORM_SCALE, 2.0)


def test_decay_and_masked_gradients_are_not_scaled() -> None:
    model, x = nn.Sequential(nn.Linear(16, 32, bias=False)), torch.randn(8, 16)
    scheme = sp.WeightSparsity(scale=1.5, decay=0.25, grad_weight="masked")
    compiled = torch.compile(model, backend=sp.sparse_backend({"0": scheme}, model=model, inner="aot_eager"))
    compiled(x).sum().backward()
    weight = model[0].weight
    dense = torch.ones(8, 32).T @ x
    mask = sp.mask24(weight)
    expected = torch.where(mask, dense, 0.25 * weight)
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), "mean", None, True])
def test_field(scale: Any) -> None:
    with pytest.raises(ValueError, match=r"WeightSparsity\(scale=.*finite number > 0 or 'norm'"):
        sp.WeightSparsity(scale=scale)


def test_graph() -> None:
    """Made once, for both GEMMs."""
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    linear = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
    scheme = sp.WeightSparsity(scale="norm", backend="cusparselt")
    captured = capture(linear, [x], {"weight": scheme})
    assert_expected_inline(
        printed(captured.after.graph),
        """\
sparsify = sparse_pass.sparsify(primals_1, 'optimal', scale=1.105)
getitem = sparsify[0]
getitem_1 = sparsify[1]
linear = sparse_pass.linear(primals_2, getitem, None, 64)
permute = aten.permute(tangents_1, [1, 0])  # backward
mm = aten.mm(permute, primals_2)  # backward
permute_1 = aten.permute(mm, [1, 0])  # backward
linear_1 = sparse_pass.linear(tangents_1, getitem_1, None, 64)  # backward
permute_2 = aten.permute(permute_1, [1, 0])  # backward
return linear, permute_2, linear_1""",
    )
