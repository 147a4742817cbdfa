"""What is declined, and why: every reason of the report, without a GPU.

Limits of devices are data, so a test says which device the pass should think it compiles for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from graph_printer import HOPPER, Captured, capture, device, printed
from networks import Apply
from torch import Tensor, nn
from torch.fx import Graph

import sparse_pass as sp
from sparse_pass.fqn import parse_config
from sparse_pass.graph.parameters import Names
from sparse_pass.one_graph import rewrite_graph
from sparse_pass.plan.limits import Limits

W24 = sp.WeightSparsity()
CPU = Limits(device="cpu")
SM75 = Limits(device="cuda", capability=(7, 5))
NO_LIBRARY = Limits(device="cuda", capability=(8, 0), unavailable="libcusparseLt.so.0 was not found")


@dataclass(frozen=True, kw_only=True)
class Declined:
    """A use of a weight that gets no sparse kernel. The defaults are a case that would get one."""

    function: Callable[[Tensor, Tensor], Tensor] = nn.functional.linear
    weight: tuple[int, ...] = (128, 64)
    input: tuple[int, ...] = (8, 64)
    dtype: torch.dtype = torch.bfloat16
    scheme: sp.WeightSparsity = W24
    limits: Limits = HOPPER
    reason: str
    output: str = "masked_dense"
    grad_input: str = "masked_dense"

    def captured(self, name: str) -> Captured:
        return capture(
            Apply(self.function, *self.weight).to(self.dtype),
            [torch.randn(*self.input, dtype=self.dtype, requires_grad=True)],
            {name: self.scheme},
            limits=device(self.limits),
        )


MASKED_DENSE = {
    "cpu": Declined(limits=CPU, reason="no 2:4 kernels on cpu"),
    "sm75": Declined(
        limits=SM75,
        reason="SM75 has no sparse tensor cores: compute capability 8.0 (A100) or newer is needed",
    ),
    "no_library": Declined(limits=NO_LIBRARY, reason="libcusparseLt.so.0 was not found"),
    "asked": Declined(scheme=sp.WeightSparsity(backend="masked_dense"), reason="backend='masked_dense' was asked for"),
    "float32": Declined(dtype=torch.float32, reason="float32 has no 2:4 kernels, only float16 and bfloat16"),
    "float64": Declined(dtype=torch.float64, reason="float64 has no 2:4 kernels, only float16 and bfloat16"),
    "rows": Declined(weight=(100, 64), reason="the weight is [100, 64]: sparse kernels need multiples of 64"),
    "columns": Declined(
        weight=(128, 32), input=(8, 32), reason="the weight is [128, 32]: sparse kernels need multiples of 64"
    ),
    "left_operand": Declined(
        function=lambda x, w: w @ x.t(),
        reason="the weight is the left operand of the matmul",
        grad_input="cusparselt",
    ),
    "alpha": Declined(
        function=lambda x, w: torch.addmm(x.new_zeros(128), x, w.t(), alpha=2),
        reason="addmm with {'alpha': 2} has no sparse kernel",
        grad_input="cusparselt",
    ),
    "beta": Declined(
        function=lambda x, w: torch.addmm(x.new_zeros(128), x, w.t(), beta=0.5),
        reason="addmm with {'beta': 0.5} has no sparse kernel",
        grad_input="cusparselt",
    ),
    "slice": Declined(
        function=lambda x, w: nn.functional.linear(x, w[:64]),
        reason="the GEMM reads the weight through aten.slice.Tensor",
    ),
    "batched": Declined(
        function=lambda x, w: torch.bmm(x, w.t().expand(2, 64, 128)),
        input=(2, 8, 64),
        reason="the graph has it as aten.bmm.default, which has no sparse kernel",
    ),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in MASKED_DENSE.items()])
def test_masked_dense_reason(case: Declined) -> None:
    """No kernel: the same mathematics all the same, and the report says why."""
    captured = case.captured("w")
    captured.check_invariants()
    (site,) = captured.report.sites
    assert (site.output, site.grad_input, site.grad_weight) == (case.output, case.grad_input, "dense")
    assert site.status == ("masked_dense" if case.grad_input == "masked_dense" else "sparse")
    assert site.reason == case.reason


def test_nothing_declined() -> None:
    """The defaults of the cases above are rewritten: each case is declined for what it changes."""
    (site,) = Declined(reason="").captured("w").report.sites
    assert (site.status, site.reason) == ("sparse", "")
    assert (site.output, site.grad_input, site.grad_weight) == ("cusparselt", "cusparselt", "dense")


SKIPPED = {
    "rows": Declined(
        weight=(10, 64),
        reason="the weight is [10, 64]: 2:4 masks need both dims to be multiples of 4;"
        " pad the layer or leave it dense (map it to None)",
    ),
    "columns": Declined(
        weight=(64, 6),
        input=(8, 6),
        reason="the weight is [64, 6]: 2:4 masks need both dims to be multiples of 4;"
        " pad the layer or leave it dense (map it to None)",
    ),
    "3-D": Declined(
        function=torch.bmm,
        weight=(2, 64, 64),
        input=(2, 8, 64),
        reason="the weight has shape [2, 64, 64]: 2:4 masks are defined for 2-D weights",
    ),
}


@pytest.mark.parametrize("case", SKIPPED.values(), ids=SKIPPED.keys())
def test_skipped_reason(case: Declined) -> None:
    """Reached by a pattern, what cannot be masked at all stays as it was captured, with the reason."""
    captured = case.captured("*")
    (site,) = captured.report.sites
    assert (site.status, site.reason) == ("skipped", case.reason)
    assert (site.output, site.grad_input, site.grad_weight) == ("dense", "dense", "dense")
    assert captured.text == printed(captured.before.graph)


@pytest.mark.parametrize("case", SKIPPED.values(), ids=SKIPPED.keys())
@pytest.mark.parametrize(("name", "strict"), [("w", False), ("*", True)], ids=["exact", "strict"])
def test_skipped_is_an_error(case: Declined, name: str, strict: bool) -> None:
    graph = case.captured("*").before.graph
    before = printed(graph)
    names = Names(by_input={1: ("w",)})
    with pytest.raises(ValueError, match=re.escape(case.reason)):
        rewrite_graph(graph, parse_config({name: W24}), names, strict=strict)
    assert printed(graph) == before


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(x).relu()))


MIXED = {"up": W24, "down": sp.WeightSparsity(backend="masked_dense"), "*": W24}


def outcome(site: sp.Site) -> tuple[str | None, ...]:
    return site.fqn, site.status, site.output, site.grad_input, site.grad_weight


def test_fake_sm90() -> None:
    """What is decided for a GPU, on a machine without one."""
    asked: list[tuple[str, torch.dtype]] = []

    def limits(of: torch.device, dtype: torch.dtype) -> Limits:
        asked.append((of.type, dtype))
        return HOPPER

    x = torch.randn(8, 64, dtype=torch.bfloat16)
    captured = capture(Mlp().to(torch.bfloat16), [x], MIXED, limits=limits)
    captured.check_invariants()
    assert [outcome(site) for site in captured.report.sites] == [
        ("up", "sparse", "cusparselt", None, "dense"),
        ("down", "masked_dense", "masked_dense", "masked_dense", "dense"),
        ("head", "skipped", "dense", "dense", "dense"),
    ]
    assert set(asked) == {("cpu", torch.bfloat16)}


def test_fake_sm75() -> None:
    """An older GPU changes the kernels and not the graph: it is the one that a CPU gets."""
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    on_cpu = capture(Mlp().to(torch.bfloat16), [x], MIXED)
    captured = capture(Mlp().to(torch.bfloat16), [x], MIXED, limits=device(SM75))
    assert [outcome(site) for site in captured.report.sites] == [
        ("up", "masked_dense", "masked_dense", None, "dense"),
        ("down", "masked_dense", "masked_dense", "masked_dense", "dense"),
        ("head", "skipped", "dense", "dense", "dense"),
    ]
    assert captured.text == on_cpu.text


# A backward GEMM that cannot be told is reported. AOTAutograd's own graphs tell; these lost the marks.


def marked_graph(model: nn.Module, name: str) -> Graph:
    return capture(model, [torch.randn(8, 64)], {name: W24}).before.graph


@pytest.mark.parametrize("names", [None, Names(by_input={})], ids=["pass", "backend"])
def test_undescribed_outputs(names: Names | None) -> None:
    graph = marked_graph(Mlp(), "down")
    del graph.output_node().meta["desc"]
    (site,) = rewrite_graph(graph, parse_config({"down": W24}), names).sites
    assert site.reason.endswith("grad_weight: the graph does not describe its outputs; left as captured")
    assert (site.output, site.grad_input) == ("masked_dense", "masked_dense")


@pytest.mark.parametrize("scheme", [sp.WeightSparsity(grad_weight="masked"), sp.WeightSparsity(decay=0.1)], ids=str)
def test_undescribed_outputs_are_an_error_where_they_matter(scheme: sp.WeightSparsity) -> None:
    graph = marked_graph(Mlp(), "down")
    del graph.output_node().meta["desc"]
    before = printed(graph)
    with pytest.raises(ValueError, match=r"'down'.*grad_weight: the graph does not describe its outputs"):
        rewrite_graph(graph, parse_config({"down": scheme}))
    assert printed(graph) == before


def test_unplaced_grad_weight_of_a_shared_weight() -> None:
    """Without ``seq_nr`` nobody can tell which share of the gradient is that of one call."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    graph = marked_graph(model, "2")
    for node in graph.nodes:
        node.meta.pop("seq_nr", None)
    (site,) = rewrite_graph(graph, parse_config({"2": W24})).sites
    assert site.reason.endswith("grad_weight: not found in the graph; left as captured")


