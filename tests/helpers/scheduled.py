"""What tests of schedules name in a `stack.Stack`, and what is to be computed then."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

import sparse_pass as sp

CONFIG = {"blocks.*.fc1": sp.WeightSparsity(), "blocks.1.fc2": sp.WeightSparsity(mask="greedy")}
FC1 = [f"blocks.{i}.fc1" for i in range(3)]


def straight_through(model: nn.Module, x: Tensor, masked: Mapping[str, str]) -> Tensor:
    """What the model computes with these layers masked, each by its mask; by hand, and eager."""
    weights = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in masked}
    replaced = {}
    for (name, weight), mask in zip(weights.items(), masked.values(), strict=True):
        kept = torch.where(sp.mask24(weight, mask), weight, torch.zeros_like(weight))
        replaced[name] = weight + (kept - weight).detach()
    return functional_call(model, replaced, (x,))
