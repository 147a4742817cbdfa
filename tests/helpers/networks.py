"""Small modules that tests of several files compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_pass.ops.reference import inputs as reference_inputs


class OwnLinear(torch.autograd.Function):
    """A linear whose backward its author wrote."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.T @ x


class Up(nn.Module):
    """One linear, with something before it, so that the backward has all three GEMMs."""

    def __init__(self, bias: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        self.up, self.checkpointed = nn.Linear(64, 128, bias), checkpointed

    def body(self, x: Tensor) -> Tensor:
        return self.up(x.sin())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)


class Conv1D(nn.Module):
    """As transformers has it in GPT-2: a linear with its weight stored [K, N]."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(k, n) / k**0.5), nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class Apply(nn.Module):
    """``function(x, w)``: any way to use a parameter, which is then named by its own name."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.w = function, nn.Parameter(torch.randn(*shape) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.cos(), self.w).sin()


Function = Callable[[Tensor, Tensor], Tensor]


class FusedMlp(nn.Module):
    """``down`` of a function of ``up``, and of a gate if it has one. Reads no more of the gate than there is."""

    def __init__(self, function: Function, gate: str = "none", bias: bool = False) -> None:
        super().__init__()
        self.function, self.kind = function, gate
        self.up = nn.Linear(64, 256 if gate == "chunk" else 128)
        if gate == "linear":
            self.gate = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias)
        self.rounded_once = ""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        gate = self.gate(x) if self.kind == "linear" else h
        if self.kind == "chunk":
            h, gate = h.chunk(2, -1)
        y = self.function(h, gate)
        if self.rounded_once:
            given = gate if self.kind != "none" else None
            y = y + (reference_inputs.activate(h, given, self.rounded_once) - y).detach()
        return self.down(y).sin()


def squared_relu(h: Tensor, _: Tensor) -> Tensor:
    return torch.relu(h).square()
