"""What is known of a graph that Dynamo captured: names of its parameters, and the part of the model that it is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule

from .dynamo.functions import held_by_functions
from .dynamo.names import input_names, parameter_shardings, read_names
from .dynamo.nested import sharing_parameters
from .dynamo.regions import Region, guard_region
from .dynamo.sources import Input, is_compiled_backward, is_optimizer_step, parameter_inputs
from .fqn import Pattern
from .graph.parameters import Names


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """One graph of Dynamo."""

    names: Names
    inputs: tuple[Input, ...]
    """Those that may be parameters."""
    region: Region

    @property
    def roots(self) -> list[nn.Module]:
        """The modules that the frame holds, through which the parameters are reached; each once."""
        return list({id(one.way[0].module): one.way[0].module for one in self.inputs if one.way}.values())


def captured(graph_module: GraphModule, model: nn.Module | None, patterns: Sequence[Pattern] = ()) -> Captured:
    """Look at a graph as Dynamo hands it to a backend.

    Args:
        model: the whole that names are names in.
        patterns: guard a part of the model that they do not treat as they treat another part of its class.
    """
    inputs = tuple(parameter_inputs(graph_module))
    known = input_names(graph_module, inputs, model)
    region = guard_region(inputs, model, patterns) if model is not None and patterns else Region()
    by_input = {index: region.own(names) for index, names in known.by_input.items()}
    held = held_by_functions()
    reason = getattr(graph_module, "compile_subgraph_reason", None)
    names = Names(
        by_input=by_input,
        by_attribute=known.by_attribute,
        read=read_names(graph_module, by_input),
        eager_backward=frozenset(
            name for one in inputs if id(one.value) in held for name in by_input.get(one.index, ())
        ),
        sharing=sharing_parameters(graph_module, by_input, patterns),
        of_model=model is None or known.of_model,
        with_gradients=torch.is_grad_enabled(),
        ours=not (is_optimizer_step(graph_module) or is_compiled_backward(inputs)),
        last_graph=not (reason is not None and reason.graph_break),
        shardings=parameter_shardings(graph_module, inputs),
        checked=model is not None,
    )
    return Captured(names, inputs, region)
