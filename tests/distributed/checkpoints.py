"""Distributed checkpoints of sparse training: dense, named as the model, for any other layout. See `ranks`."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from data_parallel import backend_for, data_parallel, fsdp2
from ranks import network, whole
from tensor_parallel import all_of_the_batch, compiled, line, tensor_parallel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer, options=FLAT)
    return {"model": model_state, "optimizer": optimizer_state}


def loaded(folder: str, model: nn.Module) -> torch.optim.Optimizer:
    optimizer = adamw(model)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(model, optimizer, **parts, options=FLAT)
    return optimizer


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = state_of(model, optimizer)
    return {
        name: whole(value).detach().clone()
        for part in state.values()
        for name, value in part.items()
        if isinstance(value, Tensor)
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def round_trip() -> None:
    folders = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folders)
    (folder,) = folders
    model, _, run = fsdp2()
    step, optimizer = data_parallel(run), adamw(model)
    step(0)
    optimizer.step()
    optimizer.zero_grad()
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    saved = whole_state(model, optimizer)
    assert {name for name in saved if "." in name and not name.startswith("state.")} == set(network().state_dict())
    expected = step(1)

    # Into a sharded model of other numbers, which goes on as if nothing had been. Its backend is strict: loading takes
    # a step of the optimizer, and that is none of training.
    again, _, run = fsdp2(blocks=True, strict=True)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1.0)
    other = loaded(folder, again)
    assert same(whole_state(again, other), saved)
    assert torch.equal(data_parallel(run)(1), expected)

    # Into one that is split otherwise, and into a plain one.
    torch._dynamo.reset()  # or their other number of rows would be a symbol, which takes twice as long to trace
    split = tensor_parallel(network(), line())
    assert same(whole_state(split, loaded(folder, split)), saved)
    _, run = compiled(split)
    torch.testing.assert_close(mean(all_of_the_batch(run)(1)), mean(expected))
    plain = network()
    assert same(whole_state(plain, loaded(folder, plain)), saved)
    run = torch.compile(plain, backend=backend_for(plain))
    torch.testing.assert_close(mean(all_of_the_batch(run)(1)), mean(expected))


def mean(loss: Tensor) -> Tensor:
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


TWO = {"checkpoint-round-trip": round_trip}
