"""Predictions for a GPU that is not there: what is shipped, what lies between, and steps that were measured."""

from __future__ import annotations

import csv
import importlib.util
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import fresh_compile
from torch import Tensor, nn

import sparse_pass as sp
from sparse_pass.plan.costs import Preparation, Product
from sparse_pass.predict.costs import Predicted
from sparse_pass.predict.forecast import Forecast
from sparse_pass.predict.gpus import Gpu, gpu, known_gpus
from sparse_pass.suggest import patterns_of

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
RESULTS = BENCHMARKS / "results"
W24, MVUE = sp.WeightSparsity(), sp.WeightSparsity(grad_weight="mvue")


def shipped() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shipped", BENCHMARKS / "shipped.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_shipped_is_what_was_measured() -> None:
    """After new results: python benchmarks/shipped.py"""
    module = shipped()
    assert module.TARGET.read_text() == module.text()


@pytest.mark.parametrize("key", known_gpus())
def test_measured_points(key: str) -> None:
    """At a shape that was measured the prediction is the measurement; between two rows it is between their rates."""
    one = gpu(key)
    by_weight: dict[tuple[int, int], list[tuple[int, tuple[float, float]]]] = {}
    for (m, k, n), times in one.linears:
        assert one.gemm("other", m, n, k) == pytest.approx(times, rel=0.01)
        by_weight.setdefault((k, n), []).append((m, times))
    for (k, n), points in by_weight.items():
        for (low, first), (high, second) in itertools.pairwise(points):
            middle = one.gemm("other", (low + high) // 2, n, k)
            for which in (0, 1):
                rates = sorted((first[which] / low, second[which] / high))
                assert rates[0] * 0.98 <= middle[which] / ((low + high) // 2) <= rates[1] * 1.02
        assert one.gemm("other", 16, n, k) == pytest.approx(one.gemm("other", points[0][0], n, k)), "no rows are free"


def test_gemms_of_their_own() -> None:
    """A GEMM that was timed by itself counts for its form alone; of another shape it tells what the form gains."""
    linears = (((1024, 256, 256), (10.0, 8.0)), ((4096, 256, 256), (40.0, 30.0)))
    gemms = (("grad_weight", (1024, 256, 256), (12.0, 4.0)),)
    one = Gpu(key="x", name="X", capability=(9, 0), copy=1.0, linears=linears, gemms=gemms, preparations=())
    assert one.gemm("linear", 1024, 256, 256) == pytest.approx((10.0, 8.0))
    assert one.gemm("grad_weight", 1024, 256, 256) == pytest.approx((12.0, 4.0))
    assert one.gemm("grad_weight", 4096, 256, 256) == pytest.approx((40.0, 40.0 / 3))


def test_costs() -> None:
    """As a plan asks: sparse before dense, and None for what is not known."""
    costs = Predicted(gpu("h200"))
    meta = torch.device("meta")
    product = Product(form="linear", device=meta, dtype=torch.bfloat16, m=16384, n=14336, k=4096)
    sparse_us, dense_us = costs.product(product) or (0.0, 0.0)
    assert 1.4 < dense_us / sparse_us < 1.8
    assert costs.product(Product(form="linear", device=meta, dtype=torch.bfloat16, m="s0", n=64, k=64)) is None
    with (RESULTS / "kernels_sparsify.csv").open() as file:
        row = next(csv.DictReader(file))
    shape = int(row["N"]), int(row["K"])

    def asked(**changed: Any) -> tuple[float, float] | None:
        given = {"operand": "S(W)", "shape": shape, "stored": torch.bfloat16, "mask": row["mask"]} | changed
        return costs.preparation(Preparation(device=meta, dtype=torch.bfloat16, **given))

    assert (asked() or (0.0,))[0] == pytest.approx(float(row["us"]))
    assert asked(stored=torch.float64) is asked(operand="") is None


class LlamaLayer(nn.Module):
    """That of benchmarks/end_to_end.py."""

    def __init__(self, dim: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, dim))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class VitBlock(nn.Module):
    """That of timm's vit_large_patch16_224."""

    def __init__(self, dim: int = 1024, heads: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


@pytest.fixture(scope="module", autouse=True)
def _fresh() -> Any:
    with fresh_compile():
        yield


def on_meta(model: type[nn.Module], *sizes: int) -> nn.Module:
    with torch.device("meta"):
        return model(*sizes).to(torch.bfloat16)


def measured(folder: str, file: str, linears: str) -> tuple[float, float]:
    """Milliseconds of a dense step, and how many times faster it got."""
    with (RESULTS / folder / f"{file}.csv").open() as open_file:
        rows = {row["linears"]: row for row in csv.DictReader(open_file) if row["mode"] == "default"}
    return float(rows["dense"]["step ms"]), float(rows[linears]["speedup"])


STEPS = [
    ("h100", "h100", "end_to_end_llama", "all", W24, 0.02),
    ("h200", "", "end_to_end_llama", "all, mvue", MVUE, 0.05),
    ("h100", "h100", "end_to_end_vit", "all, mvue", MVUE, 0.05),
    ("h200", "", "end_to_end_vit", "all", W24, 0.02),
]
"""How far the predicted gain of the step may be off."""


@pytest.mark.parametrize(("key", "folder", "file", "linears", "scheme", "within"), STEPS)
def test_steps_that_were_measured(
    key: str, folder: str, file: str, linears: str, scheme: sp.WeightSparsity, within: float
) -> None:
    """One of 24 equal layers, which are almost all of the step."""
    llama = "llama" in file
    model = on_meta(LlamaLayer, 2048, 8192, 16) if llama else on_meta(VitBlock)
    shape = (8, 2048, 2048) if llama else (128, 197, 1024)
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    report = sp.explain(model, {"re:.*": scheme}, device=key)(x)
    assert isinstance(report, Forecast)
    step_ms, speedup = measured(folder, file, linears)
    assert report.gain == pytest.approx(speedup, abs=within)
    assert 24 * report.dense_us / 1e3 == pytest.approx(step_ms, rel=0.15)


class Mixed(nn.Module):
    """Two large linears, a small one, one of odd sizes, and a head that is tied to a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4096, 4096)
        self.blocks = nn.ModuleList(nn.Linear(4096, 4096, bias=False) for _ in range(2))
        self.small, self.odd = nn.Linear(4096, 64), nn.Linear(4096, 50)
        self.head = nn.Linear(4096, 4096, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = F.relu(block(x))
        return self.head(x).sum() + self.small(x[:, :1]).sum() + self.odd(x).sum()


def test_all_linears_are_counted() -> None:
    """Those that no entry names, and those that None leaves dense; of the rest the report is what it was."""
    model, ids = on_meta(Mixed), torch.zeros(4, 2048, device="meta", dtype=torch.long)
    config = {"blocks.*": W24, "blocks.1": None, "small": W24, "fc9*": W24}
    report = sp.explain(model, config, device="h200")(ids)
    assert isinstance(report, Forecast)
    assert [(site.fqn, site.status) for site in report.sites] == [("blocks.0", "sparse"), ("small", "masked_dense")]
    assert "predicted slower" in report.sites[1].reason
    assert report.unmatched == ("fc9*",)
    assert any("'fc9*' names no linear that ran" in note for note in report.notes)
    assert [(layer.fqn, layer.named) for layer in report.layers] == [
        ("blocks.0", True), ("blocks.1", False), ("head", False), ("small", True), ("odd", False),
    ]  # fmt: skip
    m, flops = 4 * 2048, [layer.flops for layer in report.layers]
    assert flops == [6 * m * 4096 * 4096 * of for of in (1, 1, 1)] + [6 * 4 * 64 * 4096, 6 * m * 50 * 4096]
    assert report.coverage == (flops[0] + flops[3]) / sum(flops)
    first, second = report.layers[:2]
    assert first.dense_us == second.dense_us == second.planned_us
    assert first.planned_us[2] == first.dense_us[2], "grad_weight is dense"
    assert second.preparation_us == 0 < first.preparation_us
    assert report.step_us - report.dense_us == pytest.approx(sum(one.after_us - one.before_us for one in report.layers))


def test_suggest() -> None:
    """The large ones, as one pattern; not the tied head. With few rows nothing, and then a config would be empty."""
    model = on_meta(Mixed)
    ids = torch.zeros(4, 2048, device="meta", dtype=torch.long)
    assert sp.suggest(model, scheme=MVUE)(ids) == {"blocks.*": MVUE}
    assert sp.suggest(model)(ids[:1, :64]) == {}


def test_patterns() -> None:
    known = ["h.0.up", "h.1.up", "h.0.down", "h.1.down", "h.1.x.2", "out"]
    assert patterns_of(["h.0.up", "h.1.up", "h.1.down", "h.1.x.2", "out"], known) == [
        "h.*.up",
        "h.1.down",
        "h.1.x.2",
        "out",
    ]


def test_float8_is_not_measured_yet() -> None:
    """Its kernels are taken, at the times of 16 bits, and a note says so."""
    x = torch.empty(8192, 2048, device="meta", dtype=torch.bfloat16)
    model = on_meta(nn.Sequential)
    model.append(nn.Linear(2048, 2048, device="meta", dtype=torch.bfloat16))
    wide, narrow = (
        sp.explain(model, {"0": sp.WeightSparsity(precision=precision)}, device="h100")(x)
        for precision in ("captured", "float8")
    )
    assert isinstance(wide, Forecast)
    assert isinstance(narrow, Forecast)
    assert narrow.sites[0].output == "cusparselt"
    assert narrow.step_us == wide.step_us
    assert any("no times of float8" in note for note in narrow.notes)


def test_what_cannot_be_predicted() -> None:
    model = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="device='a100': measurements are shipped for 'h200', 'h100'"):
        sp.explain(model, {"re:.*": W24}, device="a100")
    report = sp.explain(model, {"weight": W24}, device="H100")(torch.randn(8, 64))
    assert isinstance(report, Forecast)
    assert report.layers[0].dense_us == ()
    assert any("call the model under torch.autocast" in note for note in report.notes)
