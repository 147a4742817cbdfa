"""DistributedDataParallel, FSDP2 and the training loop around them, on two and four ranks: losses and gradients.

Each composition is held to one process that trains with straight-through masks written by hand. See `ranks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from ranks import CONFIG, DIM, NAMED, Network, Reference, batch, check, loss_of, network, own
from support import TOLERANCE, relative_error
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel

import sparse_pass as sp
from sparse_pass.backend import SparseBackend


def backend_for(model: nn.Module, *, strict: bool = False) -> SparseBackend:
    return sp.sparse_backend(CONFIG, model=model, inner="aot_eager", strict=strict)


def data_parallel(run: Callable[[Tensor], Tensor]) -> Callable[[int], Tensor]:
    """A step on this rank's part of the batch."""

    def step(number: int) -> Tensor:
        x, classes = map(own, batch(number))
        loss = loss_of(run(x), classes)
        loss.backward()
        return loss

    return step


# DistributedDataParallel


def ddp(**options: Any) -> None:
    model = network()
    backend = backend_for(model)
    wrapped = DistributedDataParallel(model, **options)
    check(wrapped, backend, data_parallel(torch.compile(wrapped, backend=backend)))


def ddp_buckets() -> None:
    """Dynamo splits the graph where DDP's buckets end."""
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000):
        ddp(bucket_cap_mb=0.002)


def ddp_blocks() -> None:
    model = network()
    backend = backend_for(model)
    for block in model.blocks:
        block.compile(backend=backend)
    wrapped = DistributedDataParallel(model)
    check(wrapped, backend, data_parallel(wrapped))


class Extra(Network):
    """With a parameter that no step reads."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(DIM, DIM)


def ddp_find_unused() -> None:
    torch.manual_seed(0)
    model = Extra()
    model.load_state_dict(network().state_dict(), strict=False)
    backend = backend_for(model)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    check(wrapped, backend, data_parallel(torch.compile(wrapped, backend=backend)))


def ddp_no_sync() -> None:
    """Two micro-steps that accumulate one gradient."""
    model = network()
    backend = backend_for(model)
    wrapped = DistributedDataParallel(model)
    compiled = torch.compile(wrapped, backend=backend)

    def step(number: int) -> Tensor:
        parts = [one.chunk(2) for one in map(own, batch(number))]
        losses = []
        for micro, (x, classes) in enumerate(zip(*parts, strict=True)):
            with wrapped.no_sync() if micro == 0 else nullcontext():
                losses.append(loss_of(compiled(x), classes) / 2)
                losses[-1].backward()
        return sum(losses)  # type: ignore[return-value]

    check(wrapped, backend, step)


def ddp_compiled_autograd() -> None:
    model = network()
    backend = backend_for(model)
    wrapped = DistributedDataParallel(model)
    with torch._dynamo.config.patch(compiled_autograd=True, optimize_ddp="python_reducer"):
        check(wrapped, backend, data_parallel(torch.compile(wrapped, backend=backend)))


# FSDP2


def fsdp2(
    model: Network | None = None, *, blocks: bool = False, strict: bool = False, **options: Any
) -> tuple[Network, SparseBackend, Any]:
    """The sharded model, compiled: as a whole, or block by block."""
    model = model or network()
    for part in (*model.blocks, model):
        fully_shard(part, **options)
    backend = backend_for(model, strict=strict)
    if not blocks:
        return model, backend, torch.compile(model, backend=backend)
    for block in model.blocks:
        block.compile(backend=backend)
    return model, backend, model


def fsdp2_whole() -> None:
    """With a fused optimizer, clip_grad_norm_, and an average of the weights."""
    model, backend, run = fsdp2()
    averages = [parameter.detach().clone() for parameter in model.parameters()]  # FSDP2 has no copy of a module

    def before() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        torch._foreach_lerp_(averages, list(model.parameters()), 0.1)

    fused = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    check(model, backend, data_parallel(run), Reference(clip=0.1), optimizer=fused, before_step=before)


def fsdp2_blocks() -> None:
    model, backend, run = fsdp2(blocks=True, reshard_after_forward=False)
    foreach = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    check(model, backend, data_parallel(run), optimizer=foreach)


def fsdp2_offload() -> None:
    model, backend, run = fsdp2(blocks=True, offload_policy=CPUOffloadPolicy(pin_memory=False))
    check(model, backend, data_parallel(run))


def fsdp2_hybrid() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model, backend, run = fsdp2(mesh=mesh)
    check(model, backend, data_parallel(run))


def checkpointed(which: Iterable[int], **options: Any) -> Network:
    model = network()
    for place in which:
        model.blocks[place] = checkpoint_wrapper(model.blocks[place], **options)
    return model


def fsdp2_checkpoint_full() -> None:
    model, backend, run = fsdp2(checkpointed((0, 1)))
    check(model, backend, data_parallel(run))


def fsdp2_checkpoint_every_second() -> None:
    model, backend, run = fsdp2(checkpointed((0,)), blocks=True)
    check(model, backend, data_parallel(run))


def fsdp2_checkpoint_selective() -> None:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    saved = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    model = checkpointed((0, 1), context_fn=lambda: create_selective_checkpoint_contexts(saved))
    model, backend, run = fsdp2(model, blocks=True)
    check(model, backend, data_parallel(run))


# A whole step in one graph


def whole_step_gathers() -> None:
    """Parameters as shards, gathered in the graph; the backward scatters their gradients."""
    model, group = network(), dist.group.WORLD
    names = list(dict(model.named_parameters()))

    def step(shards: list[Tensor], x: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        gathered = [all_gather_tensor_autograd(one, 0, group) for one in shards]
        loss = loss_of(functional_call(model, dict(zip(names, gathered, strict=True)), (x,)), classes)
        return loss, *torch.autograd.grad(loss, shards)

    shards = [own(one.detach()).clone().requires_grad_() for one in model.parameters()]
    given = tuple(map(own, batch(0)))
    graph = make_fx(step, tracing_mode="fake")(shards, *given)
    report = sp.rewrite(graph, CONFIG, parameters=names)
    assert sorted(site.fqn for site in report.sites) == NAMED
    with torch.no_grad():
        loss, *gradients = graph(shards, *given)
    dist.all_reduce(loss)
    wanted, expected = Reference().steps()[0]
    assert abs(float(loss) / dist.get_world_size() - wanted) < TOLERANCE[torch.float32]
    for name, gradient in zip(names, gradients, strict=True):
        assert relative_error(gradient / dist.get_world_size(), own(expected[name])) < TOLERANCE[torch.float32], name


TWO = {
    "ddp-buckets": ddp_buckets,
    "ddp-static-graph": lambda: ddp(static_graph=True),
    "ddp-blocks": ddp_blocks,
    "ddp-find-unused": ddp_find_unused,
    "ddp-no-sync": ddp_no_sync,
    "ddp-compiled-autograd": ddp_compiled_autograd,
    "fsdp2-whole": fsdp2_whole,
    "fsdp2-blocks": fsdp2_blocks,
    "fsdp2-offload": fsdp2_offload,
    "fsdp2-checkpoint-full": fsdp2_checkpoint_full,
    "fsdp2-checkpoint-every-second": fsdp2_checkpoint_every_second,
    "fsdp2-checkpoint-selective": fsdp2_checkpoint_selective,
    "whole-step-gathers": whole_step_gathers,
}
FOUR = {"fsdp2-hybrid": fsdp2_hybrid}
