"""The pass: find the named linears of a graph, decide for each GEMM, rewrite, report."""

from __future__ import annotations

import hashlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._logging import trace_structured
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

from .config import Config, Scheme
from .find import Linear, Use, find_linears, parameter_nodes
from .fqn import Pattern, choose, parse_config
from .legal import KERNEL_DTYPES, Limits, device_limits, why_not_sparse, why_skipped
from .report import Report, Site, Status, merge
from .rewriter import Rewriter

log = logging.getLogger(__name__)

Tune: TypeAlias = Literal["auto", "off"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Names:
    """Parameter names by position of the graph input, from the graph that Dynamo captured."""

    by_input: Mapping[int, tuple[str, ...]]
    last_graph: bool = True
    """False where a graph break follows: what is not named here may be named in the next graph."""
    checked: bool = False
    """Whether the config was checked against the model: then an absent layer is no surprise."""


def rewrite_graph(
    graph: Graph, patterns: Sequence[Pattern], names: Names | None = None, *, strict: bool = False
) -> Report:
    """Rewrite the linears that ``patterns`` name, in place.

    Raises:
        ValueError: an exactly named linear cannot be 2:4 sparse, or with ``strict`` any named one. The
            graph is untouched then.
    """
    parameters = parameter_nodes(graph, names.by_input if names else {})
    found = find_linears(graph, parameters)
    chosen: list[tuple[Linear, Pattern]] = []
    matched: set[str] = set()
    for linear in found.linears:
        matched.update(pattern.text for pattern in patterns if pattern.names(linear.names))
        pattern = choose(patterns, linear.names)
        if pattern is not None and pattern.scheme is not None:
            chosen.append((linear, pattern))
    _refuse([(one, pattern, reason) for one, pattern in chosen if (reason := why_skipped(one))], strict)
    sites = []
    if chosen:
        rewriter = Rewriter(graph, _fake_mode(graph))
        sites = [_rewrite_linear(rewriter, linear, pattern) for linear, pattern in chosen]
        rewriter.clean(linear for linear, _ in chosen)
        graph.lint()
    notes = []
    if names is None and not parameters:
        notes.append("parameter names are not visible to a pass that sees the ATen graph only: linears are known"
                     " by their modules; use sparse_backend or inductor_options to name parameters")  # fmt: skip
    if not found.has_stacks and not parameters:
        notes.append("no matmul of the graph carries a module name (nn_module_stack): no layer can be named")
    report = Report(
        sites=tuple(sites),
        unmatched=tuple(pattern.text for pattern in patterns if pattern.text not in matched),
        notes=tuple(notes),
        graphs=1,
    )
    _log(report)
    return report


def _refuse(skipped: list[tuple[Linear, Pattern, str]], strict: bool) -> None:
    refused = [
        f"{linear.names[0]!r} (named {'exactly' if pattern.exact else f'by {pattern.text!r}'}): {reason}"
        for linear, pattern, reason in skipped
        if strict or pattern.exact
    ]
    if refused:
        raise ValueError("sparse_pass cannot sparsify " + "; ".join(refused))


def _rewrite_linear(rewriter: Rewriter, linear: Linear, pattern: Pattern) -> Site:
    scheme = pattern.scheme
    assert scheme is not None
    m, n, k = linear.shape
    dtype = linear.output.operand.meta["val"].dtype

    def site(status: Status, reason: str, output: str | None, grad_input: str | None, grad_weight: str | None) -> Site:
        return Site(
            fqn=linear.names[0], pattern=pattern.text, scheme=scheme, dtype=dtype, status=status, reason=reason,
            shape=(m if isinstance(m, int) else str(m), n, k),
            output=output, grad_input=grad_input, grad_weight=grad_weight,
        )  # fmt: skip

    grad_weight = None if linear.grad_output is None else "dense"
    grad_input = "dense" if linear.grad_input else None
    skipped = why_skipped(linear)
    if skipped:
        return site("skipped", skipped, "dense", grad_input, grad_weight)
    if linear.unplaced.startswith("grad_weight") and (scheme.grad_weight == "masked" or scheme.decay):
        raise ValueError(
            f"sparse_pass: {linear.names[0]!r} asks for {scheme}, but {linear.unplaced}; use grad_weight='dense', decay=0"
        )
    limits = device_limits(linear.weight.meta["val"].device, dtype)
    reasons = {use: why_not_sparse(use, linear.weight, scheme, limits) for use in (linear.output, *linear.grad_input)}
    sparse = [use for use, reason in reasons.items() if reason is None]
    masked = [use for use, reason in reasons.items() if reason is not None]
    kernel = "cusparselt" if limits.device == "cuda" else "reference"

    def kernel_of(uses: Sequence[Use]) -> str | None:
        return None if not uses else kernel if all(use in sparse for use in uses) else "masked_dense"

    output, grad_input = kernel_of([linear.output]), kernel_of(linear.grad_input)
    why = [] if reasons[linear.output] is None else [str(reasons[linear.output])]
    backward = {str(reasons[use]) for use in linear.grad_input if reasons[use] is not None} - set(why)
    why += [f"grad_input: {reason}" for reason in sorted(backward)]
    why += [linear.unplaced] if linear.unplaced else []
    rewriter.rewrite(linear, scheme, sparse, masked)
    return site("sparse" if sparse else "masked_dense", "; ".join(why), output, grad_input, grad_weight)


def _fake_mode(graph: Graph) -> FakeTensorMode:
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    raise ValueError(
        "the graph carries no fake tensors in node.meta['val']; capture it with torch.compile, torch.export or AOTAutograd"
    )


def _log(report: Report) -> None:
    for site in report.sites:
        level = logging.WARNING if site.status == "skipped" else logging.INFO
        log.log(level, "%s: %s%s", site.fqn, site.status, f" ({site.reason})" if site.reason else "")
    log.debug("%s", report)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "sparse_pass_report", "encoding": "string"},
        payload_fn=lambda: str(report),
    )


