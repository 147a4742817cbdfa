"""What a new estimator of grad_output takes: operators, a row of the table, and its name in the config."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_printer import Captured, capture
from support import TOLERANCE, errors, run
from torch import Tensor, nn

import sparse_pass as sp
from sparse_pass import config
from sparse_pass.ops.reference import weights as reference
from sparse_pass.plan.table import ESTIMATORS, Estimator

# The first place: what it computes. It keeps the two first rows of every four.


def _kept(grad: Tensor) -> Tensor:
    return torch.arange(len(grad))[:, None].expand(grad.shape) % 4 < 2


@torch.library.custom_op("toy::first_two", mutates_args=())
def first_two(grad: Tensor) -> Tensor:
    return torch.where(_kept(grad), grad, 0)


@torch.library.custom_op("toy::pack_first_two", mutates_args=())
def pack_first_two(grad: Tensor) -> Tensor:
    padded = nn.functional.pad(grad, (0, 0, 0, -len(grad) % 64)).T.contiguous()
    return reference.pack(padded, _kept(padded.T).T.contiguous())


first_two.register_fake(lambda grad: torch.empty_like(grad))
pack_first_two.register_fake(lambda grad: grad.new_empty((len(grad) + -len(grad) % 64) * grad.shape[1] * 9 // 16))


@pytest.fixture(params=["", "toy::pack_first_two"], ids=["dense", "packed"])
def packed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    # The second place: a row of the table.
    monkeypatch.setitem(ESTIMATORS, "first_two", Estimator(dense="toy::first_two", packed=request.param))
    # The third place: a choice of the scheme. In the package it is a word more of `config.GradWeight`.
    choices = (*config._WEIGHT_CHOICES["grad_weight"], "first_two")
    monkeypatch.setitem(config._WEIGHT_CHOICES, "grad_weight", choices)
    return str(request.param)


def test_a_toy_estimator(packed: str) -> None:
    """That is all: it is found, planned, applied and reported."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Tanh(), nn.Linear(64, 128)).bfloat16()
    scheme: Any = sp.WeightSparsity(grad_weight="first_two", backend="cusparselt")
    x = torch.randn(13, 64, dtype=torch.bfloat16, requires_grad=True)

    graph: Captured = capture(model, [x], {"1": scheme})
    graph.check_invariants()
    (site,) = graph.report.sites
    assert (site.status, site.output, site.grad_weight) == (
        "sparse",
        "reference",
        "reference" if packed else "masked_dense",
    )
    assert site.reason == ("" if packed else "grad_weight: grad_weight='first_two' has no 2:4 kernel")
    assert ("toy.pack_first_two(" in graph.text, "toy.first_two(" in graph.text) == (bool(packed), not packed)

    class Estimated(torch.autograd.Function):
        """The linear with the same weight, and the estimate in grad_weight alone."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            masked = torch.where(sp.mask24(weight), weight, 0)
            ctx.save_for_backward(x, masked)
            return nn.functional.linear(x, masked, bias)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            x, masked = ctx.saved_tensors
            return grads[0] @ masked, first_two(grads[0]).T @ x, grads[0].sum(0)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=sp.sparse_backend({"1": scheme}, model=model, inner="aot_eager"))
    parameters = dict(model.named_parameters())
    actual = run(compiled, parameters, [x])
    expected = run(lambda x: Estimated.apply(x.tanh(), model[1].weight, model[1].bias), parameters, [x])
    assert max(errors(actual, expected).values()) < TOLERANCE[torch.bfloat16]
