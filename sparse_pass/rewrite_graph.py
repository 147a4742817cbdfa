"""One graph: find the named linears, rewrite each, report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch._guards import TracingContext
from torch._logging._internal import LazyTraceHandler, trace_log, trace_structured
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from .config import Config, Tune
from .find import find_linears
from .fqn import Pattern, choose, parse_config
from .gemms import Linear, input_of, trace
from .halves import without_halves
from .legal import why_dims_skipped
from .parameters import has_backward, multiplying_readers, other_readers, parameter_nodes
from .report import Report, Site
from .rewrite_linear import Rewriting, refuse

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Names:
    """Parameter names by position of the graph input, from the graph that Dynamo captured."""

    by_input: Mapping[int, tuple[str, ...]]
    by_attribute: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names of parameters that are attributes of the graph, not inputs."""
    read: frozenset[str] = frozenset()
    """Names of the parameters that the graph does more with than look up rows."""
    eager_backward: frozenset[str] = frozenset()
    """Names of the parameters that are in the hands of an autograd.Function whose backward runs eagerly."""
    of_model: bool = True
    """False where the parameters are those of a copy of the model that names are names in."""
    with_gradients: bool = True
    """Whether gradients were enabled when the graph was captured."""
    ours: bool = True
    """False for the step of an optimizer, whose parameters are not multiplied by anything."""
    last_graph: bool = True
    """False where a graph break follows: what is not named here may be named in the next graph."""
    checked: bool = False
    """Whether the config was checked against the model: then an absent layer is no surprise."""


def rewrite_graph(
    graph: Graph,
    patterns: Sequence[Pattern],
    names: Names | None = None,
    *,
    strict: bool = False,
    tune: Tune = "off",
) -> Report:
    """Rewrite the linears that ``patterns`` name, in place.

    Args:
        tune: ``"auto"`` measures, where it is not known yet, whether sparse kernels pay for a shape.

    Raises:
        ValueError: an exactly named linear cannot be 2:4 sparse, or with ``strict`` any named one. The
            graph is untouched then.
    """
    if (names is not None or TracingContext.try_get()) and _is_branch(graph):
        return _branch_report(graph, patterns)
    parameters = parameter_nodes(graph, names.by_input, names.by_attribute) if names else parameter_nodes(graph)
    found = find_linears(graph, parameters)
    chosen: list[tuple[Linear, Pattern]] = []
    matched: set[str] = set()
    for linear in found.linears:
        matched.update(pattern.text for pattern in patterns if pattern.names(linear.names))
        pattern = choose(patterns, linear.names)
        if pattern is not None and pattern.scheme is not None:
            chosen.append((linear, pattern))
    chosen = without_halves(found.linears, chosen, names.eager_backward if names else ())
    refuse(chosen, strict)
    unread = _named_without_linear(graph, patterns, parameters, found.linears)
    if refused := [f"{site.fqn!r}: {site.reason}" for site, error in unread if error or strict]:
        raise ValueError("sparse_pass cannot sparsify " + "; ".join(refused))
    matched.update(site.pattern for site, _ in unread)
    sites = []
    if chosen:
        rewriting = Rewriting(graph, _fake_mode(graph), tune)
        sites = [rewriting.rewrite(linear, pattern) for linear, pattern in chosen]
        rewriting.clean()
        graph.lint()
    training = has_backward(graph)
    sites = [replace(site, training=training) for site in [*sites, *(site for site, _ in unread)]]
    notes = []
    if names is None and not parameters:
        notes.append("parameter names are not visible to a pass that sees the ATen graph only: linears are known"
                     " by their modules; use sparse_backend or inductor_options to name parameters")  # fmt: skip
    if found.nameless and not parameters:
        notes.append("no matmul of the graph carries a module name (nn_module_stack): no layer can be named")
    report = Report(
        sites=tuple(sites),
        unmatched=tuple(pattern.text for pattern in patterns if pattern.text not in matched),
        notes=tuple(notes),
        graphs=1,
        inference_graphs=int(not training),
    )
    _log(report)
    return report


