"""The README's code runs and prints what it shows; its commands are those of CI; links and figures of all pages."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from pages import PAGES, ROOT, blocks, ran

import sparse_pass as sp


@pytest.mark.loops
def test_python_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    namespace, _ = ran("README.md", capsys)
    # After prune_ the eager model computes what the sparse one computed.
    pruned = namespace["model"](namespace["x"])
    torch.testing.assert_close(pruned, namespace["y_sparse"])


def test_figures_of_the_recipes() -> None:
    """Each row of the page's table is one of quality.md: loss and steps factor, at both sizes."""
    measured: dict[tuple[str, str], tuple[str, str]] = {}
    row = re.compile(r"^\| `(\w+)` \|(?:[^|]+\|){2} (\S+) \|[^|]+\| (\S+) \|", re.MULTILINE)
    for section in (ROOT / "benchmarks/results/quality/quality.md").read_text().split("\n## ")[1:]:
        for name, loss, factor in row.findall(section):
            measured[section.partition(" ")[0], name] = (loss, factor)
    page = (ROOT / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| `(\w+)`: [^|]+ \| (\S*) \| (\S*) \| (\S*) ?\| (\S*) ?\|$", page, re.MULTILINE)
    assert len(rows) == 10
    for name, *cells in rows:
        for size, given in (("25.7M", cells[:2]), ("4.9M", cells[2:])):
            assert given == ["", ""] or tuple(given) == measured[size, name], name


def test_ci_runs_the_test_command() -> None:
    commands = [line for code in blocks("bash") for line in code.splitlines() if "venv .venv" in line]
    install_and_run, install_and_test = commands
    assert install_and_run.endswith(".venv/bin/python examples/train_gpt.py")
    assert install_and_test in (ROOT / ".ci" / "run").read_text()


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub and mkdocs make them of plain words."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links(page: str) -> None:
    path = ROOT / page
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text()):
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


SPEED = re.compile(r"<!-- speed table: begin -->(.*?)<!-- speed table: end -->", re.DOTALL)


def test_figures_are_those_of_the_files() -> None:
    """Of each table of speed: each row of three figures is a row of one of the files that are linked beside it."""
    path = ROOT / "docs/performance.md"
    h200, h100 = SPEED.findall(path.read_text())
    for speed, least in ((h200, 16), (h100, 24)):
        rows = re.findall(r"^\| (.+?) \| ([\d.]+) ms \| ([\d.]+) ms \| \**([\d.]+)x", speed, re.MULTILINE)
        assert len(rows) >= least
        measured = []
        for target in re.findall(r"\]\(([./]*benchmarks/results/[\w/]+)\.md\)", speed):
            with (path.parent / f"{target}.csv").open() as file:
                head, *lines = csv.reader(file)
            of_file = [{_milliseconds(name, cell) for name, cell in zip(head, line, strict=True)} for line in lines]
            if "end_to_end" in target:  # where dense is a row of its own
                of_file = [one | two for one in of_file for two in of_file]
            measured += of_file
        for what, *figures in rows:
            found = any(all(_rounded(figure, of) for figure in figures) for of in measured)
            assert found, f"{what}: {figures} is in none of the files"


def test_speed_table_of_the_readme() -> None:
    """It is that of the files of float8: milliseconds of dense, and of the others how many times faster."""
    (shown,) = SPEED.findall((ROOT / "README.md").read_text())
    models = [row.partition(" | ")[0].removeprefix("| ") for row in shown.strip().splitlines()[2:]]
    assert len(models) <= 10
    measured = float8_figures("step ms")
    lines = []
    for model in models:
        dense, *steps = (measured[model, name] for name in ("dense", *FLOAT8_COLUMNS))
        steps = [min(steps[:2]), *steps[2:]]
        cells = [f"{dense:.1f} ms" if dense >= 10 else f"{dense:.2f} ms", *(f"{dense / one:.2f}x" for one in steps)]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    assert shown.strip().splitlines()[2:] == lines, "\n".join(["the table should be", *lines])


