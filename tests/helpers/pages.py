"""The pages that users read: where they are, their blocks of code, and running these."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import fresh_compile

ROOT = Path(__file__).parent.parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))]


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def ran(
    page: str, capsys: pytest.CaptureFixture[str], given: dict[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """All blocks in order in one namespace, as a reader would type them. Returns that, and what each printed.

    The first output that the page shows is the first that is printed, but for programs on a GPU.
    """
    namespace: dict[str, Any] = given or {}
    outputs = []
    with fresh_compile():
        for code in blocks("python", page):
            exec(compile(code, page, "exec"), namespace)
            outputs.append(capsys.readouterr().out)
    shown = [text for text in blocks("text", page) if text.startswith("sparse_pass: ")]
    if shown and not torch.cuda.is_available():
        printed = next(output for output in outputs if output)
        assert printed == shown[0], f"the report in {page} is not what its code prints"
    return namespace, outputs
