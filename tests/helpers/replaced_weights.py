"""The ways in which a program gives a model other weights. Models here have a linear called ``up``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def copy_in_place(model: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), other.parameters(), strict=True):
            parameter.copy_(value)


def replace_data(model: nn.Module, other: nn.Module) -> None:
    for parameter, value in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = value.detach().clone()


def transpose_data(model: nn.Module, other: nn.Module) -> None:
    """New values, and other strides."""
    model.up.weight.data = other.up.weight.detach().t().contiguous().t()


def replace_parameter(model: nn.Module, other: nn.Module) -> None:
    model.up.weight = nn.Parameter(other.up.weight.detach().clone())


def replace_module(model: nn.Module, other: nn.Module) -> None:
    model.up = other.up


REPLACED: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "load_state_dict": lambda model, other: model.load_state_dict(other.state_dict()),
    "assign": lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    "copy": copy_in_place,
    "data": replace_data,
    "strides": transpose_data,
    "parameter": replace_parameter,
    "module": replace_module,
}
