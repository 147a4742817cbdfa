"""Where the inputs of a graph that Dynamo captured come from: the objects on the way, whatever their spelling.

Dynamo writes the same parameter as ``L['self']._modules['fc']._parameters['weight']``, as
``L['self'].__dict__['_modules']['fc']...`` where a class has its own ``__getattr__``, or as ``L['__self__']...``
where a container is compiled by itself. Each of these is an expression over the variables of the running frame,
which is how Dynamo's guards find the object again. So it is evaluated here, and the object decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._guards import Source
from torch.fx import GraphModule

_LAST = re.compile(r"""(?: \[(['"]) (?P<key>[^'"]*) \1\] | \.(?P<attribute>\w+) )$""", re.VERBOSE)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A module that an input was reached by."""

    source: Source
    module: nn.Module


@dataclass(frozen=True, slots=True, eq=False)
class Input:
    """A graph input that may be a parameter."""

    index: int
    """Its position among the inputs of the graph."""
    source: Source
    text: str
    """Dynamo's expression for it."""
    value: object
    """The tensor itself."""
    way: tuple[Place, ...]
    """The modules that lead to it, the outermost first; empty if there are none or their objects are unknown."""

    @property
    def leaf(self) -> str:
        """Its name in the last module of the way; "" if it is no attribute of that module."""
        found = _LAST.search(self.text)
        if found is None or not self.way:
            return ""
        leaf, module = found.group("key") or found.group("attribute"), self.way[-1].module
        owned = module._parameters.get(leaf, module.__dict__.get(leaf)) is self.value
        return leaf if owned else ""


def parameter_inputs(graph_module: GraphModule) -> Iterator[Input]:
    """The inputs that are parameters, or that a module holds in the place of one."""
    known: dict[str, object] = {}
    scope = _scope()
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for index, node in enumerate(placeholders):
        source, argument = getattr(node, "_dynamo_source", None), node.meta.get("grapharg")
        if source is None:
            continue
        text = source_text(source)
        value = argument.example if argument is not None else None
        if "._buffers[" in text or is_of_optimizer(text):
            continue
        way = tuple(_way(source, scope, known))
        if way or "_parameters[" in text or isinstance(value, nn.Parameter):
            yield Input(index, source, text, value, way)


def source_text(source: Source) -> str:
    """The expression of a source: a property on newer torch, a method on older."""
    return source.name if isinstance(source.name, str) else source.name()


def is_of_optimizer(text: str) -> bool:
    """Whether a source or the name of an attribute leads through the parameter groups of an optimizer."""
    return ".param_groups[" in text or "___param_groups_" in text


def is_optimizer_step(graph_module: GraphModule) -> bool:
    """Whether a graph reads parameters as an optimizer holds them, and none as a module does."""
    sources = [getattr(node, "_dynamo_source", None) for node in graph_module.graph.nodes]
    texts = [source_text(source) for source in sources if source is not None]
    held = any(map(is_of_optimizer, [*texts, *(name for name, _ in graph_module.named_parameters())]))
    return held and not any("_parameters[" in text for text in texts)


def is_compiled_backward(inputs: Iterable[Input]) -> bool:
    """Whether a graph is a backward that compiled autograd captured: what is 2:4 in it was so in its forward's graph.

    Args:
        inputs: its `parameter_inputs`. No module leads to those of a backward, but to those of a forward that it
            computes once more.
    """
    return torch._dynamo.compiled_autograd.in_compiled_autograd_region and not any(one.way for one in inputs)


def running_scope() -> Any:
    """Dynamo's record of the frame that it compiles; None where a backend is called by hand."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output
    except AttributeError:
        return None


def _scope() -> dict[str, Any]:
    output = running_scope()
    if output is None:
        return {}
    from torch._dynamo.guards import _get_closure_vars  # the functions that an expression may call

    return {**_get_closure_vars(), "L": output.local_scope, "G": output.global_scope}


def _way(source: Source, scope: dict[str, Any], known: dict[str, object]) -> Iterator[Place]:
    bases = []
    while scope and getattr(source, "base", None) is not None:
        source = source.base  # type: ignore[attr-defined]
        bases.append(source)
    for base in reversed(bases):
        text = source_text(base)
        if text not in known:
            known[text] = _evaluate(text, scope)
        value = known[text]
        if isinstance(value, nn.Module):
            yield Place(base, value)


def _evaluate(text: str, scope: dict[str, Any]) -> object:
    try:
        return eval(text, scope)
    except Exception:  # an expression of Dynamo's own, such as that of a temporary: no object of the user's
        return None
