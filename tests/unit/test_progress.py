"""What is shown while kernels are measured."""

from __future__ import annotations

import importlib.util
import io
import logging
import sys

import pytest

from sparse_pass.kernels import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def measure_twice() -> None:
    for shape in ("[64, 128]", "[128, 64]"):
        with progress.shown(f"linear: {shape}", "/cache"):
            pass


def last_line(text: str) -> str:
    """What a terminal shows of text that goes back to the start of its line."""
    line = ""
    for part in text.split("\r"):
        line = part + line[len(part) :]
    return line.strip()


@pytest.mark.parametrize("with_tqdm", [False, True])
def test_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch, with_tqdm: bool) -> None:
    """It is rewritten, and gone at the end, also where a measurement fails."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    if with_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    measure_twice()
    with pytest.raises(RuntimeError), progress.shown("linear: [1, 1]", "/cache"):
        raise RuntimeError
    shown = terminal.getvalue()
    assert shown.count("\n") == 0
    for about in ("linear: [64, 128]", "linear: [128, 64]", "linear: [1, 1]"):
        assert about in shown
    assert last_line(shown) == ""


def test_one_message_in_a_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress._tell_once.cache_clear()
    measure_twice()
    (record,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert "remembers the times in /cache (tune='off' measures nothing)" in record.getMessage()
