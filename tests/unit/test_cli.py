"""What can be asked from a shell, without a GPU."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import fresh_compile

import sparse_pass as sp
from sparse_pass.cli import bench
from sparse_pass.cli.main import main
from sparse_pass.cli.output import config_text
from sparse_pass.kernels import backends, probe
from sparse_pass.predict.costs import Predicted
from sparse_pass.predict.forecast import Forecast
from sparse_pass.predict.gpus import gpu

FACTORY = """
import torch
from torch import nn

def mlp(rows=8192):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2048, 8192), nn.ReLU(), nn.Linear(8192, 2048))])
        def forward(self, x):
            return self.blocks[0](x)
    return Model(), torch.randn(rows, 2048)

def no_inputs():
    return nn.Linear(64, 64)
"""


@pytest.fixture(autouse=True)
def _factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "factories_for_cli.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SPARSE_PASS_CACHE_DIR", str(tmp_path / "cache"))
    with fresh_compile():
        yield
    sys.modules.pop("factories_for_cli", None)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, what was printed, and what was said of errors."""
    status = main(list(words))
    out, err = capsys.readouterr()
    return status, out, err


def test_doctor_where_nothing_can_be_accelerated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, _ = run(capsys, "doctor")
    assert status == 1
    assert "nothing can be accelerated here: " in out
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    status, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert status == 1
    assert (found["accelerated"], found["devices"], found["torch"]) == (False, [], torch.__version__)
    assert found["cache"] == str(tmp_path / "cache")
    assert found["remedy"]
    status, _, err = run(capsys, "doctor")
    assert (status, err) == (2, 'sparse-pass doctor: tables need rich: pip install "sparse_pass[cli]"\n')


@pytest.mark.parametrize(("capability", "accelerated"), [((9, 0), True), ((7, 5), False)])
def test_doctor_of_a_gpu(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    accelerated: bool,
) -> None:
    """What the probe says is told: the layout, whether it was verified, and why not."""
    for name, value in {"is_available": True, "device_count": 1, "get_device_name": "Fake GPU"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    why_not = "" if accelerated else "SM 7.5 has no 2:4 tensor cores"
    monkeypatch.setattr(probe, "availability", lambda *_: why_not)
    monkeypatch.setattr(probe, "backend", lambda *_: backends.SM90 if accelerated else why_not)
    status, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    (device,) = found["devices"]
    assert status == int(not accelerated)
    assert [one["dtype"] for one in device["kernels"]] == ["float16", "bfloat16", "float8_e4m3fn"]
    assert {one["layout"] for one in device["kernels"]} == {"sm90" if accelerated else ""}
    assert {one["verified"] for one in device["kernels"]} == {accelerated}
    assert ("compute capability 8.0" in found["remedy"]) is not accelerated
    _, out, _ = run(capsys, "doctor")
    assert ("2:4 kernels can run here" in out) is accelerated
    assert "SM 7.5 has no" in out or accelerated


def test_explain_a_factory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What is suggested can be pasted, and given back as a file."""
    status, out, _ = run(capsys, "explain", "factories_for_cli:mlp", "--gpu", "h200")
    assert status == 0
    assert "predicted for NVIDIA H200" in out
    assert "names 100% of the FLOPs" in out
    namespace: dict[str, Any] = {}
    exec(out[out.index("import sparse_pass as sp") :], namespace)
    assert namespace["config"] == {"blocks.*.*": sp.WeightSparsity()}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"blocks.*.0": {"GradientSparsity": {"grad_input": "mvue"}}}))
    status, out, _ = run(capsys, "explain", "factories_for_cli:mlp", "--config", str(path), "--json")
    report = Forecast.from_dict(json.loads(out))
    assert status == 0
    assert [(site.fqn, site.grad_weight) for site in report.sites] == [("blocks.0.0", "cusparselt")]
    assert report.coverage == pytest.approx(0.4), "no grad_input of the first: two GEMMs of five"
    assert report.gpu == gpu("h100").name


def test_explain_a_model_with_nothing_worth_it(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", "factories_for_cli:mlp", "--set", "rows=128")
    assert status == 0
    assert "no linear of this model gains at this size" in out


def test_explain_a_model_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    """By its type, with sizes that are set, on the meta device; alike layers share a row; the head is left dense."""
    pytest.importorskip("transformers")
    sizes = "hidden_size=2048 intermediate_size=8192 num_hidden_layers=2 num_attention_heads=16 vocab_size=1024"
    settings = [word for size in f"{sizes} num_key_value_heads=16".split() for word in ("--set", size)]
    scheme = '{"WeightSparsity": {"grad_weight": "mvue"}}'
    status, out, _ = run(capsys, "explain", "llama", "--tokens", "1024", *settings, "--scheme", scheme)
    assert status == 0
    assert "model.layers.*.mlp.down_proj (2)" in out
    assert "'model.layers.*.self_attn.q_proj': sp.WeightSparsity(grad_weight='mvue')," in out
    assert "lm_head" in out
    assert "'lm_head'" not in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["no_such_model"], "'no_such_model' is no package.module:factory, no timm name"),
        (["factories_for_cli:none"], "cannot be imported: module 'factories_for_cli' has no attribute 'none'"),
        (["factories_for_cli:no_inputs"], "returned Linear: expected (model, inputs)"),
        (["factories_for_cli:mlp", "--set", "rows"], "expected FIELD=VALUE"),
        (["factories_for_cli:mlp", "--scheme", "Weights"], "--scheme: unknown key 'Weights'"),
        (["factories_for_cli:mlp", "--scheme", "{"], "is no JSON"),
        (["factories_for_cli:mlp", "--config", "absent.json"], "cannot be read"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    status, _, err = run(capsys, "explain", *words)
    assert status == 2
    assert told in err
    assert len(err.splitlines()) == 1


def test_bench_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = run(capsys, "bench", "--shape", "1024,64,64")
    assert (status, "bench needs a CUDA GPU" in err) == (2, True)
    for shape, told in [("1024,64", "expected three sizes"), ("8,64,100", "multiples of 64")]:
        with pytest.raises(SystemExit):
            main(["bench", "--shape", shape])
        assert told in capsys.readouterr().err


def test_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With predictions in the place of measurements: the table, the CSV, the picture, and the shapes of a model."""
    costs = Predicted(gpu("h200"))
    monkeypatch.setattr(bench, "why_no_gpu", lambda *_: "")
    monkeypatch.setattr(bench, "Measured", lambda: costs)
    files = ["--csv", str(tmp_path / "out.csv"), "--png", str(tmp_path / "out.png")]
    status, out, _ = run(capsys, "bench", "--model", "factories_for_cli:mlp", *files)
    assert status == 0
    assert "GPU microseconds, bfloat16" in out
    with (tmp_path / "out.csv").open() as file:
        rows = [{name: float(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
    assert [(row["M"], row["K"], row["N"]) for row in rows] == [(8192, 2048, 8192), (8192, 8192, 2048)]
    for row in rows:
        before = row["output dense"] + row["grad_input dense"] + row["grad_weight dense"]
        after = row["output 2:4"] + row["grad_input 2:4"] + row["grad_weight dense"] + row["S(W)"]
        assert row["layer gain"] == pytest.approx(before / after)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_config_text() -> None:
    config = {"a": (sp.ActivationSparsity(), sp.WeightSparsity(scale="norm")), "b": None}
    namespace: dict[str, Any] = {}
    exec(config_text(config), namespace)
    assert namespace["config"] == config


def test_as_a_module(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sparse_pass", "doctor", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("sparse_pass", run_name="__main__")
    assert "Exit status 1 where nothing can be" in capsys.readouterr().out
