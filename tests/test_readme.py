"""The README's code runs and prints what it shows, its commands are those of CI, its links lead somewhere."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_pass as sp

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_python_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    """All blocks in order in one namespace, as a reader would type them."""
    namespace: dict[str, Any] = {}
    outputs = []
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), namespace)
        outputs.append(capsys.readouterr().out)
    if not torch.cuda.is_available():
        (shown,) = blocks("text")
        assert outputs[0] == shown, "the report in the README is not what its code prints"
    # After prune_ the eager model computes what the sparse one computed.
    pruned = namespace["model"](namespace["x"])
    torch.testing.assert_close(pruned, namespace["y_sparse"])


def test_ci_runs_the_test_command() -> None:
    commands = [line for code in blocks("bash") for line in code.splitlines() if "venv .venv" in line]
    install_and_run, install_and_test = commands
    assert install_and_run.endswith(".venv/bin/python examples/train_gpt.py")
    assert install_and_test in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]
)
def test_relative_links(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize(("page", "least"), [("README.md", 16), ("docs/performance.md", 24)])
def test_figures_are_those_of_the_files(page: str, least: int) -> None:
    """Of a table of speed: each row of three figures is a row of one of the files that are linked beside it."""
    path = ROOT / page
    (speed,) = re.findall(r"<!-- speed table: begin -->(.*)<!-- speed table: end -->", path.read_text(), re.DOTALL)
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
