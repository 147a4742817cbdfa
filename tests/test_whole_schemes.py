"""Half a scheme is never computed: where output is masked, the backward of the same call reads the masked weight too.

The reference is the model with pruned weights, whose gradient goes straight through the mask: `pruned` runs the very
same modules with S(W) in the place of W.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import Result, errors, fresh_compile, invariants_checked, run
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sparse_pass as sp

W24 = sp.WeightSparsity()
COMPUTES = "the GEMM reads what the graph computes from the weight"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_compile():
        yield


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def pruned(model: nn.Module, *names: str, scheme: sp.WeightSparsity = W24) -> nn.Module:
    """A copy of the model that holds S(W) in the place of the weights of the named modules."""
    copied = copy.deepcopy(model)
    for name in names:
        weight = copied.get_submodule(name).weight
        weight.data = torch.where(sp.mask24(weight.detach(), scheme.mask), weight.detach(), 0)
    return copied


def both(
    model: nn.Module, names: tuple[str, ...], *inputs: Any, scheme: Any = W24, **options: Any
) -> tuple[Result, Result, sp.Report]:
    """The compiled model with the scheme, the pruned model, and the report."""
    reference = pruned(model, *names)
    backend = sp.sparse_backend(dict.fromkeys(names, scheme), model=model, inner="aot_eager", **options)
    with invariants_checked():
        actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), inputs)
    expected = run(reference, dict(reference.named_parameters()), inputs)
    return actual, expected, backend.report


def assert_equal(actual: Result, expected: Result) -> None:
    found = errors(actual, expected)
    assert max(found.values()) == 0, found


# Weights that forward and backward compute anew


def quantized(w: Tensor) -> Tensor:
    scale = w.abs().amax() / 127
    return (w / scale).round() * scale


class Quantizing(torch.autograd.Function):
    """Quantizes in the forward, and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ quantized(w).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ quantized(w), grad.t() @ x


class OnlyBackward(Quantizing):
    """Quantizes for grad_input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()


class OnlyForward(Quantizing):
    """A straight-through backward: grad_input reads the weight as it is."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


class QLinear(nn.Linear):
    """A linear by a function of its weight."""

    def __init__(self, n: int, k: int, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(k, n, bias=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def fake_quantized(x: Tensor, w: Tensor) -> Tensor:
    """Per tensor, and straight-through by hand."""
    return F.linear(x, w + (quantized(w) - w).detach())


def clamped(x: Tensor, w: Tensor) -> Tensor:
    """The backward of each op reads the weight: clamp, tanh, and a scale that has a gradient."""
    return F.linear(x, (w.clamp(-0.08, 0.08) / w.abs().amax(1, keepdim=True)).tanh() * w)


def grouped(x: Tensor, w: Tensor) -> Tensor:
    """Per group of eight columns."""
    groups = w.view(w.shape[0], -1, 8)
    scale = groups.detach().abs().amax(-1, keepdim=True) / 7
    rounded = groups + ((groups / scale).round().clamp(-8, 7) * scale - groups).detach()
    return F.linear(x, rounded.view(w.shape))


def by_torch(x: Tensor, w: Tensor) -> Tensor:
    """torch's own fake quantization, per channel."""
    scale = w.detach().abs().amax(1).float() / 127
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return F.linear(x, torch.fake_quantize_per_channel_affine(w.float(), scale, zero, 0, -128, 127).to(w.dtype))


def dequantizing(x: Tensor, w: Tensor) -> Tensor:
    """The scale, computed once more, comes after the matmul."""
    scale = w.detach().abs().amax() / 127
    return F.linear(x, (w / scale).round() + (w - w.detach())) * (w.detach().abs().amax() / 127)


RECOMPUTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "quantizing function": Quantizing.apply,
    "quantized in the backward only": OnlyBackward.apply,
    "quantized in the forward only": OnlyForward.apply,
    "fake quantized": fake_quantized,
    "clamped and scaled": clamped,
    "grouped": grouped,
    "by torch": by_torch,
    "from the left": lambda x, w: (quantized(w) @ x.t()).t(),
    "transposed first": lambda x, w: x @ quantized(w.t()),
    "scaled after the matmul": dequantizing,
}


@pytest.mark.parametrize("way", RECOMPUTED)
def test_the_weight_is_masked_at_its_root(way: str) -> None:
    """Output and gradients are those of the model with pruned weights, bit for bit, and there is one row."""
    model = nn.Sequential(nn.Tanh(), QLinear(32, 64, RECOMPUTED[way]), nn.Tanh()).double()
    actual, expected, report = both(model, ("1",), leaf(8, 64))
    assert_equal(actual, expected)
    (site,) = report.sites
    assert (site.fqn, site.status, site.shape) == ("1", "masked_dense", (8, 32, 64))
    assert (site.output, site.grad_input, site.grad_weight) == ("masked_dense", "masked_dense", "dense")
    assert COMPUTES in site.reason
    assert max(errors(actual, run(model, dict(model.named_parameters()), [leaf(8, 64)])).values()) > 0.1
