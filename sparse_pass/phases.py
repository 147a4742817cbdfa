"""One backend under several configs, one at a time: what it keeps for each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from .dynamo.phases import PhaseGuard
from .graph_pass import SparsePass
from .report import Report, merge
from .shared_graphs import SharedGraphs
from .watch import Watch


class Phase:
    """The graphs that a backend makes by one config."""

    def __init__(self, backend: object, sparse_pass: SparsePass, model: nn.Module | None, steps: str = "") -> None:
        """steps: those of the schedule in which it is current, in words; "" without a schedule."""
        self.sparse_pass = sparse_pass
        self.shared = SharedGraphs()
        self.watch = Watch(backend, sparse_pass, self.shared)
        self.steps = steps
        self.guard = PhaseGuard(steps)
        if model is not None:
            self.watch.take(model)

    def leave(self) -> None:
        """Another phase is current from now on."""
        self.guard.current = False
        self.watch.rest()

    def enter(self) -> None:
        """This phase is current again."""
        self.guard.current = True
        self.watch.wake()

    @property
    def report(self) -> Report:
        """Every graph of this phase, whether compiled or taken from a cache."""
        reports = [self.shared.told(names, report) for names, report in self.sparse_pass.reports()]
        report = self.watch.completed(self.sparse_pass.merged(reports))
        if not self.steps or not report.graphs:
            return report
        sites = tuple(replace(site, steps=self.steps) for site in report.sites)
        dense = not any(self.sparse_pass.config.values())
        graphs = f"all named linears are dense by the schedule, in {report.graphs} graph(s)"
        return replace(report, sites=sites, notes=(*report.notes, *([f"{self.steps}: {graphs}"] if dense else [])))


def report_of(phases: Sequence[Phase], current: Phase, patterns: Iterable[str]) -> Report:
    """One report of all phases so far."""
    if list(phases) == [current]:
        return current.report
    reports = {phase: phase.report for phase in phases}
    told = [report for report in reports.values() if report.graphs] or [reports[current]]
    missing = dict.fromkeys(
        name for phase, one in reports.items() if one.graphs or phase is current for name in one.uncaptured
    )
    return replace(merge(told, patterns), uncaptured=tuple(missing))
