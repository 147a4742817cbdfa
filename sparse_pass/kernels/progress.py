"""What a user sees of measurements, which take a moment that nobody asked for: one line that is rewritten.

On a terminal or in a notebook it is a line of tqdm's, if tqdm is installed, so that it keeps clear of the bars of a
training loop; else one of our own. It goes when the measurement is over. Where nobody watches, as in the log of a job,
one message for the whole process says that kernels are measured.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

_WIDTH = 100
_NUMBERS = itertools.count(1)
"""Of the measurements of this process."""


@contextmanager
def shown(about: str, folder: str) -> Iterator[None]:
    """Show that something is measured, for as long as it is.

    Args:
        about: what is measured.
        folder: where results are remembered.
    """
    number = next(_NUMBERS)
    text = f"sparse_pass: timing kernels, shape {number}: {about}"
    if _in_notebook() or sys.stderr.isatty():
        with _line_of_tqdm(text) if importlib.util.find_spec("tqdm") else _own_line(text):
            yield
        return
    _tell_once(folder)
    log.info("%s", text)
    yield


def _in_notebook() -> bool:
    return "ipykernel" in sys.modules


@contextmanager
def _line_of_tqdm(text: str) -> Iterator[None]:
    from tqdm.auto import tqdm

    with tqdm(bar_format="{desc} [{elapsed}]", desc=text[:_WIDTH], leave=False):
        yield


@contextmanager
def _own_line(text: str) -> Iterator[None]:
    sys.stderr.write(f"\r{text[:_WIDTH]}")
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r" + " " * min(len(text), _WIDTH) + "\r")
        sys.stderr.flush()


@functools.cache
def _tell_once(folder: str) -> None:
    log.warning(
        "sparse_pass measures its kernels for each new shape, a second or less each, and remembers the times in %s"
        " (tune='off' measures nothing)",
        folder,
    )
