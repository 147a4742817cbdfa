"""Pipelines on two ranks: one config for all stages, and the gradients of the whole. See `ranks`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from ranks import CONFIG, Network, Reference, batch, check_report, gradients_of, loss_of, network
from support import TOLERANCE, relative_error
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

import sparse_pass as sp

MICRO = 4


class Stage(nn.Module):
    """A part of a `Network`, under the names of the whole, as checkpoints want it."""

    def __init__(self, whole: Network, blocks: tuple[int, ...], *, head: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(place): whole.blocks[place] for place in blocks})
        self.head = whole.head if head else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None else self.head(x)


NAMED = {0: ["blocks.0.fc1"], 1: ["blocks.1.fc1", "blocks.1.fc2"]}
"""By block."""


def pipeline(kind: Any, parts: dict[int, tuple[tuple[int, ...], bool]]) -> None:
    """Train by a schedule.

    Args:
        parts: blocks and head of each stage, those of rank 0 being the even ones.
    """
    rank, whole = dist.get_rank(), network()
    modules = {place: Stage(whole, blocks, head=head) for place, (blocks, head) in parts.items() if place % 2 == rank}
    backends, stages = {}, []
    for place, module in modules.items():
        backends[place] = sp.sparse_backend(CONFIG, model=module, whole=whole, strict=True, inner="aot_eager")
        module.compile(backend=backends[place])
        stages.append(PipelineStage(module, place, len(parts), torch.device("cpu")))
    schedule = kind(stages if len(stages) > 1 else stages[0], MICRO, loss_fn=loss_of)
    optimizer = torch.optim.AdamW([one for module in modules.values() for one in module.parameters()], lr=1e-2)
    for number, (loss, expected) in enumerate(Reference().steps()):
        optimizer.zero_grad()
        x, classes = batch(number)
        losses: list[Tensor] = []
        given = (x,) if 0 in modules else ()
        schedule.step(*given, **({"target": classes, "losses": losses} if len(parts) - 1 in modules else {}))
        if losses:
            assert abs(float(torch.stack(losses).detach().mean()) - loss) < 10 * TOLERANCE[torch.float32]
        found: dict[str, Tensor] = {}
        for module in modules.values():
            found.update(gradients_of(module))
        assert set(found) == {name for name in expected if any(has(module, name) for module in modules.values())}
        errors = {name: relative_error(grad, expected[name]) for name, grad in found.items()}
        assert max(errors.values()) < 10 * TOLERANCE[torch.float32], errors
        optimizer.step()
    for place, backend in backends.items():
        if named := [name for block in parts[place][0] for name in NAMED[block]]:
            check_report(backend, named)
        else:
            assert backend.report.sites == ()


def has(module: nn.Module, name: str) -> bool:
    return name in dict(module.named_parameters())


HALVES = {0: ((0,), False), 1: ((1,), True)}
QUARTERS = {0: ((0,), False), 1: ((), False), 2: ((1,), False), 3: ((), True)}

TWO = {
    "gpipe": lambda: pipeline(ScheduleGPipe, HALVES),
    "1f1b": lambda: pipeline(Schedule1F1B, HALVES),
    "interleaved": lambda: pipeline(ScheduleInterleaved1F1B, QUARTERS),
}
