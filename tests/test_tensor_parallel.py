"""Tensor, sequence and context parallelism, alone and below FSDP2, on two and four ranks: numbers of three steps.

See `ranks`, and `test_compositions` for what only splits the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import CONFIG, W24, Block, Network, batch, check, launch, loss_of, main, network
from torch import Tensor, nn

import sparse_pass as sp
from sparse_pass.backend import SparseBackend

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

PLAN = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}


def sequence_plan() -> dict[str, Any]:
    return {
        "norm": SequenceParallel(),
        "fc1": ColwiseParallel(input_layouts=Shard(1)),
        "fc2": RowwiseParallel(output_layouts=Shard(1)),
    }


def tensor_parallel(model: Network, mesh: DeviceMesh) -> Network:
    for block in model.blocks:
        parallelize_module(block, mesh, dict(PLAN))
    return model


def compiled(model: nn.Module, *, blocks: bool = False) -> tuple[SparseBackend, Callable[[Tensor], Tensor]]:
    backend = sp.sparse_backend(CONFIG, model=model, inner="aot_eager")
    if not blocks:
        return backend, torch.compile(model, backend=backend)
    for block in model.blocks:
        block.compile(backend=backend)
    return backend, model


def all_of_the_batch(run: Callable[[Tensor], Tensor]) -> Callable[[int], Tensor]:
    def step(number: int) -> Tensor:
        x, classes = batch(number)
        loss = loss_of(run(x), classes)
        loss.backward()
        return loss

    return step


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def whole_model() -> None:
    model = tensor_parallel(network(), line())
    backend, run = compiled(model)
    check(model, backend, all_of_the_batch(run))
    told = {site.fqn: (site.shape, site.shard_of) for site in backend.report.sites}
    assert told["blocks.1.fc1"] == ((32, 16, 16), "[32, 16], rows in 2 over mesh dim 'tp'")
    assert told["blocks.1.fc2"] == ((32, 16, 16), "[16, 32], columns in 2 over mesh dim 'tp'")


def by_block() -> None:
    model = tensor_parallel(network(), line())
    backend, run = compiled(model, blocks=True)
    check(model, backend, all_of_the_batch(run))


def with_sequence_parallel(model: Network, mesh: DeviceMesh) -> Network:
    for block in model.blocks:
        parallelize_module(block, mesh, sequence_plan())
    parallelize_module(model, mesh, {"head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())})
    # The residual stream is a plain tensor of this rank's tokens. As a DTensor it could not be added to what fc2 gives.
    first = PrepareModuleInput(
        input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
    )
    return parallelize_module(model, mesh, {"blocks.0": first})


def sequence_whole() -> None:
    model = with_sequence_parallel(network(), line())
    backend, run = compiled(model)
    check(model, backend, all_of_the_batch(run))


def sequence_blocks() -> None:
    model = with_sequence_parallel(network(), line())
    backend, run = compiled(model, blocks=True)
    check(model, backend, all_of_the_batch(run))


TWO = {"whole": whole_model, "blocks": by_block, "sequence-whole": sequence_whole, "sequence-blocks": sequence_blocks}

if __name__ == "__main__":
    main(TWO)
