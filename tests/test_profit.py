"""Whether sparse kernels pay: the decision from timings that a test gives, where the GPU would measure them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import TOLERANCE, relative_error
from torch import nn

import sparse_pass as sp
from sparse_pass import profit
from sparse_pass.legal import Limits

Times = tuple[float, float] | None


def trained(monkeypatch: pytest.MonkeyPatch, tune: str = "auto", backend: str = "auto") -> tuple[sp.Site, torch.Tensor]:
    """A linear on a CPU that claims to be a Hopper GPU, and the gradient of its input."""
    limits = Limits(device="cuda", capability=(9, 0))
    monkeypatch.setattr("sparse_pass.rewrite_linear.device_limits", lambda device, dtype: limits)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Tanh(), nn.Linear(64, 64)).bfloat16()
    scheme: Any = sp.WeightSparsity(backend=backend)
    compiled_by = sp.sparse_backend({"1": scheme}, model=model, inner="aot_eager", tune=tune)
    x = torch.randn(8, 64).bfloat16().requires_grad_()
    torch.compile(model, backend=compiled_by)(x).float().square().sum().backward()
    assert x.grad is not None
    (site,) = compiled_by.report.sites
    return site, x.grad


def measured(monkeypatch: pytest.MonkeyPatch, gemm: Times, preparation: Times) -> None:
    """Microseconds, sparse and dense, of each GEMM and of making the operand."""
    monkeypatch.setattr(profit, "_timing", lambda *_, **__: gemm)
    monkeypatch.setattr(profit, "_preparation", lambda *_, **__: preparation)


@pytest.mark.parametrize(
    ("gemm", "preparation", "reason"),
    [
        ((10.0, 20.0), (15.0, 1.0), ""),
        ((10.0, 20.0), (25.0, 5.0), "measured slower: 45 us with 2:4 kernels, 45 us with a dense masked weight"),
        ((20.0, 10.0), (1.0, 1.0), "measured slower: 41 us with 2:4 kernels, 21 us with a dense masked weight"),
        ((10.0, 20.0), None, ""),  # what cannot be measured counts for neither
        (None, (25.0, 1.0), ""),  # M is not known
    ],
)
def test_decision(monkeypatch: pytest.MonkeyPatch, gemm: Times, preparation: Times, reason: str) -> None:
    """Of output and grad_input together, and what S(W) costs is counted; the numbers that come out are the same."""
    measured(monkeypatch, gemm, preparation)
    site, gradient = trained(monkeypatch)
    kernel = "masked_dense" if reason else "cusparselt"
    assert (site.reason, site.output, site.grad_input, site.grad_weight) == (reason, kernel, kernel, "dense")
    assert site.status == ("masked_dense" if reason else "sparse")
    _, expected = trained(monkeypatch, tune="off")
    assert relative_error(gradient, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("how", [{"tune": "off"}, {"backend": "cusparselt"}], ids=str)
def test_nothing_is_measured_where_it_is_not_asked(monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]) -> None:
    measured(monkeypatch, (20.0, 10.0), (1.0, 1.0))
    site, _ = trained(monkeypatch, **how)
    assert site.status == "sparse"


def test_out_of_memory_while_measuring(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on with the sparse kernels, and the log says why nothing was measured."""

    def fails(*_: object, **__: object) -> Times:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(profit, "_timing", fails)
    site, _ = trained(monkeypatch)
    assert (site.status, site.reason) == ("sparse", "")
    assert "could not be measured (CUDA out of memory. Tried to allocate 2.00 GiB)" in caplog.text
