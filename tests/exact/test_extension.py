"""What it takes to add to the package from outside of it: each test does so in a few places, which it counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_cusparselt import FakeCusparselt
from fake_gpu import CudaIsTheCpu, device_operators
from support import errors, run
from torch import Tensor, nn

import sparse_pass as sp
from sparse_pass.kernels import backends, probe
from sparse_pass.ops import cuda
from sparse_pass.vocabulary import PRODUCTS, Form

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the device itself is there")

BFLOAT16 = torch.bfloat16

# A packed layout, in three places: how it is packed, how it is multiplied, and that there is one.

called: Counter[str] = Counter()


def pack(masked: Tensor) -> Tensor:
    """As only a library knows it: the indices of what is kept, two bits each, and behind them the values."""
    called["pack"] += 1
    groups = masked.reshape(-1, 4)
    index = (groups != 0).to(torch.int8).topk(2).indices
    places = (index[:, 0] | index[:, 1] << 2).to(torch.uint8).view(-1, 2)
    indices = (places[:, 0] | places[:, 1] << 4).view(masked.dtype)
    return torch.cat([indices, groups.gather(1, index).flatten()])


def unpack(packed: Tensor, rows: int) -> Tensor:
    indices, values = packed.split([packed.numel() // 9, packed.numel() * 8 // 9])
    halves = indices.view(torch.uint8)
    places = torch.stack([halves & 15, halves >> 4], dim=1).flatten()
    index = torch.stack([places & 3, places >> 2], dim=1).long()
    return packed.new_zeros(len(index), 4).scatter_(1, index, values.view(-1, 2)).view(rows, -1)


def multiply(form: Form, dense: Tensor, packed: Tensor, n: int, bias: Tensor | None, tuned: bool) -> Tensor:
    called[form] += 1
    a, spec = unpack(packed, n), PRODUCTS[form]
    assert all(size % 8 == 0 for size in dense.shape)
    assert a.shape[1] % 64 == 0
    d = a.float() @ (dense.T if spec.b_transposed else dense).float()
    d = (d if bias is None else d + bias[:, None]).to(dense.dtype)
    return d.T.contiguous() if spec.d_transposed else d


TOY = backends.Backend(name="toy", pack=pack, multiply=multiply, dtypes=(BFLOAT16,))


@pytest.fixture
def toy(library: FakeCusparselt, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device for which this layout alone is right, and whose operators get what a CPU's would."""
    called.clear()
    monkeypatch.setattr(backends, "BACKENDS", (replace(TOY, name="broken", pack=lambda x: pack(x.roll(1, 1))), TOY))
    monkeypatch.setattr(probe, "_backend", probe._backend.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    with CudaIsTheCpu():
        found = probe.backend(torch.device("cuda"), BFLOAT16)
    monkeypatch.setattr(cuda, "backend_of", lambda device, dtype: found)
    monkeypatch.setattr(cuda, "_has_triton", lambda device: False)
    with device_operators():
        yield


def test_a_layout_is_tried_like_the_others(toy: None) -> None:
    assert cuda.backend_of(torch.device("cuda"), BFLOAT16) is TOY
    assert called == {"pack": 12, "linear": 12}
    with CudaIsTheCpu():
        assert probe.availability(torch.device("cuda"), BFLOAT16) == ""
        assert "no 2:4 kernels for torch.float16" in probe.availability(torch.device("cuda"), torch.float16)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sin(self.up(x)))


@pytest.mark.parametrize("rows", [64, 13])
def test_a_layout_trains(toy: None, rows: int) -> None:
    """A step with 2:4 weights, gradients and inputs, beside the same with dense matmuls."""
    torch.manual_seed(0)
    model = Mlp().bfloat16()
    x = torch.randn(rows, 64, dtype=BFLOAT16, requires_grad=True)
    parameters, results = dict(model.named_parameters()), []
    for backend in ("cusparselt", "masked_dense"):
        called.clear()
        config: dict[str, Any] = {
            "up": sp.WeightSparsity(backend=backend, grad_weight="mvue"),
            "down": sp.ActivationSparsity(backend=backend),
        }
        torch._dynamo.reset()
        torch.manual_seed(1)
        compiled = torch.compile(model, backend=sp.sparse_backend(config, model=model, inner="aot_eager"))
        results.append(run(compiled, parameters, [x]))
        if backend == "cusparselt":
            assert called == {"pack": 5, "linear": 2, "grad_weight": 1, "input": 1, "input_grad_weight": 1}
        else:
            assert called == {}
    found = errors(*results)
    assert max(found.values()) < 2e-2, found
