"""What the pass writes into a graph, line by line: a table of cases, and the graph of each in the folder ``golden``.

Graphs are those that Inductor would show to the pass (its decompositions included), captured on CPU.
Update them with ``EXPECTTEST_ACCEPT=1 pytest tests/graphs/test_graphs.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_printer import HOPPER, Captured, Fixed, capture, capture_all, device, printed
from networks import Conv1D, FusedMlp, Up, squared_relu
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_pass as sp

GOLDEN = Path(__file__).with_name("golden")
ACCEPT = os.environ.get("EXPECTTEST_ACCEPT")

W24 = sp.WeightSparsity()
ACT = sp.ActivationSparsity()
MVUE = sp.WeightSparsity(grad_weight="mvue")
# On a CPU: the reference kernels.
SPARSE = sp.WeightSparsity(backend="cusparselt")
SPARSE_ACT = sp.ActivationSparsity(backend="cusparselt")
SPARSE_MVUE = sp.WeightSparsity(grad_weight="mvue", backend="cusparselt")
GRADIENTS = sp.GradientSparsity(grad_input="mvue")
SPARSE_GRADIENTS = sp.GradientSparsity(grad_input="mvue", backend="cusparselt")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).sin())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.mlp, x, use_reentrant=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64, bias=False)
        self.second = nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).sin())


class Two(nn.Module):
    """One weight, with 8 rows and with 128."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64, bias=False)

    def forward(self, few: Tensor, many: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(few.sin()), self.fc(many.sin())


class Probed(Up):
    """Called under no_grad before it is called to be trained, or after."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        trained = None if self.first else self.up(x)
        with torch.no_grad():
            probed = self.up(x.cos())
        return (self.up(x) if trained is None else trained) * probed


class Gpt2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc = Conv1D(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_fc(x.sin())


class Autocast(Up):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Between(Up):
    """With something behind it, too."""

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.cos()).sin()


# The cases


@dataclass(frozen=True)
class Case:
    """A model, what is named in it, and what it is captured with."""

    model: Callable[[], nn.Module]
    config: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...] = ((8, 64),)
    """Of the inputs, of which each has a gradient."""
    dtype: torch.dtype = torch.bfloat16
    """Of the model and its inputs."""
    trained: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `capture`."""

    def captured(self) -> Captured:
        inputs = [torch.randn(*shape, dtype=self.dtype, requires_grad=True) for shape in self.shapes]
        with nullcontext() if self.trained else torch.no_grad():
            return capture(self.model().to(self.dtype), inputs, self.config, **self.options)


THREE_DIMS = ((2, 8, 64),)
FEW_AND_MANY = ((8, 64), (128, 64))
TILES_TO_PAD = ((13, 64),)


def measured(few: tuple[float, float], many: tuple[float, float]) -> dict[str, Any]:
    """A device on which GEMMs of few rows and of many take so long, sparse and dense."""
    return {"limits": device(HOPPER), "costs": Fixed({8: few, 128: many}, (1.0, 1.0))}


CASES = {
    # 2:4 weights
    "linear": Case(Up, {"up": W24}),
    "linear-sparse": Case(Up, {"up": SPARSE}),
    "bias": Case(lambda: Up(bias=True), {"up": W24}, THREE_DIMS),
    "bias-sparse": Case(lambda: Up(bias=True), {"up": SPARSE}, THREE_DIMS),
    "checkpointed": Case(Block, {"up": W24}),
    "checkpointed-sparse": Case(Block, {"up": SPARSE, "down": SPARSE}),
    "shared-weight-one-named": Case(Tied, {"second": W24}),
    "shared-weight-one-named-sparse": Case(Tied, {"second": SPARSE}),
    # The times of all its GEMMs count together. Alone, the call with few rows would be dense.
    "shared-weight-pays-together": Case(Two, {"fc": W24}, FEW_AND_MANY, options=measured((20.0, 10.0), (10.0, 30.0))),
    "shared-weight-does-not-pay": Case(Two, {"fc": W24}, FEW_AND_MANY, options=measured((40.0, 10.0), (10.0, 20.0))),
    "read-under-no-grad-first-sparse": Case(lambda: Probed(first=True), {"up": SPARSE}),
    "stored-by-columns": Case(Gpt2, {"c_fc": W24}, THREE_DIMS),
    "stored-by-columns-sparse": Case(Gpt2, {"c_fc": SPARSE}, THREE_DIMS),
    "inference": Case(lambda: Up(bias=True), {"up": W24}, THREE_DIMS, trained=False),
    "inference-sparse": Case(lambda: Up(bias=True), {"up": SPARSE}, THREE_DIMS, trained=False),
    # The mask is chosen on the float32 parameter, not on its rounded copy.
    "autocast": Case(Autocast, {"up": W24}, dtype=torch.float32),
    "autocast-sparse": Case(Autocast, {"up": SPARSE}, dtype=torch.float32),
    "masked-gradient-and-decay": Case(Up, {"up": sp.WeightSparsity(grad_weight="masked", decay=0.5)}),
    "masked-gradient-and-decay-sparse": Case(
        Up, {"up": sp.WeightSparsity(grad_weight="masked", decay=0.5, backend="cusparselt")}
    ),
    # 2:4 gradients
    "estimate": Case(Up, {"up": MVUE}),
    "estimate-sparse": Case(Up, {"up": SPARSE_MVUE}),
    "estimate-and-gradient-of-the-bias-sparse": Case(Gpt2, {"c_fc": SPARSE_MVUE}, THREE_DIMS),
    # 2:4 inputs
    "input-masked-gradient": Case(Up, {"up": sp.ActivationSparsity(grad_input="masked")}),
    "input-sparse": Case(lambda: Between(bias=True), {"up": SPARSE_ACT}, THREE_DIMS),
    "input-fused-sparse": Case(lambda: FusedMlp(squared_relu), {"down": SPARSE_ACT}),
    "input-fused-inference-sparse": Case(
        lambda: FusedMlp(lambda h, gate: F.silu(h) * gate, "linear"), {"down": SPARSE_ACT}, trained=False
    ),
    # 2:4 gradients of dense weights
    "gradients": Case(lambda: Up(bias=True), {"up": GRADIENTS}, TILES_TO_PAD),
    "gradients-sparse": Case(lambda: Up(bias=True), {"up": SPARSE_GRADIENTS}, TILES_TO_PAD),
    "gradient-and-input-sparse": Case(
        lambda: Up(bias=True),
        {"up": (SPARSE_ACT, sp.GradientSparsity(grad_weight="dense", grad_input="mvue", backend="cusparselt"))},
        TILES_TO_PAD,
    ),
    # Both
    "pair": Case(Up, {"up": (W24, sp.ActivationSparsity(mask="rowwise"))}),
    "pair-sparse": Case(Between, {"up": (SPARSE_ACT, SPARSE)}),
    "pair-with-an-estimate-sparse": Case(Between, {"up": (SPARSE_ACT, SPARSE_MVUE)}),
}


def assert_golden(name: str, actual: str) -> None:
    """Against the file of that name."""
    file = GOLDEN / f"{name}.txt"
    if ACCEPT:
        file.write_text(f"{actual}\n")
    assert actual == file.read_text().removesuffix("\n")


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    """The printed graph, which differs from the captured one and holds what every graph holds."""
    captured = CASES[name].captured()
    captured.check_invariants()
    assert captured.text != printed(captured.before.graph)
    assert_golden(name, captured.text)


EXPORTED = {"exported": (W24, torch.float32), "exported-sparse": (SPARSE, torch.bfloat16)}


@pytest.mark.parametrize("name", EXPORTED)
def test_golden_of_an_exported_program(name: str) -> None:
    """torch.export keeps `aten.linear`, and names parameters itself."""
    scheme, dtype = EXPORTED[name]
    module = torch.export.export(Up(bias=True).to(dtype), (torch.randn(*THREE_DIMS[0], dtype=dtype),)).module()
    sp.rewrite(module, {"up": scheme})
    assert_golden(name, printed(module.graph))


def test_each_golden_has_its_case() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == {*CASES, *EXPORTED}


# What a golden graph would say less clearly


def test_one_verdict_of_a_weight() -> None:
    pays, lost = (CASES[f"shared-weight-{what}"].captured() for what in ("pays-together", "does-not-pay"))
    assert [(site.status, site.reason, site.output, site.grad_input) for site in pays.report.sites] == [
        ("sparse", "", "cusparselt", "cusparselt")
    ] * 2
    reason = "measured slower: 101 us with 2:4 kernels, 61 us with a dense masked weight"
    assert [(s.status, s.reason, s.measured) for s in lost.report.sites] == [("masked_dense", reason, True)] * 2


@pytest.mark.parametrize(
    ("model", "calls"), [(Tied, 4), (lambda: Probed(first=False), 3), (lambda: Probed(first=True), 3)]
)
def test_a_weight_is_packed_once(model: Callable[[], nn.Module], calls: int) -> None:
    """For all calls that read it, whichever comes first and by whatever name."""
    captured = Case(model, {"re:.*": SPARSE}).captured()
    captured.check_invariants()
    ops = [str(node.target) for node in captured.after.graph.nodes if "sparse_pass." in str(node.target)]
    assert ops.count("sparse_pass.sparsify.default") == 1
    assert ops.count("sparse_pass.linear.default") == calls == len(ops) - 1


def test_dynamic_batch() -> None:
    captured = capture(
        Up(bias=True).to(torch.bfloat16),
        [torch.randn(3, 8, 64, dtype=torch.bfloat16)],
        {"up": SPARSE},
        dynamic=True,
    )
    captured.check_invariants()
    (site,) = captured.report.sites
    assert isinstance(site.shape[0], str)
    assert site.shape[1:] == (128, 64)
    assert (site.output, site.grad_weight) == ("reference", "dense")


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_invariants_know_strides(rows: int) -> None:
    """Of one row, or none, those of rows and of columns are the same; of more they are not."""
    captured = capture(Up(), [torch.randn(rows, 64, requires_grad=True)], {"up": sp.ActivationSparsity()})
    captured.check_invariants()
    (masked,) = [node for node in captured.after.graph.nodes if node.target is torch.ops.aten.where.self]
    masked.meta["val"] = masked.meta["val"].new_empty_strided((rows, 64), (1, max(rows, 1)))
    with nullcontext() if rows < 2 else pytest.raises(AssertionError, match=r"where.*against meta.*\(64, 1\) against"):
        captured.check_invariants()


def test_graph_break_gives_two_graphs() -> None:
    class Broken(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x)
            torch._dynamo.graph_break()
            return self.down(x.relu())

    first, second = capture_all(Broken(), [torch.randn(8, 64)], {"up": W24, "down": W24})
    for captured, name, other in ((first, "up", "down"), (second, "down", "up")):
        captured.check_invariants()
        assert [site.fqn for site in captured.report.sites] == [name]
        assert captured.report.unmatched == (other,)
