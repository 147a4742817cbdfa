"""The pass as torch.compile takes it: one object for all graphs of a model, with ids for the caches."""

from __future__ import annotations

import hashlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from .config import Config, Require, Scheme, Tune
from .fqn import choose, parse_config
from .graph.parameters import Names
from .one_graph import is_logged, rewrite_graph
from .plan.costs import Costs, Measured
from .plan.limits import AskLimits, Limits, device_limits
from .plan.table import structured_operands
from .report import Report, Site, merge
from .shared_graphs import with_sharing
from .vocabulary import KERNEL_DTYPES


class SparsePass(CustomGraphPass):
    """The pass as Inductor takes it: ``torch.compile(model, options={"joint_custom_pre_pass": SparsePass(config)})``.

    It sees ATen graphs only, so linears are known by their modules and not by parameter names;
    :func:`sparse_backend` and :func:`inductor_options` also show it the parameter names.

    Args:
        config: names to schemes; see :func:`sparse_backend`.
        strict: raise where a named linear has to be skipped.
        tune: ``"auto"`` measures on the GPU, once per shape, which kernel is fastest and whether sparse ones
            pay at all, and remembers it on disk; ``"off"`` measures nothing and takes the defaults.
        require: ``"sparse"`` raises where a named linear on a CUDA device gets no 2:4 kernel at all, unless a
            measurement has found dense matmuls faster. None leaves that to the report.

    Raises:
        ValueError: bad config or argument.
    """

    def __init__(
        self, config: Config, *, strict: bool = False, tune: Tune = "auto", require: Require | None = None
    ) -> None:
        if require is not None and require not in get_args(Require):
            raise ValueError(f"require={require!r}: expected None or {', '.join(map(repr, get_args(Require)))}")
        if tune not in get_args(Tune):
            raise ValueError(f"tune={tune!r}: expected one of {', '.join(map(repr, get_args(Tune)))}")
        self.config: dict[str, Scheme | None] = dict(config) if isinstance(config, Mapping) else config
        self.strict = strict
        self.tune = tune
        self.require = require
        self.patterns = parse_config(config)
        # What plans ask of a device and of its kernels; `explain` asks shipped measurements of another one instead.
        self.limits: AskLimits = device_limits
        self.costs: Costs | None = Measured() if tune == "auto" else None
        # Each with the names that its graph was shown with, if it was.
        self._reports: list[tuple[Names | None, Report]] = []
        # Names of the graph that a thread is compiling. Compilation may run on several threads at once.
        self._names: dict[int, Names] = {}
        # How to report graphs that were shown and have not come by yet: they came from a compile cache.
        self._awaited: dict[Names, Callable[[SparsePass], None]] = {}
        self._compiling: set[Names] = set()
        self._warned: set[str] = set()
        self._texts = [pattern.text for pattern in self.patterns]

    def __call__(self, graph: Graph, *inputs: Any) -> None:
        if inputs or not isinstance(graph, Graph):
            raise TypeError(
                "SparsePass is a pass of Inductor, no backend: write backend=sparse_backend(config), or"
                " options={'joint_custom_pre_pass': SparsePass(config)} with the default backend"
            )
        if "torch._inductor.graph" in sys.modules:  # else nothing is compiled: `inner="aot_eager"`, `explain`
            from .ops import lowering

            lowering.register()
        names = self._names.get(threading.get_ident())
        if names is not None:
            self._awaited.pop(names, None)
            if not names.ours:
                return
        limits, costs = self.limits, self.costs
        report = rewrite_graph(graph, self.patterns, names, strict=self.strict, limits=limits, costs=costs)
        if names is not None and names.sharing:
            report = with_sharing(report, names.sharing)
        if self.require == "sparse":
            _insist(report, graph)
        self._reports.append((names, report))
        # A branch inside a graph comes before that graph.
        if report.graphs and (names is None or (names.last_graph and not names.checked)):
            self._warn_unmatched(names)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsePass:
        return self  # configs of Inductor are copied; the report must stay where the user holds it

    def see(self, names: Names, retrace: Callable[[SparsePass], None] | None = None) -> None:
        """From now on, the graph that this thread compiles has these names.

        Args:
            retrace: shows the pass the same graph again, if a compile cache kept it from being called.
        """
        self._names[threading.get_ident()] = names
        if retrace is not None:
            self._awaited[names] = retrace

    @contextmanager
    def seeing(self, names: Names, retrace: Callable[[SparsePass], None] | None = None) -> Iterator[None]:
        """`see` for the length of one compilation.

        A graph that did not come by is traced again: now, if a misspelt name may need a warning or the report is
        logged, else when the report is asked for. Tracing takes longer than the rest of a warm start.
        """
        self.see(names, retrace)
        self._compiling.add(names)
        try:
            yield
            self._compiling.discard(names)
            if not names.checked or is_logged():
                self.catch_up()
        except BaseException:
            self._awaited.pop(names, None)
            raise
        finally:
            self._compiling.discard(names)
            self._names.pop(threading.get_ident(), None)

    def note(self, text: str, names: Names) -> None:
        """Warn of what concerns the named linears of a graph, if it has any, and say it in the report.

        Raises:
            RuntimeError: with ``strict``, instead of the warning.
        """
        known = [(name.removesuffix(".weight"), name) for several in names.by_input.values() for name in several]
        chosen = [choose(self.patterns, pair) for pair in known]
        if text not in self._warned and any(pattern is not None and pattern.scheme for pattern in chosen):
            if self.strict:
                raise RuntimeError(f"sparse_pass, strict=True: {text}")
            self._warned.add(text)
            note = Report(unmatched=tuple(pattern.text for pattern in self.patterns), notes=(text,))
            self._reports.append((names, note))
            warnings.warn(f"sparse_pass: {text}", stacklevel=3)

    def catch_up(self, *_: object) -> None:
        """Trace what came from a compile cache, for its report."""
        thread = threading.get_ident()
        current = self._names.get(thread)
        # Not what another thread is compiling at the moment: that will come by.
        awaited = [(names, retrace) for names, retrace in list(self._awaited.items()) if names not in self._compiling]
        for names, retrace in awaited:
            self._awaited.pop(names, None)
            self._names[thread] = names
            retrace(self)
        if awaited and current is not None:
            self._names[thread] = current
        elif awaited:
            self._names.pop(thread, None)

    @property
    def report(self) -> Report:
        """All graphs compiled so far, those from a compile cache included."""
        return self.merged([report for _, report in self.reports()])

    def merged(self, reports: Iterable[Report]) -> Report:
        """One report of several."""
        return merge(reports, self._texts)

    def reports(self) -> list[tuple[Names | None, Report]]:
        """The report of each graph, with the names that the graph was shown with."""
        self.catch_up()
        return list(self._reports)

    @property
    def count(self) -> int:
        """How many reports there are by now."""
        return len(self._reports)

    def captured(self, *, training: bool = False, since: int = 0) -> set[str]:
        """Names of the linears of all graphs compiled so far. Of graphs from a cache that were not traced again, names
        of the parameters that they read.

        Args:
            training: only of graphs that a model was trained by, and not of those of its copies.
            since: how many reports to leave out.
        """
        rows = {
            name
            for names, report in self._reports[since:]
            for site in report.sites
            for name in (site.fqn, *site.serves)
            if not training or (site.training and (names is None or names.of_model))
        }
        cached = [names for names in list(self._awaited) if not training or (names.with_gradients and names.of_model)]
        return rows.union(*(names.read for names in cached))

    def _warn_unmatched(self, names: Names | None) -> None:
        absent = [
            text for text in self.merged(report for _, report in self._reports).unmatched if text not in self._warned
        ]
        self._warned.update(absent)
        if absent:
            hint = "" if names is not None else "; parameter names are visible to sparse_backend only"
            warnings.warn(
                f"sparse_pass: {', '.join(map(repr, absent))} named no linear in the graph(s) compiled so far{hint}."
                " sparse_pass.explain(model, config) shows the nearest names; model= checks names at once,"
                " and makes them absolute where parts of a model are compiled one by one",
                stacklevel=3,
            )

    def warn_uncaptured(self, missing: Iterable[str], text: str) -> None:
        """Warn of layers that no graph holds, of each once. ``text`` follows their names."""
        names = [name for name in missing if name not in self._warned]
        self._warned.update(names)
        if names:
            warnings.warn(f"sparse_pass: {', '.join(map(repr, names))}: {text}", stacklevel=3)

    def uuid(self) -> str:
        """Key for the compile caches: everything a rewrite depends on besides the graph."""
        names = self._names.get(threading.get_ident())
        seen: list[object] = []
        if names is not None:
            seen = [sorted(names.by_input.items()), sorted(names.eager_backward), sorted(names.shardings.items())]
        key = (list(self.config.items()), self.strict, self.tune, self.require, seen, _environment())
        return hashlib.sha256(repr(key).encode()).hexdigest()


