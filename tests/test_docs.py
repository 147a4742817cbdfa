"""The pages under docs/: their code runs, the site has them all, and what they list is what there is."""

from __future__ import annotations

import functools
import json
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from messages import GAP, sentences
from pages import PAGES, ROOT, blocks, ran
from support import fresh_compile
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import sparse_pass as sp
from sparse_pass.cli.main import main

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


@pytest.mark.loops
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


NO_MESSAGES = [
    # Grouped on the page: what operators say of the tensors that they are given.
    r"ops/.*",
    # Assembly, HTML, types, patterns, names of files: no sentences.
    r"kernels/(activations|layout|layout_float8|mvue)\.py",
    r"report\.py: (<|sparse_pass: … named|int \|)",
    r"config\.py: (tuple\[|Single|WeightSparsity \|)",
    r"fqn\.py: \s*\\",
    r"(predict/gpus|plan/costs|schedule|serialize|metrics)\.py: (tuple|dict|Mapping)\[",
    r"dynamo/(sources|regions|phases)\.py",  # guards, which Dynamo prints with TORCH_LOGS=recompiles
    r"graph/gemms\.py: mm\|",
    # What a sentence of the page is completed by, and what is no trouble.
    r"cli/main\.py: MODEL is one of",
    r"cli/(output|bench)\.py: (import sparse_pass|\[green\]|dense / 2:4|1\.30x)",
    r"doctor\.py: (none|cuSPARSELt, the|torch's own|… file)",
    r"predict/forecast\.py: (GEMM times|of the dense step|predicted for|the config names)",
    r"serialize\.py: \{",
    r"kernels/(cusparselt|measure)\.py: (a plan that|…: %)",
    r"shards\.py: … in … over mesh dim",
    r"suggest\.py: \s*…?$",
]
"""Of `file: text`, the texts that the page of messages need not have, and why."""


def told() -> list[str]:
    """What the first columns of its tables quote."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    rows = [row for row in re.findall(r"^\| (.+?) \| .+ \|$", page, re.MULTILINE) if "`" in row]
    return [text for row in rows for text in re.findall(r"`([^`]+)`", row)]


def test_every_message_has_an_entry() -> None:
    """And every entry is a message: the page holds what the package can say, and nothing that it no longer says."""
    known = [re.compile(".*".join(map(re.escape, text.split(GAP)))) for text in told()]
    said = sentences(PACKAGE)
    excused = re.compile("|".join(NO_MESSAGES))
    missing = [
        f"{file}: {text}"
        for text, file in said.items()
        if not excused.match(f"{file}: {text}") and not any(one.search(text) for one in known)
    ]
    assert not missing, "\n".join(["no entry in docs/troubleshooting.md for", *missing])
    ours = [text for text in told() if " " in text and not re.match(r"masked_dense|nn\.|torch\.func", text)]
    stale = [text for text in ours if not any(re.search(".*".join(map(re.escape, text.split(GAP))), s) for s in said)]
    assert not stale, f"nothing says {stale}"


# The site


def test_the_site_has_every_page() -> None:
    """mkdocs itself is run by .ci/run, which finds dead links too; this needs no mkdocs."""
    text = (ROOT / "mkdocs.yml").read_text()
    nav = re.findall(r": (\w+\.md)$", text[text.index("\nnav:") :], re.MULTILINE)
    assert sorted(nav) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    assert len(nav) == len(set(nav))


def test_the_reference_has_every_public_name() -> None:
    found = re.findall(r"^::: sparse_pass\.(\w+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)
    assert sorted(found) == sp.__all__


# Predictions


EXPLAINED = re.findall(
    r"```bash\nsparse-pass explain ([^\n]+)\n```\n\n```text\n(.*?)```",
    (ROOT / "docs/explain.md").read_text(),
    re.DOTALL,
)


def explained(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with fresh_compile():
        assert main(["explain", *words]) == 0
    return "".join(f"{line.rstrip()}\n" for line in capsys.readouterr().out.strip("\n").splitlines())


def rows_of(output: str) -> set[str]:
    """Of the table, without the numbers of layers and what is aligned to them."""
    table = output.partition("\n\n")[2].partition("1.30x:")[0]
    rows = re.findall(r"^ +(\w\S+\.\S+)(?: \(\d+\))? +(\d.+)$", table, re.MULTILINE)
    return {f"{re.sub(r'[.][0-9]+[.]', '.*.', name)} {' '.join(cells.split())}" for name, cells in rows}


@pytest.mark.parametrize(("command", "shown"), EXPLAINED, ids=[words.split()[0] for words, _ in EXPLAINED])
def test_predictions(command: str, shown: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The rows are those of one layer of the model, by the config to paste, or by none where nothing gains.

    `EXPECTTEST_ACCEPT=1` writes all of it, from the whole model.
    """
    words = command.split()
    pytest.importorskip("rich")
    for name in ("timm", "torchvision") if words[0].startswith("vit") else ("transformers",):
        pytest.importorskip(name)
    if os.environ.get("EXPECTTEST_ACCEPT"):
        page = ROOT / "docs/explain.md"
        before = f"sparse-pass explain {command}\n```\n\n```text\n"
        page.write_text(page.read_text().replace(f"{before}{shown}```", f"{before}{explained(words, capsys)}```"))
        return
    depth = "depth" if words[0].startswith("vit") else "num_hidden_layers"
    flags = [word for word in words if word != "--set" and "=" not in word]
    sizes = [word for word in words if "=" in word and not word.startswith(depth)]
    settings = [part for size in [*sizes, f"{depth}=1"] for part in ("--set", size)]
    if "import sparse_pass" in shown:
        namespace: dict[str, Any] = {}
        exec(shown[shown.index("import sparse_pass") :], namespace)
        (tmp_path / "config.json").write_text(json.dumps(sp.config_to_dict(namespace["config"])))
        flags += ["--config", str(tmp_path / "config.json")]
    assert rows_of(explained([*flags, *settings], capsys)) == rows_of(shown) != set()


def test_four_models() -> None:
    assert len(EXPLAINED) == 4
    assert "no linear of this model gains" in EXPLAINED[3][1]
