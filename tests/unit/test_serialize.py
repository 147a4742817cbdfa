"""Configs and reports as plain data, and reports as Markdown and HTML."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import sparse_pass as sp
from sparse_pass.predict.forecast import Forecast, Layer

CONFIGS: list[dict[str, Any]] = [
    {"fc1": sp.WeightSparsity()},
    {"blocks.*.fc1": sp.WeightSparsity(mask="greedy", grad_weight="mvue", decay=1e-4, scale="norm"), "head": None},
    {"re:.*up": sp.WeightSparsity(scale=1.25, precision="float8", backend="masked_dense")},
    {"a": (sp.ActivationSparsity(mask="rowwise"), sp.WeightSparsity()), "b": sp.ActivationSparsity()},
    {"a": (sp.WeightSparsity(), sp.ActivationSparsity(grad_input="masked"))},
    {"a": (sp.GradientSparsity(grad_input="mvue", grad_weight="dense"), sp.ActivationSparsity())},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_config_round_trip(config: dict[str, Any], tmp_path: Path) -> None:
    """Equal, in the order of the entries and of the parts of a tuple: by dict, JSON text, JSON file and YAML file."""
    data = sp.config_to_dict(config)
    text = json.dumps(data)
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    sources = [data, config, text, str(tmp_path / "config.json"), tmp_path / "config.yaml"]
    for made in [sp.config_from_dict(json.loads(text)), *map(sp.load_config, sources)]:
        assert list(made.items()) == list(config.items())


def test_short_forms() -> None:
    made = sp.config_from_dict({"a": "WeightSparsity", "b": {"WeightSparsity": {"mask": "greedy"}}, "c": None})
    assert made == {"a": sp.WeightSparsity(), "b": sp.WeightSparsity(mask="greedy"), "c": None}
    assert sp.config_from_dict({"a": {"ActivationSparsity": None}}) == {"a": sp.ActivationSparsity()}, "as in YAML"


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            {"fc1": {"WeightSparsity": {"masks": "greedy"}}},
            r"config\['fc1'\]: WeightSparsity: unknown key 'masks'; known: mask,",
        ),
        (
            {"fc1": {"Weights": {}}},
            r"config\['fc1'\]: unknown key 'Weights'; known: WeightSparsity, ActivationSparsity",
        ),
        ({"fc1": {"WeightSparsity": {"mask": "best"}}}, r"mask='best'"),
        ({"fc1": {"WeightSparsity": "greedy"}}, "expected a mapping of its fields"),
        ({"fc1": 3}, r"config\['fc1'\] = 3: expected the name of a scheme"),
        ({"fc1": {"WeightSparsity": {}, "GradientSparsity": {}}}, "cannot be together"),
        ({}, "config is empty"),
        ([], "expected a mapping of names"),
    ],
)
def test_what_is_refused(data: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        sp.config_from_dict(data)


def test_files_that_are_refused(tmp_path: Path) -> None:
    for name, text, told in [
        ("config.txt", "", "expected the path of a .json"),
        ("bad.json", "{", "is no JSON"),
        ("bad.yaml", "a: [", "is no YAML"),
        ("list.json", "[1]", "expected a mapping"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=told):
            sp.load_config(tmp_path / name)
    with pytest.raises(ValueError, match=r"cannot be read: .*No such file"):
        sp.load_config(tmp_path / "absent.json")


def test_yaml_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    (tmp_path / "config.yaml").write_text("a: WeightSparsity")
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sparse_pass\[yaml\]"'):
        sp.load_config(tmp_path / "config.yaml")


def test_from_torchao() -> None:
    """torchao's own classes, and a subclass; they are known by their names."""
    training = pytest.importorskip("torchao.sparsity.training")
    other = type("Mine", (training.SemiSparseLinear,), {})
    config = {"fc1": training.SemiSparseLinear, "fc2": training.SemiSparseActivationLinear, "fc3": other}
    expected = {"fc1": sp.WeightSparsity(), "fc2": sp.ActivationSparsity(), "fc3": sp.WeightSparsity()}
    assert sp.config_from_torchao(config) == expected
    with pytest.raises(ValueError, match=r"config\['fc4'\] = .*Linear.*: expected torchao's SemiSparseLinear or"):
        sp.config_from_torchao({"fc4": torch.nn.Linear})


