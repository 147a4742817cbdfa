"""Whether sparse kernels pay: the decision from timings that a test gives, where the GPU would measure them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_printer import HOPPER, Fixed, capture, device, trains_as
from support import TOLERANCE, check_invariants, graph_facts, relative_error
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph
from torch.utils._pytree import tree_map

import sparse_pass as sp
from sparse_pass import graph_pass
from sparse_pass.fqn import parse_config
from sparse_pass.kernels import backends, measure, probe
from sparse_pass.kernels.problem import Problem
from sparse_pass.kernels.timings import Timing
from sparse_pass.one_graph import rewrite_graph
from sparse_pass.plan import costs as costs_module
from sparse_pass.plan.costs import Costs, Measured, Product, Times
from sparse_pass.plan.limits import Limits


def trained(costs: Costs | None, backend: str = "auto") -> tuple[sp.Site, torch.Tensor]:
    """A linear on a CPU that claims to be a Hopper GPU, and the gradient of its input."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Tanh(), nn.Linear(64, 64)).bfloat16()
    scheme: Any = sp.WeightSparsity(backend=backend)
    compiled_by, reports = trains_as(HOPPER, model, {"1": scheme}, costs)
    x = torch.randn(8, 64).bfloat16().requires_grad_()
    torch.compile(model, backend=compiled_by)(x).float().square().sum().backward()
    assert x.grad is not None
    ((site,),) = (report.sites for report in reports)
    return site, x.grad


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
def test_decision(gemm: Times, preparation: Times, reason: str) -> None:
    """Of output and grad_input together, and what S(W) costs is counted; the numbers that come out are the same."""
    site, gradient = trained(Fixed(gemm, preparation))
    kernel = "masked_dense" if reason else "cusparselt"
    assert (site.reason, site.output, site.grad_input, site.grad_weight) == (reason, kernel, kernel, "dense")
    assert (site.status, site.measured) == (("masked_dense", True) if reason else ("sparse", False))
    _, expected = trained(None)
    assert relative_error(gradient, expected) < TOLERANCE[torch.bfloat16]


def test_kernels_that_are_asked_for_are_taken() -> None:
    site, _ = trained(Fixed((20.0, 10.0), (1.0, 1.0)), backend="cusparselt")
    assert site.status == "sparse"


