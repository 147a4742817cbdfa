"""The pages under docs/: their code runs, the site has them all, and what they list is what there is."""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import GAP, sentences
from pages import PAGES, ROOT, blocks, ran
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import sparse_pass as sp
from sparse_pass import registered

PACKAGE = Path(sp.__file__).parent


@pytest.fixture
def op_by_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default of `inner` is the fast one. Inductor itself compiles the README's code and that of the recipes."""
    monkeypatch.setattr(sp, "sparse_backend", functools.partial(sp.sparse_backend, inner="aot_eager"))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = OrderedDict(w1=nn.Linear(16, 32), act=nn.ReLU(), w2=nn.Linear(32, 16))
        self.feed_forward = nn.Sequential(layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.feed_forward(x)


class Titan(nn.Module):
    """With layers in a dict, as torchtitan's models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"0": Layer(), "1": Layer()})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


def of_distributed() -> dict[str, Any]:
    """What stands there for the user's own: a model, a stage of it, a loss, a batch."""
    stage = nn.Module()
    model, stage.layers = Titan(), nn.ModuleDict({"1": Layer()})
    return {
        "sp": sp, "torch": torch, "make_fx": make_fx, "loss_fn": nn.functional.mse_loss,
        "model": model, "stage": stage, "config": {"layers.0.feed_forward.w1": sp.WeightSparsity()},
        "x": torch.randn(8, 16), "y": torch.randn(8, 16),
    }  # fmt: skip


RAN = [page for page in PAGES if page.startswith("docs/") and blocks("python", page)]


OF_THEIR_OWN = {"docs/clients.md", "docs/distributed.md", "docs/recipes.md"}


@pytest.mark.usefixtures("op_by_op")
@pytest.mark.parametrize("page", [page for page in RAN if page not in OF_THEIR_OWN])
def test_code(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    ran(page, capsys)


def test_snippets_of_distributed(capsys: pytest.CaptureFixture[str]) -> None:
    for code in blocks("python", "docs/distributed.md"):
        exec(compile(code, "docs/distributed.md", "exec"), of_distributed())
    assert "layers.0.feed_forward.w1" in capsys.readouterr().out


def test_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    namespace, outputs = ran("docs/recipes.md", capsys)
    assert namespace["backend"].report.graphs == 3, "dense, sparse, and sparse without gradients"
    assert any("are not 2:4: 'fc1' has" in output for output in outputs), "what verify24 says of a moved weight"


@pytest.mark.usefixtures("op_by_op")
@pytest.mark.filterwarnings("ignore")  # of the trainers
def test_clients(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them has trained the named layers sparse, and none besides."""
    for name in ("transformers", "accelerate", "lightning", "peft"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    namespace, outputs = ran("docs/clients.md", capsys)
    names = {f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("up", "down")}
    reports = [output for output in outputs if "named linears in" in output]
    assert len(reports) == 7
    for report in reports:
        # One block may serve the other, which a note says; PEFT's names have a prefix, and below an adapter an end.
        found = re.findall(r"(?:^|\W|base_model\.model\.)(blocks\.\d\.\w+)", report)
        assert set(found) == names, report
        assert report.count("w24") in (2, 4)
    assert sp.load_config("sparse.json") == namespace["vit"]
