"""Errors for arguments that Python itself would refuse in words that do not help."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def by_position(count: int, hint: Callable[[tuple[object, ...]], str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Refuse more than ``count`` arguments by position with a TypeError of what ``hint`` says of them."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if len(args) > count:
                raise TypeError(hint(args))
            return function(*args, **kwargs)

        return checked

    return decorate
