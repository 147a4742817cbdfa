"""Metrics of masks, against what is written out by hand; and the check of pruned weights."""

from __future__ import annotations

import copy
import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stack import Stack
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparse_pass as sp

W24, GREEDY = sp.WeightSparsity(), sp.WeightSparsity(mask="greedy")
NAMES = ["flip_rate", "kept_magnitude", "kept_square", "dropped_gradient"]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.ones(4, 16)).square().sum().backward()


def by_hand(weight: Tensor, gradient: Tensor | None, mask: Tensor, last: Tensor | None) -> dict[str, float]:
    w, numel = weight.detach().double(), weight.numel()
    dropped = math.nan
    if gradient is not None:
        g = gradient.double()
        dropped = math.sqrt(g[~mask].square().sum().item() / g.square().sum().item())
    return {
        "flip_rate": math.nan if last is None else (mask != last).sum().item() / numel,
        "kept_magnitude": w[mask].abs().sum().item() / w.abs().sum().item(),
        "kept_square": w[mask].square().sum().item() / w.square().sum().item(),
        "dropped_gradient": dropped,
    }


def test_values() -> None:
    """Every second step; the mask of the last measurement counts, not that of the step before."""
    model = network()
    config = {"0": W24, "2": GREEDY}
    metrics = sp.Metrics(torch.compile(model), config, every=2)
    wanted: dict[int, dict[str, Any]] = {}
    last: dict[str, Tensor] = {}
    for step in range(5):
        backward(model)
        if step == 4:
            model[2].weight.grad = None
        assert metrics.step() == (step % 2 == 0)
        if step % 2 == 0:
            masks = {name: sp.mask24(model[int(name)].weight, scheme.mask) for name, scheme in config.items()}
            wanted[step] = {
                name: by_hand(model[int(name)].weight, model[int(name)].weight.grad, mask, last.get(name))
                for name, mask in masks.items()
            }
            last = masks
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    found = metrics.read()
    assert list(found) == [0, 2, 4]
    for step, layers in wanted.items():
        assert list(found[step]) == ["0", "2"]
        for name, values in layers.items():
            assert list(found[step][name]) == NAMES
            assert found[step][name] == pytest.approx(values, rel=1e-5, nan_ok=True), (step, name)
    assert 0 < found[2]["0"]["flip_rate"] < 1
    assert math.isnan(found[4]["2"]["dropped_gradient"])
    assert metrics.read() == {}


class Writer:
    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars[tag, global_step] = scalar_value


def test_files(tmp_path: Path) -> None:
    """A head once, a row per step and layer; steps may be numbered by the caller, as after a resume."""
    model, writer, path = network(), Writer(), tmp_path / "masks.csv"
    metrics = sp.Metrics(model, {"0": W24, "2": W24}, every=1)
    found = {}
    for step in (7, None):
        backward(model)
        metrics.step(step)
        found |= metrics.read(csv=path, writer=writer)
    with path.open() as file:
        head, *rows = csv.reader(file)
    assert head == ["step", "layer", *NAMES]
    assert [row[:2] for row in rows] == [["7", "0"], ["7", "2"], ["8", "0"], ["8", "2"]]
    assert rows[0][2] == ""
    assert [float(cell) for cell in rows[3][2:]] == list(found[8]["2"].values())
    assert writer.scalars["flip_rate/0", 8] == 0.0
    assert writer.scalars["kept_magnitude/2", 7] == found[7]["2"]["kept_magnitude"]
    assert len(writer.scalars) == 2 * 2 * 4 - 2, "all but the two flip rates that there are not"


