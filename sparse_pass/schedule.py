"""Which steps of a training are sparse: a backend that is switched between configs as the steps go by."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from .backend import SparseBackend
from .callbacks import LightningCallback, TransformersCallback, lightning_callback, transformers_callback
from .config import Scheme

Window: TypeAlias = "tuple[int, int | None]"


class Schedule:
    """Train sparse from one step to another, and dense before and after, as a scheduler of the learning rate is used::

        backend = sp.sparse_backend(config, model=model)
        schedule = sp.Schedule(backend, start=500, stop=7500)
        compiled = torch.compile(model, backend=backend)
        for batch in batches:
            ...
            optimizer.step()
            schedule.step()

    Parameters, gradients, the optimizer and the state_dict are not touched: what changes is which compiled graph runs.
    The first call after a switch compiles, once for each config that the schedule comes to; on the way back the
    graphs of before run, and Dynamo's ``recompile_limit`` counts the graphs of each config by themselves.

    Steps are counted from 0 by ``step()``, or told by ``at(step)``, as the callbacks for transformers and Lightning do:
    they take the trainer's own count, which is right after a resume too. Switch between steps, not between a forward
    and its backward. In several processes each has a schedule, and all must be at the same step.

    Args:
        backend: of :func:`sparse_backend`, before its first graph. One schedule each.
        start: the first step that is sparse.
        stop: the first step that is dense again; None for never.
        patterns: keys of the backend's config that have a (start, stop) of their own. Outside of its steps an entry
            leaves what it names dense, as if it were mapped to None.

    Raises:
        ValueError: steps that are no whole numbers from 0 on, or ``stop`` not above ``start``; a key that is not in the
            config or is mapped to None there; a backend that has a schedule or graphs already.
    """

    def __init__(
        self,
        backend: SparseBackend,
        start: int = 0,
        stop: int | None = None,
        *,
        patterns: Mapping[str, Window] | None = None,
    ) -> None:
        if not isinstance(backend, SparseBackend):
            raise ValueError(f"Schedule({backend!r}): expected what sparse_backend(config, model=model) returns")
        self._backend = backend
        self._arguments = (start, stop, dict(patterns or {}))
        self._windows = {key: (start, stop) for key, scheme in backend.config.items() if scheme is not None}
        for key, window in (patterns or {}).items():
            if key not in self._windows:
                known = ", ".join(map(repr, self._windows))
                raise ValueError(
                    f"Schedule(patterns={{{key!r}: ...}}): no entry of the config with a scheme; it has {known}"
                )
            self._windows[key] = window
        for key, window in self._windows.items():
            _check(key, window)
        self._step = 0
        self._current: dict[str, Scheme | None] = {}
        backend.follow(self)
        self._switch()

    @property
    def config(self) -> dict[str, Scheme | None]:
        """What is computed at this step: the backend's config with None for what is dense. As for :func:`prune_`."""
        return self._config_at(self._step)

    @property
    def count(self) -> int:
        """How many steps are done, which is the number of the current one."""
        return self._step

    def step(self) -> None:
        """A step of the optimizer is done."""
        self.at(self._step + 1)

    def at(self, step: int) -> None:
        """Be at this step, the first one being 0, whatever was before."""
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"Schedule.at({step!r}): expected a number of steps, 0 or more")
        self._step = step
        self._switch()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: the number of steps. What is sparse when is up to the program that resumes."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was made."""
        self.at(state["step"])

    def transformers_callback(self) -> TransformersCallback:
        """For ``transformers.Trainer(callbacks=[...])``: follows the trainer's ``global_step``, also after a resume."""
        return transformers_callback(self.at)

    def lightning_callback(self) -> LightningCallback:
        """For ``lightning.Trainer(callbacks=[...])``: follows the trainer's ``global_step``, also after a resume.

        That counts the steps of all optimizers: with two of them, each batch is two steps.
        """
        return lightning_callback(self.at)

    def recipe(self) -> Callable[[SparseBackend], object]:
        """What makes this schedule again, for another backend; can be pickled."""
        return functools.partial(_again, *self._arguments, self._step)

    def __reduce__(self) -> tuple[Callable[[SparseBackend], object], tuple[SparseBackend]]:
        return _of, (self._backend,)

    def _config_at(self, step: int) -> dict[str, Scheme | None]:
        sparse = {
            key for key, (start, stop) in self._windows.items() if start <= step and (stop is None or step < stop)
        }
        return {key: scheme if key in sparse else None for key, scheme in self._backend.config.items()}

    def _switch(self) -> None:
        config = self.config
        if config != self._current:
            self._current = config
            self._backend.switch(config, self._steps_of(config))

    def _steps_of(self, config: Mapping[str, Scheme | None]) -> str:
        """All steps of a config, in words: ``steps 0 to 99, 500 on``."""
        ends = sorted({0, *(end for window in self._windows.values() for end in window if end is not None)})
        spans: list[tuple[int, int | None]] = []
        for first, end in zip(ends, [*ends[1:], None], strict=True):
            if self._config_at(first) == config:
                joined = bool(spans) and spans[-1][1] == first
                spans = [*spans[:-1], (spans[-1][0], end)] if joined else [*spans, (first, end)]
        return "steps " + ", ".join(map(_span, spans))


def _span(span: Window) -> str:
    first, end = span
    if end is None:
        return f"{first} on"
    return f"{first} to {end - 1}" if end > first + 1 else f"{first}"


def _check(key: str, window: object) -> None:
    if not isinstance(window, tuple) or len(window) != 2:
        raise ValueError(f"Schedule: {key!r} has {window!r}: expected (start, stop), the stop None for never")
    start, stop = window
    whole = all(type(end) is int and end >= 0 for end in window if end is not None or end is start)
    if not whole or (stop is not None and stop <= start):
        raise ValueError(
            f"Schedule: {key!r} is sparse from start={start!r} to stop={stop!r}: expected whole numbers of steps from 0"
            " on, with stop above start or None for never"
        )


def _again(start: int, stop: int | None, patterns: dict[str, Window], step: int, backend: SparseBackend) -> Schedule:
    schedule = Schedule(backend, start, stop, patterns=patterns)
    schedule.at(step)
    return schedule


def _of(backend: SparseBackend) -> object:
    return backend.schedule
