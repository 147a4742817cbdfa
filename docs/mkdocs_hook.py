"""A hook of mkdocs: what pages link to outside of docs/ becomes a part of the site, in the folders that it has here."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
_OUTSIDE = re.compile(r"(\]\()\.\./(?!README\.md)([^)#\s]+)")
"""A link from a page of docs/ to a file beside that folder."""
_BELOW = re.compile(r"\]\((?!https?:|#|\.\./)([^)#\s]+)")
_ROLE = re.compile(r":(?:class|func|meth):(?=<)")
"""What docstrings put before a name, for tools that read reStructuredText."""
_INSIDE = re.compile(r"(\]\()docs/")
"""A link to a page of docs/ from a file beside that folder."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the linked files, and those that they link to."""
    waiting = [link for page in (ROOT / "docs").glob("*.md") for _, link in _OUTSIDE.findall(page.read_text())]
    while waiting:
        name = waiting.pop()
        path = ROOT / name
        if files.get_file_from_path(name) is not None or name.startswith("docs/"):
            continue
        if not path.is_file():
            raise FileNotFoundError(f"a page links to {name}: expected a file of the repository")
        files.append(File.generated(config, name, abs_src_path=str(path)))
        if path.suffix == ".md":
            folder = path.parent.relative_to(ROOT)
            waiting += [(folder / link).as_posix() for link in _BELOW.findall(path.read_text())]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links lead to where the files are in the site; the README is its first page."""
    markdown = _OUTSIDE.sub(r"\1\2", markdown).replace("](../README.md", "](index.md")
    return _INSIDE.sub(r"\1", markdown) if "/" not in page.file.src_uri else markdown


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return _ROLE.sub("", html)