def test_out_of_memory_while_measuring(caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on with the sparse kernels, and the log says why nothing was measured."""

    class Full(Fixed):
        def product(self, product: Product) -> Times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    site, _ = trained(Full(None, None))
    assert (site.status, site.reason) == ("sparse", "")
    assert "could not be measured (CUDA out of memory. Tried to allocate 2.00 GiB)" in caplog.text


# What is asked of a GPU: of a graph whose tensors are said to be on one


def on_a_gpu(graph: Graph) -> Graph:
    """The same graph, captured on a CPU, with fake tensors of a CUDA device."""
    fakes = (value for node in graph.nodes if isinstance(value := node.meta.get("val"), FakeTensor))
    mode = FakeTensorMode(shape_env=next(fakes).fake_mode.shape_env)

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map(moved, node.meta["val"])
    return graph


class Asked:
    """A GPU, its measurements, and what is asked: sizes of GEMMs by form, and what operands are made from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backend = backends.SM90
        self.gemm: Timing | None = Timing(0, 10.0, 20.0)
        self.gemms: list[tuple[Any, ...]] = []
        self.operands: list[tuple[Any, ...]] = []
        monkeypatch.setattr(probe, "backend", lambda device, dtype: self.backend)
        monkeypatch.setattr(measure, "timing_of", self._timing)
        monkeypatch.setattr(measure, "preparation_of", self._preparation)

    def _timing(self, problem: Problem, *, measure: bool) -> Timing | None:
        assert measure
        assert (problem.device, problem.dtype) == (0, torch.bfloat16)
        self.gemms.append((problem.form, problem.m, problem.n, problem.k, problem.bias))
        return self.gemm

    def _preparation(self, packers: measure.Packers, *what: Any) -> Timing:
        assert packers == (self.backend.name, self.backend.packer)
        self.operands.append(what)
        return Timing(0, 3.0, 1.0)

    def sites(
        self, scheme: Any, model: nn.Module | None = None, tune: Any = "auto", dynamic: bool = False
    ) -> sp.Report:
        """Rewrite the graph of a step of the linear "1", and keep it as `graph`."""
        model = model or nn.Sequential(nn.Tanh(), nn.Linear(64, 128)).bfloat16()
        x = torch.randn(13, 64, dtype=torch.bfloat16, requires_grad=True)
        self.graph = on_a_gpu(capture(model, [x], {"1": None}, dynamic=dynamic).before.graph)
        before = graph_facts(self.graph)
        costs = Measured() if tune == "auto" else None
        report = rewrite_graph(self.graph, parse_config({"1": scheme}), limits=device(HOPPER), costs=costs)
        check_invariants(self.graph, before)
        return report

    @property
    def tuned(self) -> dict[str, bool]:
        """Whether each product of the rewritten graph may take the fastest algorithm."""
        names = {"linear", "grad_weight", "grad_input", "input_linear", "input_grad_weight"}
        calls = [n for n in self.graph.nodes if "sparse_pass." in str(n.target)]
        found = {str(node.target).split(".")[1]: node.kwargs.get("tuned", False) for node in calls}
        return {name: tuned for name, tuned in found.items() if name in names}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(monkeypatch)


BF16 = torch.bfloat16
GPU = torch.device("cuda", 0)


def test_gemms_of_a_weight(asked: Asked) -> None:
    """M is padded to a multiple of 8. grad_input is the product with W^T, without the bias; S(W) is made once."""
    (site,) = asked.sites(sp.WeightSparsity(mask="greedy")).sites
    assert (site.status, site.reason, site.output, site.grad_input) == ("sparse", "", "cusparselt", "cusparselt")
    assert asked.gemms == [("linear", 16, 128, 64, True), ("linear", 16, 64, 128, False)]
    assert asked.operands == [("S(W)", 0, (128, 64), (BF16, BF16), "greedy")]
    assert asked.tuned == {"linear": True}


def test_gemms_of_a_gradient(asked: Asked) -> None:
    """M is padded to a multiple of 64; K of the estimate, which has N rows."""
    (site,) = asked.sites(sp.WeightSparsity(grad_weight="mvue")).sites
    assert (site.reason, site.grad_weight) == ("", "cusparselt")
    assert asked.gemms[2:] == [("grad_weight", 64, 128, 64, False)]
    assert asked.operands[1:] == [("MVUE(dY)", 0, (13, 128), (BF16, BF16), "")]
    assert asked.tuned == {"linear": True, "grad_weight": True}


def test_gemms_of_gradients_alone(asked: Asked) -> None:
    """Each is asked for by itself, with what its own estimate costs: that of grad_input is of the transpose."""
    (site,) = asked.sites(sp.GradientSparsity(grad_input="mvue")).sites
    assert (site.reason, site.output, site.grad_input, site.grad_weight) == ("", "dense", "cusparselt", "cusparselt")
    assert asked.gemms == [("grad_input", 64, 64, 128, False), ("grad_weight", 64, 128, 64, False)]
    assert asked.operands == [
        ("MVUE(dY^T)", 0, (13, 128), (BF16, BF16), ""),
        ("MVUE(dY)", 0, (13, 128), (BF16, BF16), ""),
    ]
    assert asked.tuned == {"grad_weight": True, "grad_input": True}
    asked.gemm = Timing(0, 9.0, 10.0)  # faster by less than packing costs
    (site,) = asked.sites(sp.GradientSparsity(grad_weight="dense", grad_input="mvue")).sites
    assert (site.status, site.measured, site.grad_input) == ("masked_dense", True, "masked_dense")
    assert site.reason == (
        "grad_input: measured slower: 12 us with 2:4 kernels, 11 us with a dense estimate of grad_output"
    )


def test_gemms_of_an_input(asked: Asked) -> None:
    (site,) = asked.sites(sp.ActivationSparsity()).sites
    assert (site.reason, site.output, site.grad_weight) == ("", "cusparselt", "cusparselt")
    assert asked.gemms == [("input", 128, 64, 64, False), ("input_grad_weight", 128, 64, 64, False)]
    assert asked.operands == [("S(X)", 0, (13, 64), (BF16, BF16), "optimal")]
    assert asked.tuned == {"input_linear": True, "input_grad_weight": True}


def test_gemms_of_an_input_whose_weight_is_frozen(asked: Asked) -> None:
    model = nn.Sequential(nn.Tanh(), nn.Linear(64, 128)).bfloat16().requires_grad_(False)
    assert asked.sites(sp.ActivationSparsity(), model).sites[0].status == "sparse"
    assert asked.gemms == [("input", 128, 64, 64, False)]


def test_slower_on_a_gpu(asked: Asked) -> None:
    asked.gemm = Timing(0, 20.0, 10.0)
    for scheme, reason in (
        (sp.WeightSparsity(), "measured slower: 43 us with 2:4 kernels, 21 us with a dense masked weight"),
        (sp.ActivationSparsity(), "measured slower: 43 us with 2:4 kernels, 21 us with a dense masked input"),
    ):
        (site,) = asked.sites(scheme).sites
        assert (site.status, site.reason) == ("masked_dense", reason)
    (site,) = asked.sites(sp.WeightSparsity(grad_weight="mvue")).sites
    assert site.reason.endswith(
        "grad_weight: measured slower: 23 us with 2:4 kernels, 11 us with a dense estimate of grad_output"
    )


@pytest.mark.parametrize("why", ["layout", "unknown"])
def test_what_cannot_be_measured_is_taken(asked: Asked, why: str) -> None:
    """By torch's own calls, which choose their algorithm themselves; or a timing that is not known."""
    asked.backend, asked.gemm = (backends.COMPRESS if why == "layout" else backends.SM90), None
    assert asked.sites(sp.WeightSparsity()).sites[0].status == "sparse"
    assert len(asked.gemms) == (0 if why == "layout" else 2)
    assert asked.operands == []


@pytest.mark.parametrize(
    "scheme",
    [sp.WeightSparsity(grad_weight="mvue"), sp.ActivationSparsity(), sp.GradientSparsity(grad_input="mvue")],
    ids=str,
)
def test_of_an_unknown_number_of_rows_nothing_is_asked(asked: Asked, scheme: Any) -> None:
    """The kernels are taken; they measure by themselves when they are called."""
    (site,) = asked.sites(scheme, dynamic=True).sites
    assert (site.status, site.reason, site.shape[1:]) == ("sparse", "", (128, 64))
    assert asked.gemms == asked.operands == []
    assert set(asked.tuned.values()) == {True}


def test_without_tuning_nothing_is_asked(asked: Asked) -> None:
    for scheme in (sp.WeightSparsity(grad_weight="mvue"), sp.ActivationSparsity()):
        assert asked.sites(scheme, tune="off").sites[0].status == "sparse"
        assert set(asked.tuned.values()) == {False}
    assert asked.gemms == asked.operands == []


def test_kernels_that_are_asked_for_need_not_pay(asked: Asked) -> None:
    """Which is the fastest is another question."""
    for scheme in (
        sp.WeightSparsity(grad_weight="mvue", backend="cusparselt"),
        sp.ActivationSparsity(backend="cusparselt"),
    ):
        assert asked.sites(scheme).sites[0].status == "sparse"
        assert set(asked.tuned.values()) == {True}
    assert asked.gemms == asked.operands == []


def test_a_weight_of_float64_costs_nothing_that_is_known(asked: Asked) -> None:
    """That of a model in mixed precision; it is packed by the reference."""
    model = nn.Sequential(nn.Tanh(), InBfloat16(64, 128, dtype=torch.float64))
    assert asked.sites(sp.WeightSparsity(), model).sites[0].status == "sparse"
    assert len(asked.gemms) == 2
    assert asked.operands == []


class InBfloat16(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def test_the_current_device_is_meant_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    assert costs_module._index(torch.device("cuda")) == 5
    assert costs_module._index(torch.device("cuda", 0)) == 0


def test_compile_caches_know_what_the_device_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that was compiled with sparse kernels must not be found where they do not work, nor the other way round."""
    asked = []

    def limits(device: torch.device, dtype: torch.dtype) -> Limits:
        asked.append((device, dtype))
        return Limits(device="cuda", capability=(9, 0), unavailable=reasons[0])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(graph_pass, "device_limits", limits)
    keys, reasons = [], ["", "libcusparseLt.so.0 was not found", ""]
    while reasons:
        keys.append(sp.SparsePass({"1": sp.WeightSparsity()}).uuid())
        reasons.pop(0)
    assert keys[0] == keys[2] != keys[1]
    assert set(asked) == {(torch.device("cuda", 1), dtype) for dtype in (torch.float16, torch.bfloat16)}
