"""What was measured, remembered on disk: one JSON file a GPU, cuSPARSELt and torch version.

The file is only ever read as JSON and replaced whole, so that a crash, a full disk or a second process can
cost a measurement but never leave half a file. A file that cannot be read counts as empty; one that cannot
be written leaves the timings in memory. Both are logged once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock

from .cusparselt_library import version
from .problem import Problem

log = logging.getLogger(__name__)

DIRECTORY_VARIABLE = "SPARSE_PASS_CACHE_DIR"


class Timing(NamedTuple):
    """GPU time of one matmul shape, microseconds: the best 2:4 algorithm, and dense of the same dtype."""

    algorithm: int
    sparse_us: float
    dense_us: float


def name(dtype: torch.dtype) -> str:
    """Name of a dtype in the file."""
    return str(dtype).removeprefix("torch.")


def key(problem: Problem) -> str:
    """Name of a problem in the file."""
    form = "" if problem.form == "linear" else f"{problem.form} "
    bias = " bias" if problem.bias else ""
    return f"{form}{name(problem.dtype)} M={problem.m} N={problem.n} K={problem.k}{bias}"


def directory() -> Path:
    """Where the files are: ``$SPARSE_PASS_CACHE_DIR``, or ``sparse_pass`` in the user's cache folder."""
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse_pass"


@functools.cache
def path(device: int) -> Path:
    """The file of a device. Devices of one name share it."""
    library = ".".join(map(str, version()))
    name = f"{torch.cuda.get_device_name(device)}-cusparselt{library}-torch{torch.__version__}.json"
    return directory() / re.sub(r"[^\w.+-]+", "_", name)


_KNOWN: dict[Path, dict[str, Timing]] = {}


def known(file: Path) -> dict[str, Timing]:
    """The timings of a file; read once, then kept up to date by `remember`."""
    if file not in _KNOWN:
        _KNOWN[file] = _read(file)
    return _KNOWN[file]


def remember(file: Path, name: str, timing: Timing) -> None:
    """Add a timing, in memory and on disk. What other processes added meanwhile is kept."""
    merged = {**_read(file), **known(file), name: timing}
    _KNOWN[file] = merged
    text = json.dumps({name: timing._asdict() for name, timing in sorted(merged.items())}, indent=1)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _replace(file, text)
    except OSError as error:
        _log_once(f"cannot write {file} ({error}): timings last as long as this process")


def forget() -> int:
    """Delete all files of the directory, and what is in memory; returns how many files there were."""
    _KNOWN.clear()
    files = list(directory().glob("*.json"))
    for file in files:
        file.unlink()
    return len(files)


@contextlib.contextmanager
def one_process_at_a_time(file: Path) -> Iterator[None]:
    """Held while measuring, so that the ranks of a job on one machine wait for the first and then read its file."""
    lock = FileLock(file.with_suffix(".lock"))
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):  # a folder that cannot be written, or a file system without locks
        yield  # nobody to share with; measuring twice is all that can happen
        return
    try:
        _KNOWN.pop(file, None)
        yield
    finally:
        lock.release()


def _read(file: Path) -> dict[str, Timing]:
    try:
        entries = json.loads(file.read_text())
        return {
            str(name): Timing(int(entry["algorithm"]), float(entry["sparse_us"]), float(entry["dense_us"]))
            for name, entry in entries.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        _log_once(f"cannot read {file} ({type(error).__name__}: {error}): its shapes are measured again")
        return {}


def _replace(file: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        os.replace(temporary, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@functools.cache
def _log_once(message: str) -> None:
    log.warning("%s", message)
