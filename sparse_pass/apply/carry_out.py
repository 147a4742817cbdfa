"""Carry out the plan of a graph."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph

from ..plan.values import Plan
from .editor import Editor
from .float8 import RoundedOperands
from .gradients import estimate_gradients
from .inputs import Inputs
from .weights import Weights


def apply_plan(graph: Graph, plan: Plan, mode: FakeTensorMode) -> None:
    """Edit a graph in place. Gradients are masked first, where the captured GEMM gives them."""
    if all(linear.skipped for linear in plan.linears):
        return
    with mode, torch.no_grad():
        _apply(Editor(graph), plan)
    graph.lint()


def _apply(edit: Editor, plan: Plan) -> None:
    rounded = RoundedOperands(edit, plan)
    inputs, weights = Inputs(edit), Weights(edit, rounded)
    for linear in plan.linears:
        inputs.mask_gradients(linear.input)
    for linear in plan.linears:
        inputs.feed_dense(linear.input)
    for linear in plan.linears:
        weights.apply(linear.named.linear, linear.weight)
    for linear in plan.linears:
        estimate_gradients(edit, linear.grad_output, rounded)
    for linear in plan.linears:
        inputs.multiply(linear.input, linear.named.linear)
    edit.clean()
