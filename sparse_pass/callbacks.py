"""Callbacks that tell a schedule the step of a trainer of another library."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import lightning
    import transformers

TransformersCallback: TypeAlias = "transformers.TrainerCallback"
LightningCallback: TypeAlias = "lightning.Callback"


def transformers_callback(at: Callable[[int], None]) -> TransformersCallback:
    """Calls ``at`` with the number of steps that are done, before the first one and before each."""
    import transformers

    class ScheduleCallback(transformers.TrainerCallback):  # type: ignore[misc]  # untyped here
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            at(state.global_step)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            at(state.global_step)

    return ScheduleCallback()


def lightning_callback(at: Callable[[int], None]) -> LightningCallback:
    """The same for Lightning. A batch that only accumulates gradients leaves ``global_step`` as it is."""
    import lightning

    class ScheduleCallback(lightning.Callback):  # type: ignore[misc]  # untyped here
        def on_train_start(self, trainer: Any, *_: Any) -> None:
            at(trainer.global_step)

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            at(trainer.global_step)

    return ScheduleCallback()
