"""Watches the first training step: which named weights no graph has read, and telling the user of them."""

from __future__ import annotations

import weakref
from dataclasses import replace

from torch import nn

from .dynamo.first_step import FirstStep, is_compiled_in_place
from .dynamo.recompiles import is_exhausted
from .graph_pass import SparsePass
from .model_names import chosen_weights, uncaptured
from .report import Report
from .shared_graphs import SharedGraphs

_EAGER = "Dynamo runs it eagerly, and so dense (TORCH_LOGS=graph_breaks,recompiles says why)"
_NOT_YET = f"in no graph so far: not called yet, or {_EAGER}"
_NOT_IN_STEP = f"in no graph after the first step: not called, or {_EAGER}"


class Watch:
    """The model of one backend, and what of it is dense."""

    def __init__(self, backend: object, sparse_pass: SparsePass, shared: SharedGraphs) -> None:
        self.backend = weakref.ref(backend)
        self._pass = sparse_pass
        self._shared = shared
        self._called = False
        self._model: weakref.ref[nn.Module] | None = None
        self._before = 0
        """How many reports are of a model that is gone."""
        self._first_step: FirstStep | None = None
        self._known: dict[tuple[int, ...], dict[str, nn.Parameter | None]] = {}

    def model(self) -> nn.Module | None:
        """The model that names are names in; None if there is none, or if it is gone."""
        return None if self._model is None else self._model()

    def take(self, model: nn.Module) -> None:
        """Watch this model from now on."""
        # Compiled code holds the backend; a strong reference would keep the parameters alive with it.
        self._model = weakref.ref(model)
        self._before = self._pass.count if self._called else 0
        self._known.clear()
        self._hook(model)

    def _hook(self, model: nn.Module) -> None:
        chosen = chosen_weights(model, self._pass.patterns)
        self._first_step = FirstStep(self, model, [(name, weight) for name, weight, _ in chosen if weight is not None])

    def missing(self, *, training: bool = False) -> dict[str, nn.Parameter | None]:
        """The named weights that no graph has read; with ``training`` also those that inference alone has read."""
        model = self.model()
        if model is None:
            return {}
        seen = self._pass.captured(training=training, since=self._before) | self._shared.served
        key = (training, self._pass.count, len(seen))  # walking the model takes milliseconds, and hooks ask often
        if key not in self._known:
            absent = uncaptured(model, self._pass.patterns, seen)
            chosen = chosen_weights(model, self._pass.patterns)
            self._known = {**dict(list(self._known.items())[-1:]), key: {n: w for n, w, _ in chosen if n in absent}}
        return self._known[key]

    def settle(self) -> None:
        """Stop watching once nothing is missing; until then watch the parameters as they are now."""
        model = self.model()
        if self._first_step is None or model is None:
            return
        self._first_step.over()
        self._first_step = None
        self._known.clear()
        if self.missing(training=True):
            self._hook(model)

    def rest(self) -> None:
        """Watch nothing until `wake`: what is called now is computed by another config."""
        if self._first_step is not None:
            self._first_step.over()
            self._first_step = None

    def wake(self) -> None:
        """Watch again, if a step has yet to show that nothing is missing."""
        model = self.model()
        if model is not None and self._first_step is None and self.missing(training=True):
            self._hook(model)

    def on_attempt(self) -> None:
        """See `Watcher`."""
        self._called = True

    def on_gradient(self, name: str) -> None:
        """See `Watcher`."""
        if self._was_called() and name in (missing := self.missing(training=True)):
            never = self.missing()
            self._tell([one for one in missing if one in never or one == name])

    def on_step(self, held: frozenset[int]) -> bool:
        """See `Watcher`. What another optimizer holds is another step's."""
        if not self._was_called():
            return False
        told = {
            name
            for name, weight in self.missing().items()
            if weight is None or id(weight) in held or not weight.requires_grad
        }
        told |= {
            name
            for name, weight in self.missing(training=True).items()
            if weight is not None and id(weight) in held and weight.grad is not None
        }
        self._tell(sorted(told))
        return True

    def _was_called(self) -> bool:
        model = self.model()
        return self._called or (
            model is not None and (is_compiled_in_place(model, self.backend()) or is_exhausted(model))
        )

    def _tell(self, missing: list[str]) -> None:
        if missing and (self._pass.strict or self._insists()):
            raise RuntimeError(
                f"sparse_pass: {', '.join(map(repr, missing))}: {_NOT_IN_STEP}. strict=True and require='sparse' let no"
                " named layer train dense: mend the graph break, compile the part that holds the layer, or map it to"
                " None"
            )
        self._pass.warn_uncaptured(missing, _NOT_IN_STEP)

    def _insists(self) -> bool:
        model = self.model()
        on_gpu = model is not None and any(parameter.is_cuda for parameter in model.parameters())
        return self._pass.require == "sparse" and on_gpu

    def completed(self, report: Report) -> Report:
        """A report with the named layers of the model that no graph has read."""
        model = self.model()
        if model is None:
            return report
        missing = uncaptured(model, self._pass.patterns, self._pass.captured() | self._shared.served)
        if report.graphs:
            told = [name for name, pattern in missing.items() if pattern.exact or self._pass.strict]
            self._pass.warn_uncaptured(told, _NOT_YET)
        # With a model each pattern names something of it: what is not there is uncaptured.
        return replace(report, unmatched=(), uncaptured=tuple(missing))