SITE = sp.Site(
    fqn="blocks.0.<fc1>", pattern="blocks.*", scheme=(sp.ActivationSparsity(), sp.WeightSparsity(decay=0.5)),
    shape=("s0*128", 64, 128), dtype=torch.bfloat16, status="masked_dense", reason="a | b", output="masked_dense",
    grad_weight="dense", training=True, serves=("blocks.1.fc1",),
)  # fmt: skip
REPORT = sp.Report(
    sites=(SITE, replace(SITE, fqn="fc2", scheme=sp.WeightSparsity(), status="sparse", training=False, reason="")),
    unmatched=("fc9",), notes=("<note>",), graphs=2, inference_graphs=1, uncaptured=("fc3",),
)  # fmt: skip
FORECAST = Forecast(
    sites=(SITE,), graphs=1, gpu="NVIDIA H100", attention_us=10.0, other_us=5.5,
    layers=(
        Layer(
            fqn="a", named=True, shape=(8, 64, 64), flops=30, dense_us=(2.0, 2.0, 2.0), planned_us=(1.0, 1.0, 2.0),
            preparation_us=0.5,
        ),
        Layer(fqn="b", named=False, shape=("s0", 64, 64), flops=10),
    ),
)  # fmt: skip


@pytest.mark.parametrize("report", [sp.Report(), REPORT, FORECAST])
def test_report_round_trip(report: sp.Report) -> None:
    data = json.loads(json.dumps(report.to_dict()))
    again = type(report).from_dict(data)
    assert again == report
    assert str(again) == str(report)
    with pytest.raises(ValueError, match="unknown keys 'site', 'x'; known: sites, unmatched"):
        type(report).from_dict({"site": [], "x": 1})


def test_rows_that_are_refused() -> None:
    for change, told in [({"status ": ""}, "unknown key 'status '"), ({"dtype": "manual_seed"}, "is no dtype")]:
        with pytest.raises(ValueError, match=told):
            sp.Site.from_dict({**SITE.to_dict(), **change})
    with pytest.raises(ValueError, match="unknown key 'flop'"):
        Forecast.from_dict({"layers": [{"flop": 1}]})


def test_figures_of_a_forecast() -> None:
    """Layer a: 6 us dense, 4.5 as planned; 15.5 of the step are no linears. It has 30 of 40 FLOPs."""
    layer = FORECAST.layers[0]
    assert (layer.before_us, layer.after_us, layer.gains()["output"]) == (6.0, 4.5, 2.0)
    assert (FORECAST.dense_us, FORECAST.step_us) == (21.5, 20.0)
    assert FORECAST.gain == pytest.approx(21.5 / 20)
    assert FORECAST.coverage == 0.75
    assert "1.07x" in str(FORECAST)
    assert "names 75% of the FLOPs" in FORECAST.to_markdown()


def test_markdown() -> None:
    lines = REPORT.to_markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[0].startswith("| fqn | graph | scheme |")
    assert {line.replace("\\|", "").count("|") for line in table} == {table[0].count("|")}, "cells are escaped"
    assert "a \\| b" in table[2]
    assert lines[-1] == "- note: <note>"
    assert sp.Report(notes=("n",)).to_markdown().splitlines()[0] == "sparse_pass: 0 named linears in 0 graph(s)"


class _Table(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th", "li"):
            self.cells.append(data)


def test_html() -> None:
    """Well formed, with the cells of the printed table, escaped."""
    page = _Table()
    page.feed(REPORT._repr_html_())
    assert page.open == []
    assert page.cells[:3] == ["fqn", "graph", "scheme"]
    for text in ("blocks.0.<fc1>", "a | b", "note: <note>", "unmatched: 'fc9' named no linear"):
        assert text in page.cells
    assert "<table" not in sp.Report()._repr_html_()
