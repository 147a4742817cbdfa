"""What the package says to users, read from its source: every sentence that is no docstring."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

GAP = "…"
"""Stands in a sentence for what is filled in."""

_HELP = {"help", "description", "caption", "title"}
"""Arguments of commands and tables, which are no messages."""


def sentences(package: Path) -> dict[str, str]:
    """The texts of at least three words, and the file that each is in, relative to the package."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        for text in _texts(ast.parse(file.read_text())):
            if len(re.findall(r"[A-Za-z][\w'-]+", text)) >= 3 and " " in text.strip():
                found[text] = str(file.relative_to(package))
    return found


def _texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.value.replace("%s", GAP).replace("{}", GAP)
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
        for part in node.values:
            if isinstance(part, ast.FormattedValue):
                yield from _texts(part.value)
    elif not (isinstance(node, ast.keyword) and node.arg in _HELP):
        for child in ast.iter_child_nodes(node):
            if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):  # a docstring
                yield from _texts(child)