def rewrite(graph_module: GraphModule, config: Config) -> Report:
    """Rewrite an ATen graph in place, outside of torch.compile.

    Args:
        graph_module: a joint or inference graph of AOTAutograd, or the graph of a torch.export program
            (``ep.graph_module`` or ``ep.module()``), with fake tensors in ``node.meta["val"]``.
        config: names to schemes, as for :func:`sparse_backend`.

    Returns:
        Report: one site per named linear of this graph.

    Raises:
        ValueError: bad config; an exactly named linear that cannot be 2:4 sparse; no fake tensors.
    """
    report = rewrite_graph(graph_module.graph, parse_config(config))
    graph_module.recompile()
    return report


class SparsePass(CustomGraphPass):
    """The pass as Inductor takes it: ``torch.compile(model, options={"joint_custom_pre_pass": SparsePass(config)})``.

    It sees ATen graphs only, so linears are known by their modules and not by parameter names;
    :func:`sparse_backend` and :func:`inductor_options` also show it the parameter names.

    Args:
        config: names to schemes; see :func:`sparse_backend`.
        strict: raise where a named linear has to be skipped.
        tune: ``"auto"`` or ``"off"``; reserved for measured choices, both take the defaults now.

    Raises:
        ValueError: bad config or argument.
    """

    def __init__(self, config: Config, *, strict: bool = False, tune: Tune = "auto") -> None:
        if tune not in get_args(Tune):
            raise ValueError(f"tune={tune!r}: expected one of {', '.join(map(repr, get_args(Tune)))}")
        self.config: dict[str, Scheme | None] = dict(config) if isinstance(config, Mapping) else config
        self.strict = strict
        self.tune = tune
        self._patterns = parse_config(config)
        self._reports: list[Report] = []
        # Names of the graph that a thread is compiling. Compilation may run on several threads at once.
        self._names: dict[int, Names] = {}
        # How to report graphs that were shown and have not come by yet: they came from a compile cache.
        self._awaited: dict[Names, Callable[[SparsePass], None]] = {}
        self._warned: set[str] = set()

    def __call__(self, graph: Graph) -> None:
        names = self._names.get(threading.get_ident())
        if names is not None:
            self._awaited.pop(names, None)
        self._reports.append(rewrite_graph(graph, self._patterns, names, strict=self.strict))
        if names is None or (names.last_graph and not names.checked):
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
        """`see` for the length of one compilation, after which a graph that did not come by is reported."""
        self.see(names, retrace)
        try:
            yield
            self._catch_up()
        finally:
            self._awaited.pop(names, None)
            self._names.pop(threading.get_ident(), None)

    def _catch_up(self) -> None:
        thread = threading.get_ident()
        current = self._names.get(thread)
        for names, retrace in list(self._awaited.items()):
            self._names[thread] = names
            retrace(self)
            self._awaited.pop(names, None)
        if current is not None:
            self._names[thread] = current

    @property
    def report(self) -> Report:
        """All graphs compiled so far, those from a compile cache included."""
        self._catch_up()
        return self._merged()

    def _merged(self) -> Report:
        return merge(self._reports, [pattern.text for pattern in self._patterns])

    def _warn_unmatched(self, names: Names | None) -> None:
        absent = [text for text in self._merged().unmatched if text not in self._warned]
        self._warned.update(absent)
        if absent:
            hint = "" if names is not None else "; parameter names are visible to sparse_backend only"
            warnings.warn(
                f"sparse_pass: {', '.join(map(repr, absent))} named no linear in the graph(s) compiled so far{hint}."
                " sparse_pass.explain(model, config) shows the nearest names; model= checks names at once",
                stacklevel=3,
            )

    def uuid(self) -> str:
        """Key for the compile caches: everything a rewrite depends on besides the graph."""
        names = self._names.get(threading.get_ident())
        seen = sorted(names.by_input.items()) if names else []
        key = (list(self.config.items()), self.strict, self.tune, seen, _environment())
        return hashlib.sha256(repr(key).encode()).hexdigest()


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