def test_loss_tables() -> None:
    """Each row of the README's is one of quality.md, of 1,500 steps; and there is one seed of each."""
    text = (ROOT / "benchmarks/results/quality/quality.md").read_text().split("\n## ")[1]
    row = re.compile(r"^\| `(\w+)` \| 1,500 \| 1 \| (\S+) \|[^|]+\| ([\d.]+)\*? \|", re.MULTILINE)
    measured = {name: figures for name, *figures in row.findall(text)}
    page = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)`[^|]* \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 6
    for name, *figures in rows:
        assert figures == measured[name], name


FLOAT8_ROWS = {
    "Llama 1B": "Llama 1B",
    "Llama 8B": "Llama 8B, 6 layers",
    "ViT-L/16": "ViT-L/16",
    "MLP 4096, 14336, 16,384": "MLP 16384x4096x14336",
    "MLP 1024, 4096, 44,160": "MLP 44160x1024x4096",
    "MLP 1024, 4096, 4,096": "MLP 4096x1024x4096",
}
FLOAT8_COLUMNS = ["torchao float8", "torchao float8 rowwise", "w24", "w24, mvue", "float8 w24", "float8 w24, mvue"]


def float8_figures(column: str) -> dict[tuple[str, str], float]:
    """One column of the float8 benchmark on an H100, by model and variant."""
    measured: dict[tuple[str, str], float] = {}
    for name in ("float8", "float8_mlp"):  # the second one has newer figures of MLPs
        with (ROOT / "benchmarks" / "results" / "h100" / f"{name}.csv").open() as file:
            measured |= {(row["model"], row["variant"]): float(row[column]) for row in csv.DictReader(file)}
    return measured


def test_the_float8_table_is_that_of_the_files() -> None:
    measured = float8_figures("over dense")
    page = (ROOT / "docs" / "float8.md").read_text()
    rows = re.findall(r"^\| ((?:Llama|MLP|ViT).+?) \|((?: \**[\d.]+\** \|){6})$", page, re.MULTILINE)
    assert len(rows) == len(FLOAT8_ROWS)
    for what, cells in rows:
        (model,) = (full for start, full in FLOAT8_ROWS.items() if what.startswith(start))
        figures = [float(cell) for cell in re.findall(r"[\d.]+", cells)]
        for column, figure in zip(FLOAT8_COLUMNS, figures, strict=True):
            assert abs(measured[model, column] - figure) < 0.0051, (what, column)


def _milliseconds(head: str, cell: str) -> float:
    try:
        return float(cell) / (1000 if head.split()[-1] == "us" else 1)
    except ValueError:
        return float("nan")


def _rounded(figure: str, values: set[float]) -> bool:
    digits = len(figure.partition(".")[2])
    return any(abs(value - float(figure)) <= 0.5001 * 10**-digits for value in values)


def test_api_page_lists_every_public_name() -> None:
    listed = re.findall(r"^\| `(?:sp\.)?(\w+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(sp.__all__)
    for name in sp.__all__:
        assert getattr(sp, name).__doc__, name


def test_tests_that_the_page_of_trust_names() -> None:
    page = (ROOT / "docs" / "trust.md").read_text()
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    known = {file.stem for file in files}
    known |= {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    assert set(re.findall(r"\btest_\w+", page)) <= known


def test_time_to_loss_is_that_of_the_file() -> None:
    """Each row of recipes.md's last table, in the section of the default size."""
    table = (ROOT / "benchmarks" / "results" / "quality" / "quality.md").read_text().partition("\n## ")[2]
    file = dict(re.findall(r"^\| `(\w+)` \|(.+)\|$", table.partition("\n## ")[0], re.MULTILINE))
    page = (ROOT / "docs" / "recipes.md").read_text().partition("## What to try first")[2]
    rows = re.findall(r"^\| `(\w+)` \| .+ \| ([\d.]+) \| (~?[\d.]+) \| (~?[\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for name, *figures in rows:
        _, _, _, _, factor, _, one, _, eight = (cell.strip() for cell in file[name].split("|"))
        assert figures == [factor.rstrip("*"), one, eight], name
