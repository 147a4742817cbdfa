"""Keep parts of a model apart that Dynamo would let share one compiled graph.

``for block in model.blocks: block.compile(backend=...)`` runs one forward for all blocks, so Dynamo
reuses the graph of the first block wherever its guards hold. That is right while the config treats all
blocks alike. Where it does not, a guard on the block lets only blocks that are treated alike share.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch._dynamo.guards import GuardBuilder, get_verbose_code_parts
from torch._dynamo.source import LocalSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import Guard, Source, TracingContext
from torch.fx import GraphModule

from .config import Scheme
from .fqn import Pattern, choose, from_source, normalize
from .model_names import linear_weights, names_by_identity


@dataclass(frozen=True, slots=True)
class Region:
    """The part of a model that a graph was captured from."""

    name: str = ""
    """Of the module, in normal form; "" for the whole model."""
    serves: tuple[str, ...] = ()
    """Names of the linears of the other parts that the graph may serve too."""

    def own(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The names of a weight, those that it has in this part first."""
        return tuple(sorted(names, key=lambda name: not (self.name and name.startswith(self.name + "."))))


def guard_region(graph_module: GraphModule, model: nn.Module, patterns: Sequence[Pattern]) -> Region:
    """Guard a graph that Dynamo captured from a part of ``model``; a no-op for the whole model."""
    root = _root_module(graph_module)
    if root is None:
        return Region()
    source, path, example = root
    prefix = _prefix(model, source, path, example)
    if not prefix:
        return Region()
    weights = linear_weights(model)
    # A name of a parameter names it in all parts that share it.
    shared = names_by_identity(model)
    decisions = {name: choose(patterns, [name, *shared.get(id(weight), ())]) for name, weight in weights.items()}
    chosen = {name: pattern.scheme if pattern else None for name, pattern in decisions.items()}
    kind = type(model.get_submodule(prefix))
    alike, served, other = set(), [], False
    for name, module in model.named_modules():
        if type(module) is kind:
            same = _below(normalize(name), chosen) == _below(normalize(prefix), chosen)
            other |= not same
            if same:
                alike.add(id(module))
            if same and name != prefix:
                served += [known for known in weights if known.startswith(normalize(name) + ".")]
    if other:
        _add_guard(source, frozenset(alike), prefix)
    return Region(normalize(prefix), tuple(served))


def _root_module(graph_module: GraphModule) -> tuple[Source, str, object] | None:
    """Source of the module that runs, with the path and value of one of its parameters."""
    for node in graph_module.graph.nodes:
        source, argument = getattr(node, "_dynamo_source", None), node.meta.get("grapharg")
        if node.op != "placeholder" or source is None or argument is None:
            continue
        if isinstance(argument.example, nn.Parameter):
            path = from_source(source.name if isinstance(source.name, str) else source.name())
            while hasattr(source, "base"):
                source = source.base
            if path:
                return source, path, argument.example
    return None


def _prefix(model: nn.Module, source: Source, path: str, parameter: object) -> str:
    """Name of the module that knows ``parameter`` of the model as ``path``; "" for the model itself.

    Where several do, since they share it, the one that runs.
    """
    prefixes = [
        name[: -len(path) - 1]
        for name, known in model.named_parameters(remove_duplicate=False)
        if known is parameter and name.endswith("." + path)
    ]
    if len(prefixes) < 2:
        return "".join(prefixes)
    output = InstructionTranslator.current_tx().output
    text = source.name if isinstance(source.name, str) else source.name()
    # A source is an expression over the frame's variables, which is how Dynamo's guards find the module too.
    running = eval(text, {"L": output.local_scope, "G": output.global_scope})
    return next((prefix for prefix in prefixes if model.get_submodule(prefix) is running), prefixes[0])


def _below(prefix: str, chosen: Mapping[str, Scheme | None]) -> dict[str, Scheme | None]:
    start = prefix + "."
    return {name[len(start) :]: scheme for name, scheme in chosen.items() if name.startswith(start)}


def _add_guard(source: Source, alike: frozenset[int], prefix: str) -> None:
    def SPARSE_PASS_REGION(builder: GuardBuilder, guard: Guard) -> None:
        builder.get_guard_manager(guard).add_lambda_guard(
            lambda module: id(module) in alike,
            get_verbose_code_parts([f"{guard.name} is treated by sparse_pass as {prefix!r} is"], guard),
            guard.user_stack,
        )
        if isinstance(source, LocalSource):
            # As Dynamo's own guards on a module do: recompile_limit then counts the graphs of each module, not
            # those of all treatments, which would soon use it up.
            builder.id_matched_objs[source.local_name] = weakref.ref(builder.get(guard))

    context = TracingContext.try_get()
    if context is not None:
        context.guards_context.dynamo_guards.add(source.make_guard(SPARSE_PASS_REGION))
