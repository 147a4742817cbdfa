"""Tensor, sequence and context parallelism, alone and below FSDP2, on two and four ranks: losses and gradients.

See `ranks`, and `data_parallel` for what only splits the batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import CONFIG, DIM, W24, Network, Reference, batch, check, loss_of, network, own, whole
from support import ste_reference
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F

import sparse_pass as sp
from sparse_pass.backend import SparseBackend

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


def by_block() -> None:
    model = tensor_parallel(network(), line())
    backend, run = compiled(model, blocks=True)
    check(model, backend, all_of_the_batch(run))


def with_sequence_parallel(model: Network, mesh: DeviceMesh) -> Network:
    for block in model.blocks:
        parallelize_module(block, mesh, sequence_plan())
    parallelize_module(model, mesh, {"head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())})
    # The residual stream is a plain tensor of this rank's tokens. As a DTensor it could not be added to what fc2 gives.
    first = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True)
    return parallelize_module(model, mesh, {"blocks.0": first})


def sequence_blocks() -> None:
    model = with_sequence_parallel(network(), line())
    backend, run = compiled(model, blocks=True)
    check(model, backend, all_of_the_batch(run))


def whole_and_loss_parallel() -> None:
    """Logits that stay split by class."""
    model = tensor_parallel(network(), line())
    parallelize_module(model, line(), {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)})
    backend, run = compiled(model)

    def step(number: int) -> Tensor:
        x, classes = batch(number)
        with loss_parallel():
            loss = F.cross_entropy(run(x).flatten(0, 1), classes.flatten())
            loss.backward()
        return whole(loss)

    check(model, backend, step)
    told = {site.fqn: (site.shape, site.shard_of) for site in backend.report.sites}
    assert told["blocks.1.fc1"] == ((32, 16, 16), "[32, 16], rows in 2 over mesh dim 'tp'")
    assert told["blocks.1.fc2"] == ((32, 16, 16), "[16, 32], columns in 2 over mesh dim 'tp'")


def refused() -> None:
    """A dim that the mesh splits inside of a tile: one answer on all ranks, an error or a skipped layer."""
    x, _ = batch(0, 12)
    told = []
    for name in ("head", "hea*"):
        model = nn.Sequential(OrderedDict(head=nn.Linear(12, 12)))
        parallelize_module(model, line(), {"head": ColwiseParallel(output_layouts=Replicate())})
        backend = sp.sparse_backend({name: W24}, model=model, inner="aot_eager")
        run = torch.compile(model, backend=backend)
        if name == "head":
            with pytest.raises(Exception, match="cannot sparsify") as error:
                run(x)
            told.append(str(error.value))
        else:
            run(x)
            (site,) = backend.report.sites
            assert (site.status, site.shape) == ("skipped", (32, 6, 12))
            told.append(site.reason)
    rule = (
        "the weight is [12, 12], and mesh dim 'tp' splits it into 2 shards of 6 rows: 2:4 masks need the dims of every"
        " shard to be multiples of 4; pad the layer to a multiple of 8 or leave it dense (map it to None)"
    )
    assert all(rule in one for one in told), told


class Attending(nn.Module):
    """A layer of one head over the tokens of all ranks, of which each rank has its part."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.group is not None:
            k, v = (all_gather_tensor_autograd(one.contiguous(), 1, self.group) for one in (k, v))
        return x + self.out(torch.softmax(q @ k.mT, -1) @ v)


def context_parallel() -> None:
    """Keys and values gathered; torch's own ring attention has no CPU kernels."""
    config, group = {"qkv": W24, "out": W24}, dist.group.WORLD
    torch.manual_seed(0)
    model = Attending(group)
    plain = Attending()
    plain.load_state_dict(model.state_dict())
    backend = sp.sparse_backend(config, model=model, inner="aot_eager")
    run = torch.compile(model, backend=backend)

    def step(number: int) -> Tensor:
        x, classes = (own(one, 1) for one in batch(number))
        loss = loss_of(run(x), classes)
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        return loss

    check(model, backend, step, Reference(ste_reference(plain, config)), named=["out", "qkv"])


# Below FSDP2


def grid() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def sharded(model: Network, mesh: DeviceMesh) -> Network:
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh["dp"])
    return model


def part_of_the_batch(mesh: DeviceMesh, run: Callable[[Tensor], Tensor]) -> Callable[[int], Tensor]:
    def step(number: int) -> Tensor:
        x, classes = (one.chunk(2)[mesh["dp"].get_local_rank()] for one in batch(number))
        loss = loss_of(run(x), classes)
        loss.backward()
        return loss

    return step


def fsdp2_blocks() -> None:
    mesh = grid()
    model = sharded(tensor_parallel(network(), mesh["tp"]), mesh)
    backend, run = compiled(model, blocks=True)
    check(model, backend, part_of_the_batch(mesh, run))


def fsdp2_sequence_whole() -> None:
    mesh = grid()
    model = sharded(with_sequence_parallel(network(), mesh["tp"]), mesh)
    backend, run = compiled(model)
    check(model, backend, part_of_the_batch(mesh, run))


def masks_of_shards() -> None:
    """Whatever holds a weight, its mask is the part of the whole one."""
    mesh = grid()
    for shape in ((32, 16), (20, 8), (36, 24)):
        torch.manual_seed(1)
        weight = torch.randn(shape)
        for placements in ([Shard(0), Shard(0)], [Shard(1), Shard(0)], [Replicate(), Shard(0)], [Replicate()] * 2):
            given = distribute_tensor(weight, mesh, placements)
            mask = sp.mask24(given)
            assert mask.placements == given.placements
            assert torch.equal(mask.to_local(), distribute_tensor(sp.mask24(weight), mesh, placements).to_local())
    with pytest.raises(ValueError, match=r"\[18, 8\]"):
        sp.mask24(distribute_tensor(torch.randn(18, 8), mesh, [Shard(0), Replicate()]))
    for dim in (16, 20, 8):  # 2 * dim rows: the last two are split inside of tiles
        model, plain = sharded(tensor_parallel(network(dim), mesh["tp"]), mesh), network(dim)
        sp.prune_(plain, CONFIG)
        assert sp.prune_(model, CONFIG).sites == sp.prune_(network(dim), CONFIG).sites
        for name, parameter in plain.named_parameters():
            assert torch.equal(whole(model.get_parameter(name).detach()), parameter), name


TWO = {
    "tp-blocks": by_block,
    "tp-sequence-blocks": sequence_blocks,
    "tp-loss-parallel": whole_and_loss_parallel,
    "context-parallel": context_parallel,
    "tp-refused": refused,
}
FOUR = {
    "fsdp2-tp-blocks": fsdp2_blocks,
    "fsdp2-tp-sequence-whole": fsdp2_sequence_whole,
    "masks-of-shards": masks_of_shards,
}