def _named_without_linear(
    graph: Graph, patterns: Sequence[Pattern], parameters: Mapping[Node, tuple[str, ...]], linears: Sequence[Linear]
) -> list[tuple[Site, bool]]:
    """Named weights that the graph reads, but by no matmul that could be found: fused ops, products, branches.

    Of more than two dims those of matmuls, as of the experts of a grouped one, and not the kernels of convolutions.

    Returns:
        A row of the report for each, and whether it is an error.
    """
    sites = []
    found = {linear.weight for linear in linears}
    named = {name for linear in linears for name in linear.names}
    for node, names in parameters.items():
        value = node.meta.get("val")
        if node in found or not isinstance(value, torch.Tensor) or value.dim() < 2:
            continue
        owners = [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
        known = tuple(dict.fromkeys([*owners, *names]))
        pattern = choose(patterns, known)
        if pattern is None or pattern.scheme is None or not named.isdisjoint(names):
            continue
        readers = other_readers(graph, node) if value.dim() == 2 else multiplying_readers(node)
        if readers:
            *batch, n, k = value.shape
            reason = f"no matmul of this weight was found: it is read by {', '.join(readers)}"
            as_input = [linear.names[0] for linear in linears if _is_input(node, linear)]
            if as_input:
                others = ", ".join(map(repr, dict.fromkeys(as_input)))
                reason = f"it is multiplied by another weight, {others}, and counts as the input of that one"
            if batch:
                reason = f"{why_dims_skipped(value.shape)}; it is read by {', '.join(readers)}"
            site = Site(
                fqn=known[0],
                pattern=pattern.text,
                scheme=pattern.scheme,
                shape=("-", n, k),
                dtype=value.dtype,
                status="skipped",
                reason=reason,
            )
            sites.append((site, bool(batch) and pattern.exact))
    return sites


def _is_input(node: Node, linear: Linear) -> bool:
    input = input_of(linear.output)
    return input is not None and trace(input.node)[0] is node


def _is_branch(graph: Graph) -> bool:
    """Whether this is a graph inside another, such as a branch of torch.cond, whose backward is elsewhere.

    AOTAutograd describes the inputs of the outer graph, and a joint graph has tangents.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return bool(inputs) and not any("desc" in node.meta or str(node.target).startswith("tangents") for node in inputs)


def _branch_report(graph: Graph, patterns: Sequence[Pattern]) -> Report:
    linears = find_linears(graph, {}).linears
    named = [linear.names[0] for linear in linears if (p := choose(patterns, linear.names)) is not None and p.scheme]
    notes = [f"{', '.join(named)}: left dense inside a branch (torch.cond and the like)"] if named else []
    for note in notes:
        log.warning("%s", note)
    return Report(unmatched=tuple(pattern.text for pattern in patterns), notes=tuple(notes))


def _fake_mode(graph: Graph) -> FakeTensorMode:
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if isinstance(mode, FakeTensorMode):
            return mode
    raise ValueError(
        "the graph carries no fake tensors in node.meta['val'];"
        " capture it with torch.compile, torch.export or AOTAutograd"
    )


def is_logged() -> bool:
    """Whether anybody reads what is logged of a report: by ``TORCH_LOGS="+sparse_pass"``, or by tlparse."""
    return log.isEnabledFor(logging.INFO) or any(isinstance(one, LazyTraceHandler) for one in trace_log.handlers)


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
        TypeError: ``graph_module`` is something else, such as a torch.export program itself.
        ValueError: bad config; an exactly named linear that cannot be 2:4 sparse; no fake tensors.
            The graph is untouched then.
    """
    if not isinstance(graph_module, GraphModule):
        given = type(graph_module).__name__
        how = "; of a torch.export program pass program.graph_module or program.module()" * (given == "ExportedProgram")
        raise TypeError(f"rewrite takes a torch.fx.GraphModule, got {given}{how}")
    patterns = parse_config(config)
    _fake_mode(graph_module.graph)  # or linears that no tensors tell of would count as absent
    report = rewrite_graph(graph_module.graph, patterns)
    graph_module.recompile()
    return report
