"""Every example runs to its end on a small setting and shows what it promises to show."""

from __future__ import annotations

import json
import math
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
# Compiling C++ for the two models would take half a minute each; the other examples and the README go through Inductor.
OP_BY_OP = ("--inner", "aot_eager")
TINY_GPT = "--layers 1 --dim 64 --heads 2 --context 32 --batch 4 --steps 6 --evals 2 --val-batches 1"

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example as a script; what it printed."""

    monkeypatch.syspath_prepend(EXAMPLES)  # as for a script

    def run_script(name: str, *args: str) -> str:
        monkeypatch.setattr("sys.argv", [name, *args])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def test_train_gpt(run: Run, tmp_path: Path) -> None:
    output = run("train_gpt.py", *TINY_GPT.split(), *OP_BY_OP, "--out", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())

    for name in ("dense", "w24"):
        losses = results[name]["train_loss"]
        assert len(losses) == 6
        assert all(math.isfinite(loss) for loss in losses)
        assert losses[-1] < losses[0] < 6
        assert results[name]["val_steps"] == [3, 6]
    trained = results["w24"]["val_loss"][-1]
    assert trained != results["dense"]["val_loss"][-1], "the sparse run trained dense"
    # Pruned weights compute what the pass computed; the same weights without masks do not.
    assert results["after"]["w24"]["its weights, sp.prune_"] == pytest.approx(trained, rel=1e-5)
    assert results["after"]["w24"]["its weights, dense again"] != pytest.approx(trained, rel=1e-5)

    for layer in ("blocks.*.mlp.fc1", "blocks.*.mlp.fc2"):
        assert re.search(rf"1 x {re.escape(layer)} +train +masked_dense +masked_dense +dense", output)
        assert re.search(rf"1 x {re.escape(layer)} +eval +masked_dense +- +-", output)
    assert "not faster" in output
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_train_gpt_with_several_schemes(run: Run, tmp_path: Path) -> None:
    schemes = ["w24-mvue", "act24", "w24-mvue+act24"]
    flags = ("--activation", "squared_relu", "--scheme", *schemes, "--out", str(tmp_path))
    output = run("train_gpt.py", *TINY_GPT.split(), *OP_BY_OP, *flags)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len({results[name]["val_loss"][-1] for name in ("dense", *schemes)}) == 4
    for name in schemes:
        assert f"What {name} rewrote" in output
        assert re.search(rf"{re.escape(name)} run +\d", output)
    assert list(results["after"]["act24"]) == ["its weights, dense again"]
    # The pair's forward is one of a 2:4 input and the dense weight, which no pruned model computes.
    pair = results["after"]["w24-mvue+act24"]
    assert list(pair) == ["its weights, dense again", "its weights, sp.prune_ where it can"]
    left = "w24-mvue+act24: sp.prune_ leaves 1 of the weights dense: the output is computed with the dense weight"
    assert left in " ".join(output.split())


def test_train_gpt_lists_its_schemes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("train_gpt.py", "--scheme", "w42")
    assert "w24-masked" in capsys.readouterr().err


def test_train_vit(run: Run) -> None:
    output = run("train_vit.py", "--epochs", "4", "--depth", "1", *OP_BY_OP)
    head = next(line for line in output.splitlines() if line.startswith("head "))
    assert "skipped" in head
    assert "[10, 64]" in head
    assert re.search(r"^blocks\.0\.attn\.out_proj .* masked_dense", output, re.MULTILINE)
    assert "in_proj_weight" not in output, "named None, so no site"
    accuracies = re.findall(r"(dense|sparse) +│ +([\d.]+)%", output)
    assert [name for name, _ in accuracies] == ["dense", "sparse"]
    assert all(float(accuracy) > 50 for _, accuracy in accuracies), "chance is 10%"


@pytest.mark.parametrize(("args", "op"), [((), "sparse_pass.mask24"), (("--kernels",), "sparse_pass.linear")])
def test_inspect_graph(run: Run, args: tuple[str, ...], op: str) -> None:
    output = run("inspect_graph.py", *args)
    assert re.search(r"^-addmm = aten\.addmm\(.*# fc1$", output, re.MULTILINE)
    assert re.search(rf"^\+\w+ = {re.escape(op)}\(.*# fc1", output, re.MULTILINE)
    assert not re.search(r"^[+-].*# fc2", output, re.MULTILINE), "fc2 is not named"
    assert re.search(r"^fc1 .* 128, 256, 64 ", output, re.MULTILINE), "the report of sp.explain"


@pytest.mark.loops
def test_from_torchao(run: Run) -> None:
    output = run("from_torchao.py", "--steps", "10")
    assert re.search(r"^ValueError: 'seq\.0' .*'0'", output, re.MULTILINE)
    assert re.search(r"^0 .* 1024, 1024, 256 .*masked_dense", output, re.MULTILINE)
    first, last = re.findall(r"^step.*loss ([\d.]+)$", output, re.MULTILINE)[:: 4 + 1]
    assert float(last) < float(first)
    assert "at most 2 of any 4 weights" in output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        *(
            (f"train_gpt.py --{name} 0", "expected a whole number of at least 1")
            for name in ("steps", "evals", "layers")
        ),
        ("train_gpt.py --val-batches none", "--val-batches: expected a whole number of at least 1, got 'none'"),
        ("train_gpt.py --heads 3 --dim 32", "--dim 32 is not a multiple of --heads 3"),
        ("train_gpt.py --sparse blocks.*.mlp.fc_1", "names no linear weight of GPT; closest names: 'blocks."),
        ("train_gpt.py --scheme w24 act24 --sparse blocks.*.attn.qkv head", "--scheme act24 gives 2:4 inputs to"),
        *((f"train_vit.py --{name} 0", "expected a whole number of at least 1") for name in ("epochs", "depth")),
        ("train_vit.py --batch 5000", "--batch 5000 is more than the 1477 training images"),
        *((f"{name} --device cuda", "finds no CUDA device") for name in ("from_torchao.py", "inspect_graph.py")),
        ("inspect_graph.py --pattern nosuch", "--pattern: 'nosuch' names no linear weight of MLP"),
    ],
)
def test_what_cannot_work_ends_in_one_sentence(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, message: str
) -> None:
    """Before anything is trained."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run(*command.split())
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err.splitlines()[-1]