def graph_without_numbers() -> Graph:
    """Of a shared weight, whose backward nobody can tell apart."""
    graph = marked_graph(Apply(lambda x, w: (x @ w).sin() @ w, 64, 64), "w")
    for node in graph.nodes:
        if node.meta.get("partitioner_tag") == "is_backward":
            node.meta.pop("seq_nr", None)
    return graph


UNPLACED = (
    "grad_input: a backward GEMM of the weight may belong to any of its calls",
    "grad_weight: not found in the graph; left as captured",
)


@pytest.mark.parametrize("grad_weight", ["dense", "mvue"])
def test_unplaced_backward_of_a_shared_weight(grad_weight: Any) -> None:
    scheme = sp.WeightSparsity(grad_weight=grad_weight)
    report = rewrite_graph(graph_without_numbers(), parse_config({"w": scheme}), Names(by_input={1: ("w",)}))
    assert {site.reason for site in report.sites} == {"; ".join(["no 2:4 kernels on cpu", *UNPLACED])}
    # Whichever call it belongs to, it reads the masked weight, as all of them do; the row of the last one has it.
    assert [(site.grad_input, site.grad_weight) for site in report.sites] == [
        (None, "dense"),
        ("masked_dense", "dense"),
    ]


@pytest.mark.parametrize("described", [True, False], ids=["outputs described", "outputs not described"])
@pytest.mark.parametrize("scheme", [sp.WeightSparsity(grad_weight="masked"), sp.WeightSparsity(decay=0.1)], ids=str)
def test_unplaced_backward_is_an_error_where_it_matters(scheme: sp.WeightSparsity, described: bool) -> None:
    """Also where grad_input is lost too, which is told first and asks for nothing."""
    graph = graph_without_numbers()
    if not described:
        del graph.output_node().meta["desc"]
    reason = UNPLACED[1] if described else "grad_weight: the graph does not describe its outputs; left as captured"
    before = printed(graph)
    with pytest.raises(ValueError, match=f"'w'.*changes grad_weight, but {reason}"):
        rewrite_graph(graph, parse_config({"w": scheme}), Names(by_input={1: ("w",)}))
    assert printed(graph) == before
