"""The byte GPT of examples/train_gpt.py, with linears that `weights.Weights` prepares. Residuals are float32."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from estimators import Linear
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = Linear(dim, 3 * dim), Linear(dim, dim)
        self.fc1, self.fc2 = Linear(dim, 4 * dim), Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, length, dim]."""
        batch, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, dim))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    """Tokens [batch, context + 1] -> their mean next-byte loss in nats.

    dtype: of the GEMMs; what autocast would leave in float32 is float32.
    """

    def __init__(self, layers: int, dim: int, heads: int, context: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.token, self.position = nn.Embedding(256, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Parameter(torch.empty(256, dim))
        self.loss = self._loss
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Two branches a block add up: keep the variance of their sum independent of depth.
                residual = name.endswith(("proj.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def compile_parts(self, backend: str) -> None:
        """One graph for all blocks, and one for the loss."""
        for block in self.blocks:
            block.compile(backend=backend, dynamic=False)
        self.loss = torch.compile(self._loss, backend=backend, dynamic=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens[:, :-1]) + self.position.weight
        for block in self.blocks:
            x = block(x)
        return self.loss(x, tokens[:, 1:])

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(self.norm(x).to(self.dtype), self.head.to(self.dtype))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def choose(model: GPT, linears: str, blocks: str) -> tuple[list[Linear], list[Linear]]:
    """The linears that `Config.linears` and `Config.blocks` name, and the others."""
    names = {"all": ("qkv", "proj", "fc1", "fc2"), "mlp": ("fc1", "fc2"), "no_down": ("qkv", "proj", "fc1")}[linears]
    named: list[Linear] = []
    others: list[Linear] = []
    for number, block in enumerate(model.blocks):
        outer = number in (0, len(model.blocks) - 1)
        for name, part in block.named_children():
            if isinstance(part, Linear):
                (named if name in names and not (outer and blocks == "inner") else others).append(part)
    return named, others
