"""The model of the distributed tests, and whether they can run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

HAS_GLOO = dist.is_available() and dist.is_gloo_available()

NAMED = ["blocks.0.fc1", "blocks.1.fc1", "blocks.1.fc2", "blocks.2.fc1"]
"""What ``blocks.*.fc1`` and ``blocks.1.fc2`` name in a `Stack`."""


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))


class Stack(nn.Module):
    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x
