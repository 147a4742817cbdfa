"""One graph: find -> plan -> apply -> report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, get_args

from torch._guards import TracingContext
from torch._logging._internal import LazyTraceHandler, trace_log, trace_structured
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

from .apply.carry_out import apply_plan
from .config import Config
from .fqn import Pattern, choose, parse_config
from .graph.find import find_linears
from .graph.gemms import GemmName
from .graph.parameters import Names, has_backward, parameter_nodes, sharding_of_nodes
from .graph.whole_step import step_backward, step_parameters
from .plan.costs import Costs
from .plan.decide import make_plan
from .plan.limits import AskLimits, device_limits
from .plan.values import LinearPlan, OtherPlan, Reason
from .report import Report, Site

log = logging.getLogger(__name__)


def rewrite_graph(
    graph: Graph,
    patterns: Sequence[Pattern],
    names: Names | None = None,
    *,
    step: Sequence[str] | None = None,
    strict: bool = False,
    limits: AskLimits = device_limits,
    costs: Costs | None = None,
) -> Report:
    """Rewrite the linears that ``patterns`` name, in place.

    Args:
        step: of a graph of a whole training step the names of its leading placeholders.
        limits: what a device can do.
        costs: whether sparse kernels pay for a shape; None takes them wherever they can run, and their defaults.

    Raises:
        ValueError: an exactly named linear cannot be 2:4 sparse, or with ``strict`` any named one. The
            graph is untouched then.
    """
    if (names is not None or TracingContext.try_get()) and _is_branch(graph):
        return _branch_report(graph, patterns)
    parameters = parameter_nodes(graph, names.by_input, names.by_attribute) if names else parameter_nodes(graph)
    if step is not None:
        parameters = step_parameters(graph, step)
    shardings = sharding_of_nodes(graph, names.shardings) if names else None
    found = find_linears(graph, parameters, shardings, whole_step=step is not None)
    eager_backward = names.eager_backward if names else ()
    plan = make_plan(found, patterns, limits, costs, strict=strict, eager_backward=eager_backward)
    training = has_backward(graph) if step is None else bool(step_backward(graph, parameters))
    if plan.linears:
        apply_plan(graph, plan, _fake_mode(graph))
    notes = [*plan.notes]
    if names is None and not parameters:
        notes.append("parameter names are not visible to a pass that sees the ATen graph only: linears are known"
                     " by their modules; use sparse_backend or inductor_options to name parameters")  # fmt: skip
    if found.nameless and not parameters:
        notes.append("no matmul of the graph carries a module name (nn_module_stack): no layer can be named")
    report = Report(
        sites=(*(_site(one, training) for one in plan.linears), *(_other_site(one, training) for one in plan.others)),
        unmatched=plan.unmatched,
        notes=tuple(notes),
        graphs=1,
        inference_graphs=int(not training),
    )
    _log(report)
    return report


def _site(plan: LinearPlan, training: bool) -> Site:
    linear, pattern = plan.named.linear, plan.named.pattern
    m, n, k = linear.shape
    kernels: dict[str, Any] = {name: plan.kernel(name) for name in get_args(GemmName)}
    sparse = any(kernel not in ("dense", "masked_dense", "float8", None) for kernel in kernels.values())
    fused = plan.input.prepared.activation if plan.input.prepared else None
    return Site(
        fqn=linear.names[0], pattern=pattern.text, scheme=plan.named.scheme,
        dtype=linear.output.operand.meta["val"].dtype, shape=(m if isinstance(m, int) else str(m), n, k),
        status="skipped" if plan.skipped else "sparse" if sparse else "masked_dense",
        reason="; ".join(map(str, _distinct(plan.reasons))),
        shard_of=str(linear.sharding or ""), fused=fused.name if fused else None, training=training,
        measured=any(reason.measured for reason in plan.reasons), **kernels,
    )  # fmt: skip


def _distinct(reasons: Sequence[Reason]) -> list[Reason]:
    """Each reason once; one that holds for all GEMMs is not told again of one."""
    kept: list[Reason] = []
    for reason in reasons:
        if reason not in kept and Reason(None, reason.text) not in kept:
            kept.append(reason)
    return kept


def _other_site(plan: OtherPlan, training: bool) -> Site:
    value = plan.weight.node.meta["val"]
    return Site(
        fqn=plan.weight.names[0], pattern=plan.pattern.text, scheme=plan.scheme, dtype=value.dtype,
        shape=("-", *value.shape[-2:]), status="skipped", reason=plan.reason, training=training,
    )  # fmt: skip


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


def rewrite(graph_module: GraphModule, config: Config, *, parameters: Sequence[str] | None = None) -> Report:
    """Rewrite an ATen graph in place, outside of torch.compile.

    Args:
        graph_module: a joint or inference graph of AOTAutograd, or the graph of a torch.export program
            (``ep.graph_module`` or ``ep.module()``), with fake tensors in ``node.meta["val"]``.
        config: names to schemes, as for :func:`sparse_backend`.
        parameters: of a graph of a whole training step, as ``make_fx`` traces forward, loss and
            ``torch.autograd.grad`` together: the names of its leading placeholders, which are the parameters, or shards
            of them that the graph gathers. The optimizer may be in the graph; ``decay`` then is not.

    Returns:
        Report: one site per named linear of this graph.

    Raises:
        TypeError: ``graph_module`` is something else, such as a torch.export program itself.
        ValueError: bad config; more ``parameters`` than placeholders; an exactly named linear that cannot be 2:4
            sparse; no fake tensors. The graph is untouched then.
    """
    if not isinstance(graph_module, GraphModule):
        given = type(graph_module).__name__
        how = "; of a torch.export program pass program.graph_module or program.module()" * (given == "ExportedProgram")
        raise TypeError(f"rewrite takes a torch.fx.GraphModule, got {given}{how}")
    patterns = parse_config(config)
    _fake_mode(graph_module.graph)  # or linears that no tensors tell of would count as absent
    report = rewrite_graph(graph_module.graph, patterns, step=parameters)
    graph_module.recompile()
    return report
