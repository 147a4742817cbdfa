"""Compiled code calls the kernels themselves; where they need more than a call, the ops. On a CPU: the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import errors, fresh_compile, run, ste_reference, twins
from torch import nn
from torch._inductor.utils import run_and_get_code

import sparse_pass as sp

KERNELS = sp.WeightSparsity(backend="cusparselt")
BFLOAT16 = 2e-2


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def calls(model: nn.Module, x: torch.Tensor, **how: object) -> tuple[int, int, int, int]:
    """Train one step right, and count in forward and backward code: direct linears and sparsifies, those by the op."""
    config = {"up": KERNELS, "down": KERNELS}
    reference = ste_reference(model, config)
    with fresh_compile():
        compiled = torch.compile(model, backend=sp.sparse_backend(config), **how)
        actual, code = run_and_get_code(lambda: run(compiled, dict(model.named_parameters()), [x]))
    found = errors(actual, run(reference, twins(model, reference), [x]))
    assert max(found.values()) < BFLOAT16, found
    text = "\n".join(code)
    linear, sparsify = (text.count(f"ops.sparse_pass.{name}.default(") for name in ("linear", "sparsify"))
    return text.count("reference.linear_into("), text.count("reference.sparsify("), linear, sparsify


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Mlp().bfloat16()


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize("shape", [(16, 64), (2, 8, 64)], ids=str)
def test_direct_calls(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert calls(model, leaf(*shape)) == (4, 2, 0, 0)


def test_rows_that_must_be_padded_go_through_the_op(model: nn.Module) -> None:
    assert calls(model, leaf(12, 64)) == (0, 2, 4, 0)


def test_rows_of_unknown_number_go_through_the_op(model: nn.Module) -> None:
    assert calls(model, leaf(16, 64), dynamic=True) == (0, 2, 4, 0)


def test_rows_known_to_be_a_multiple(model: nn.Module) -> None:
    """A dynamic batch of sequences of 8: M = 8 * s0."""
    x = leaf(3, 8, 64)
    torch._dynamo.mark_dynamic(x, 0)
    assert calls(model, x) == (4, 2, 0, 0)


def test_operands_in_any_strides(model: nn.Module) -> None:
    """The kernels want their rows contiguous; a transposed weight is read as it lies."""
    model.up.weight = nn.Parameter(model.up.weight.detach().t().contiguous().t())
    assert calls(model, leaf(16, 128).detach()[:, ::2].requires_grad_()) == (4, 2, 0, 0)


def test_code_from_a_cache(model: nn.Module, tmp_path: Path) -> None:
    """It imports what it calls: nothing is lowered where it is loaded."""
    script = (
        "import torch, sparse_pass as sp\n"
        "from torch import nn\n"
        "from torch._dynamo.utils import counters\n"
        "model = nn.Linear(64, 64).bfloat16()\n"
        "torch.manual_seed(0)\n"
        "backend = sp.sparse_backend({'weight': sp.WeightSparsity(backend='cusparselt')}, model=model)\n"
        "torch.compile(model, backend=backend)(torch.randn(8, 64, dtype=torch.bfloat16)).sum().backward()\n"
        "print(counters['aot_autograd']['autograd_cache_hit'])\n"
    )
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_VEC_ISA_OK": "0"}
    hits = []
    for _ in range(2):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        hits.append(done.stdout.split()[0])
    assert hits == ["0", "1"]
