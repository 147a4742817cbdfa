"""What goes to users: the wheel, its contents and its metadata."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import sparse_pass as sp

ROOT = Path(sp.__file__).parent.parent


def test_wheel(tmp_path: Path) -> None:
    """Every file of the package is in it, and nothing else is; the version is that of the package."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip("the build needs setuptools 77 or newer")
    # A copy of the sources, as a build leaves folders behind; git knows which files are ours.
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no clone of the repository")
    files = [name for name in listed.stdout.split("\n") if re.match(r"sparse_pass/|pyproject|README|LICENSE", name)]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    program = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", program, "dist"], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name for name in names if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(info).decode())
        points = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert {name for name in names if ".dist-info/" not in name} == {one for one in files if one.startswith("sparse_")}
    assert "sparse_pass/py.typed" in names
    assert (metadata["Name"], metadata["Version"]) == ("sparse-pass", sp.__version__)
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [one for one in metadata.get_all("Requires-Dist", []) if "extra ==" not in one]
    assert needed == ["torch>=2.11"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    for target in re.findall(r"= (\S+)", points):
        module, _, attribute = target.partition(":")
        assert hasattr(importlib.import_module(module), attribute)


def test_version_has_one_place() -> None:
    """The changelog begins with it."""
    assert re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == sp.__version__  # type: ignore[index]
    assert sp.__version__ not in (ROOT / "pyproject.toml").read_text()
