"""Whose mask training uses where weights are stored in float32 and multiplied in 16 bits: `prune_` must find the same.

The mask is that of the tensor which the compiled code is given as the parameter. See `ranks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ranks import CONFIG, Reference, batch, check, gradients_of, loss_of, network, own, whole
from support import TOLERANCE
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparse_pass as sp

DIM = 64
"""Of 2048 tiles about one in 250 has another mask once it is rounded to bfloat16."""
MASKED = {"blocks.*.fc*": sp.WeightSparsity(grad_weight="masked")}
NAMED = [f"blocks.{block}.{layer}.weight" for block in range(2) for layer in ("fc1", "fc2")]
Kept = dict[str, Tensor]


def kept_by_training(model: nn.Module, run: Callable[[Tensor], Tensor]) -> Kept:
    """What the masks keep of the named weights: the gradients are zero elsewhere."""
    x, classes = map(own, batch(0, DIM))
    loss_of(run(x), classes).backward()
    return {name: grad != 0 for name, grad in gradients_of(model).items() if name in NAMED}


def kept_by_pruning(model: nn.Module, **options: Any) -> Kept:
    sp.prune_(model, MASKED, **options)
    return {name: whole(model.get_parameter(name).detach()) != 0 for name in NAMED}


def is_of(trained: Kept, pruned: Kept) -> bool:
    """Whether training kept what pruning keeps. In 16 bits a few gradients cancel to zero where the mask keeps."""
    count = sum(int(kept.sum()) for kept in pruned.values())
    assert sum(int(kept.sum()) for kept in trained.values()) > 0.98 * count
    return not any((trained[name] & ~pruned[name]).any() for name in NAMED)


def fsdp2() -> None:
    """FSDP2 hands over the gathered weight, which it has rounded."""
    model = network(DIM)
    for part in (*model.blocks, model):
        fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    backend = sp.sparse_backend(MASKED, model=model, inner="aot_eager")
    trained = kept_by_training(model, torch.compile(model, backend=backend))
    metrics = sp.Metrics(model, MASKED, every=1)
    metrics.step()
    (layers,) = metrics.read().values()
    assert {values["dropped_gradient"] for values in layers.values()} == {0.0}
    assert is_of(trained, kept_by_pruning(network(DIM), dtype=torch.bfloat16))
    assert not is_of(trained, kept_by_pruning(network(DIM)))
    assert is_of(trained, kept_by_pruning(model)), "the sharded model itself knows its policy"


def ddp_autocast() -> None:
    """Autocast rounds inside of the graph: the mask is that of the stored weight."""
    model = network(DIM)
    backend = sp.sparse_backend(MASKED, model=model, inner="aot_eager")
    wrapped = DistributedDataParallel(model)
    compiled = torch.compile(wrapped, backend=backend)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return compiled(x)

    trained = kept_by_training(wrapped, run)
    assert is_of(trained, kept_by_pruning(network(DIM)))
    assert not is_of(trained, kept_by_pruning(network(DIM), dtype=torch.bfloat16))


def ddp_scaled() -> None:
    """float16 autocast with a gradient scaler: once unscaled, the gradients are those of the reference."""
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    backend = sp.sparse_backend(CONFIG, model=model, inner="aot_eager")
    wrapped = DistributedDataParallel(model)
    compiled = torch.compile(wrapped, backend=backend)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)

    def step(number: int) -> Tensor:
        x, classes = map(own, batch(number))
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(compiled(x), classes)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.update()
        return loss

    reference = Reference(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1), tolerance=TOLERANCE[torch.float16]
    )
    check(wrapped, backend, step, reference, optimizer=optimizer)


TWO = {"fsdp2-mixed-precision": fsdp2, "ddp-autocast": ddp_autocast, "ddp-scaled": ddp_scaled}