def _insist(report: Report, graph: Graph) -> None:
    """Raise if a named linear of a graph on a CUDA device has no 2:4 kernel for another reason than a measurement."""
    values = [node.meta.get("val") for node in graph.nodes if node.op == "placeholder"]
    if not any(isinstance(value, torch.Tensor) and value.is_cuda for value in values):
        return
    dense = [site for site in report.sites if site.status != "sparse" and not site.measured and not _has_nothing(site)]
    if dense:
        told = "; ".join(f"{site.fqn!r} is {site.status}: {site.reason}" for site in dense)
        raise ValueError(f"sparse_pass, require='sparse': no 2:4 kernel for {told}")


def _has_nothing(site: Site) -> bool:
    """Whether the scheme changes gradients alone, and the graph has none of these, as one of inference."""
    asked = [gemm for gemm, role in structured_operands(site.scheme).items() if role is not None]
    none_there = all(getattr(site, gemm) is None for gemm in asked)
    return site.status == "masked_dense" and "output" not in asked and none_there


def _environment() -> tuple[object, ...]:
    limits: list[Limits] = []
    if torch.cuda.is_available():
        # Only the current device: asking the others would open a context on each of them, in every rank.
        device = torch.device("cuda", torch.cuda.current_device())
        limits = [device_limits(device, dtype) for dtype in KERNEL_DTYPES]
    return torch.__version__, _source_hash(), limits


_SOURCE_HASHES: dict[Path, str] = {}


def _source_hash() -> str:
    """Hash of this package's sources: a changed rewrite must not meet graphs of the old one in a cache."""
    root = Path(__file__).parent
    if root not in _SOURCE_HASHES:
        files = sorted(root.rglob("*.py"))
        _SOURCE_HASHES[root] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return _SOURCE_HASHES[root]