def test_left_out() -> None:
    """Told once, and not measured."""
    model = nn.Sequential(nn.Linear(16, 30), nn.Linear(30, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    config = {"re:[01]": W24, "2": (W24, sp.ActivationSparsity()), "3": W24}
    metrics = sp.Metrics(model, config)
    with pytest.warns(UserWarning, match="sparse_pass: Metrics leaves out '0': .*; '1': .*; '2': .* dense weight"):
        metrics.step()
    metrics.step(50)
    assert [list(layers) for layers in metrics.read().values()] == [["3"], ["3"]]
    assert list(metrics.skipped) == ["0", "1", "2"]


def test_refused_metrics() -> None:
    with pytest.raises(ValueError, match=r"Metrics\(every=0\): expected a number of steps"):
        sp.Metrics(network(), {"0": W24}, every=0)
    with pytest.raises(ValueError, match="'1' names no linear weight"):
        sp.Metrics(network(), {"1": W24})


@pytest.mark.usefixtures("one_process")
def test_sharded_parameters() -> None:
    """FSDP2, on one rank: the part is the whole, in metrics and in the check of weights."""
    model, config = Stack(), {"blocks.*.fc1": W24}
    whole, x = copy.deepcopy(model), torch.randn(4, 16)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    found = []
    for one in (whole, model):
        metrics = sp.Metrics(one, config)
        one(x).square().sum().backward()
        metrics.step()
        found.append(metrics.read()[0])
        with pytest.raises(ValueError, match=r"3 of 3 named .* 'blocks\.0\.fc1' has .* in row 0, columns 0 to 3"):
            sp.verify24(one, config)
    sharded, wanted = found[1], found[0]
    assert list(sharded) == [f"blocks.{i}.fc1" for i in range(3)]
    for name, values in wanted.items():
        assert sharded[name] == pytest.approx(values, nan_ok=True)


def test_parts_that_cut_tiles() -> None:
    from sparse_pass.ops.shards import why_not_whole_tiles

    assert why_not_whole_tiles(torch.ones(8, 12)) == ""
    assert "its part here is [6, 8], which cuts the 4x4 tiles" in why_not_whole_tiles(torch.ones(6, 8))


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    model = network().cuda()
    metrics = sp.Metrics(model, {"0": W24, "2": W24}, every=1)
    x = torch.ones(4, 16, device="cuda")
    for step in range(3):  # kernels are loaded in the first one
        model.zero_grad()
        model(x).square().sum().backward()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            metrics.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    values = by_hand(model[0].weight, model[0].weight.grad, sp.mask24(model[0].weight), sp.mask24(model[0].weight))
    assert metrics.read()[2]["0"] == pytest.approx(values, rel=1e-4)


# verify24


def pruned(config: dict[str, Any]) -> nn.Sequential:
    model = network()
    sp.prune_(model, config)
    return model


@pytest.mark.parametrize("scheme", [W24, GREEDY], ids=str)
def test_pruned_weights_pass(scheme: sp.WeightSparsity) -> None:
    config = {"*": scheme}
    model = pruned(config)
    report = sp.verify24(model, config)
    assert [(site.fqn, site.status) for site in report.sites] == [("0", "sparse"), ("2", "sparse")]
    assert report == sp.prune_(model, config)


def nonzeros(*places: tuple[int, int], value: float = 1.0) -> Tensor:
    matrix = torch.zeros(16, 32)
    for place in places:
        matrix[place] = value
    return matrix


BAD = [
    pytest.param(nonzeros((5, 8), (5, 10), (5, 11)), r"\[1\.0, 0\.0, 1\.0, 1\.0\] in row 5, columns 8 to 11", id="row"),
    pytest.param(nonzeros((4, 9), (5, 9), (7, 9)), r"\[1\.0, 1\.0, 0\.0, 1\.0\] in column 9, rows 4 to 7", id="column"),
    pytest.param(
        nonzeros(*[(0, i) for i in (28, 29, 31)], value=math.nan),
        r"\[nan, nan, 0\.0, nan\] in row 0, columns 28 to 31",
        id="NaN",
    ),
    pytest.param(nonzeros((3, 6), (3, 7), (3, 8), (3, 9)), "", id="groups start at multiples of 4"),
    pytest.param(nonzeros((6, 3), (7, 3), (8, 3), (9, 3)), "", id="of rows too"),
]


@pytest.mark.parametrize(("weight", "message"), BAD)
def test_groups(weight: Tensor, message: str) -> None:
    config = {"*": W24}
    model = pruned(config)
    model[2].weight.data = weight
    if not message:
        sp.verify24(model, config)
        return
    with pytest.raises(ValueError, match=rf"1 of 2 named weight\(s\) are not 2:4: '2' has {message}\. Call prune_"):
        sp.verify24(model, config)


def test_only_named_weights_are_checked() -> None:
    model = network()
    sp.prune_(model, {"0": W24})
    report = sp.verify24(model, {"0": W24, "2": sp.ActivationSparsity()})
    assert [(site.fqn, site.status) for site in report.sites] == [("0", "sparse"), ("2", "skipped")]
    with pytest.raises(ValueError, match="'0' is on the meta device: load its data before verify24"):
        sp.verify24(network().to("meta"), {"0": W24})


def test_safetensors(tmp_path: Path) -> None:
    """What is saved and loaded again is what was pruned, and passes."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = pruned({"*": W24}).to(torch.bfloat16)
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    other = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).to(torch.bfloat16)
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    sp.verify24(other, {"*": W24})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semi_structured_tensors(dtype: torch.dtype) -> None:
    """torch's own class takes pruned weights, of either direction, and multiplies by them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256)).to("cuda", dtype)
    sp.prune_(model, {"0": W24})
    sp.verify24(model, {"0": W24})
    x = torch.randn(64, 128, device="cuda", dtype=dtype)
    wanted = model(x)
    weight = model[0].weight.detach()
    model[0].weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)
    torch.testing.assert_close(model(x), wanted, rtol=2e-2, atol=2e-2)
    packed = torch.sparse.to_sparse_semi_structured(weight.t().contiguous())
    torch.testing.assert_close(packed.to_dense(), weight.t(), rtol=0, atol=0)
