"""What a model does besides its linears, by operations and bytes: enough to say how much of a step they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils.flop_counter import FlopCounterMode

from .gpus import Gpu

# Of an H100 and an H200, from the steps in benchmarks/results that docs/performance.md takes apart.
_ATTENTION = 400e6
"""FLOPs a microsecond of flash attention with long sequences, and the length at which it reaches half of that."""
_HALF_LENGTH = 300
_OTHER = 250e6
"""FLOPs a microsecond of convolutions and batched matmuls."""
_OPTIMIZER_SHARE = 0.7
"""Of the bandwidth of a copy that a fused AdamW reaches. It reads four tensors of each parameter and writes three."""
_OPTIMIZER_TENSORS = 7
_TRAFFIC = 3
"""How often the input and the output of a linear go through memory outside of it in a training step: each once in the
forward, which makes the input and reads the output; each gradient once, and once again what derivatives are made of."""


@dataclass(slots=True)
class Work:
    """Counts over the graphs of one call of a model."""

    attention_flops: float = 0.0
    attention_us: float = 0.0
    all_flops: float = 0.0
    """Of the forward, linears and attention included."""

    def counting(self, graph_module: GraphModule) -> Callable[..., Any]:
        """The forward of a graph of Dynamo, which counts when it is called."""
        for node in graph_module.graph.nodes:
            if node.target is torch.nn.functional.scaled_dot_product_attention:
                self._add_attention(node)

        def run(*args: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = graph_module.forward(*args)
            self.all_flops += counter.get_total_flops()
            return result

        return run

    def _add_attention(self, node: torch.fx.Node) -> None:
        query, key = (node.args[at].meta["example_value"].shape for at in (0, 1))  # type: ignore[union-attr]
        sizes = (*query, key[-2])
        if not all(isinstance(size, int) for size in sizes):
            return
        *batch, length, features = query
        flops = 4.0 * length * key[-2] * features
        for size in batch:
            flops *= size
        self.attention_flops += flops
        causal = node.kwargs.get("is_causal") or (len(node.args) > 5 and node.args[5])
        computed = flops / 2 if causal else flops
        self.attention_us += computed / (_ATTENTION * key[-2] / (key[-2] + _HALF_LENGTH))


def rest_us(
    work: Work, model: nn.Module, shapes: Sequence[tuple[Any, Any, Any]], element_size: int, gpu: Gpu, *, training: bool
) -> tuple[float, float]:
    """Microseconds of attention, and of all else that is no linear.

    Args:
        shapes: M, N and K of all linears that ran.
        element_size: bytes of an activation.
    """
    attention = work.attention_us * (3.5 if training else 1)  # the backward has five matmuls for the forward's two
    known = [shape for shape in shapes if all(isinstance(size, int) for size in shape)]
    linear_flops = sum(2.0 * m * n * k for m, n, k in known)
    other = max(0.0, work.all_flops - linear_flops - work.attention_flops) / _OTHER * (3 if training else 1)
    moved = sum(m * (n + k) for m, n, k in known)
    other += moved * element_size * (_TRAFFIC if training else 1) / gpu.copy
    if training:
        stored = sum(one.numel() * one.element_size() for one in model.parameters() if one.requires_grad)
        other += stored * _OPTIMIZER_TENSORS / (gpu.copy * _OPTIMIZER_SHARE)
    return attention, other
