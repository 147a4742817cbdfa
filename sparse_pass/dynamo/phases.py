"""Keep graphs of one config from running while another one is current, and keep them for the way back.

Each graph is guarded by whether its own phase is the current one. Dynamo looks through all graphs that it has of a code
before it makes another, so that going back to a phase takes the graph that was made in it.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

from torch._dynamo.guards import GuardBuilder, get_verbose_code_parts
from torch._dynamo.source import GlobalStateSource
from torch._guards import Guard, TracingContext

_NOT_A_LOCAL = "sparse_pass phase"
"""No name of Python's: what `id_matched_objs` holds under it is never one of a frame's locals."""


class PhaseGuard:
    """The guard of all graphs that are made while a phase is current."""

    def __init__(self, what: str) -> None:
        """what: the phase in words, for ``TORCH_LOGS=recompiles``."""
        self.current = True

        def SPARSE_PASS_PHASE(builder: GuardBuilder, guard: Guard) -> None:
            # At the root, whose own guards run in every call. Those of modules are skipped while nothing in their
            # dicts has changed, and a switch changes nothing there.
            builder.guard_manager.root.add_lambda_guard(
                lambda _: self.current,
                get_verbose_code_parts([f"the schedule of sparse_pass is at {what}"], guard),
                guard.user_stack,
            )
            builder.id_matched_objs[_NOT_A_LOCAL] = cast("weakref.ReferenceType[object]", self._other)

        # One function for all graphs: guards of equal functions and sources are one guard.
        self._create = SPARSE_PASS_PHASE

    def _other(self) -> Any:
        """What Dynamo asks of an entry of its cache: the object that it is bound to, or None.

        `recompile_limit` leaves out the entries that are bound to another object than the frame holds. So only the
        graphs of the current phase count, as if each phase had a code of its own.
        """
        return None if self.current else self

    def add(self) -> None:
        """Guard the graph that Dynamo is capturing."""
        context = TracingContext.try_get()
        if context is not None:
            context.guards_context.dynamo_guards.add(GlobalStateSource().make_guard(self._create))
