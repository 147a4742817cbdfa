"""What is kept for the next call, such as plans: a limited number, since with dynamic shapes every M makes one."""

from __future__ import annotations

from typing import TypeVar

LIMIT = 1024
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


def remember(kept: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Add a value, in the place of the oldest if there are too many."""
    while len(kept) >= LIMIT:
        kept.pop(next(iter(kept)), None)
    kept[key] = value
