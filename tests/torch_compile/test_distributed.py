"""DistributedDataParallel and FSDP2 on one process: names hold, masks come from the live weight."""

from __future__ import annotations

import copy

import pytest
import torch
from stack import HAS_GLOO, NAMED, Stack
from torch import nn

import sparse_pass as sp

if not HAS_GLOO:
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

CONFIG = {"blocks.*.fc1": sp.WeightSparsity(), "blocks.1.fc2": sp.WeightSparsity()}


@pytest.fixture
def model(one_process):
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Stack()


def _expected(model: Stack, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the straight-through gradient of the last named weight."""
    pruned = copy.deepcopy(model)
    sp.prune_(pruned, CONFIG)
    out = pruned(x)
    out.sum().backward()
    return out.detach(), pruned.blocks[1].fc2.weight.grad


def _gradient(model: nn.Module) -> torch.Tensor:
    grad = next(p.grad for name, p in model.named_parameters() if name.endswith("blocks.1.fc2.weight"))
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def _check(model: nn.Module, run, backend, expected, x: torch.Tensor) -> None:
    for _ in range(2):
        model.zero_grad()
        out = run(x)
        out.sum().backward()
        torch.testing.assert_close(out.detach(), expected[0])
        torch.testing.assert_close(_gradient(model), expected[1])
    assert sorted({site.fqn for site in backend.report.sites}) == NAMED
    assert backend.report.unmatched == ()


@pytest.mark.parametrize("given", [True, False], ids=["model=", "no model="])
@pytest.mark.parametrize("order", ["compile(ddp)", "ddp(compile)"])
def test_ddp(model, given, order):
    x = torch.randn(4, 16)
    expected = _expected(model, x)
    backend = sp.sparse_backend(CONFIG, model=model if given else None, inner="aot_eager")
    if order == "compile(ddp)":
        wrapped = DistributedDataParallel(model)
        _check(wrapped, torch.compile(wrapped, backend=backend), backend, expected, x)
    else:
        model.compile(backend=backend)
        wrapped = DistributedDataParallel(model)
        _check(wrapped, wrapped, backend, expected, x)


@pytest.mark.parametrize("region", ["model", "blocks"])
def test_fsdp2(model, region):
    x = torch.randn(4, 16)
    expected = _expected(model, x)
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    backend = sp.sparse_backend(CONFIG, model=model, inner="aot_eager")
    if region == "model":
        _check(model, torch.compile(model, backend=backend), backend, expected, x)
    else:
        for block in model.blocks:
            block.compile(backend=backend)
        _check(model, model, backend, expected, x)
