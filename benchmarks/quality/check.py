"""Check the estimators against the package and against their definitions, and run a small sweep from end to end.

Run it as `python benchmarks/quality/check.py`, where sparse_pass can be imported: one to two minutes on a CPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads OpenMP

import data
import torch
import torch.nn.functional as F
from config import Config, Recipe, from_json, key
from estimators import Linear, mvue24
from masks import find_mask, soften
from runs import configs
from torch import Tensor, nn
from torch.nn.utils import parametrize
from train import Run
from weights import Weights

import sparse_pass as sp

HERE = Path(__file__).parent


def masks_are_those_of_the_package() -> None:
    for dtype in (torch.float32, torch.float64):
        weight = torch.randn(256, 512, dtype=dtype)
        for kind in ("optimal", "greedy"):
            assert torch.equal(find_mask(weight, kind), sp.mask24(weight, kind)), (dtype, kind)


def masks_along_one_dim_keep_the_two_largest() -> None:
    weight = torch.randn(64, 128)
    largest = weight.abs().view(64, 32, 4).topk(2, dim=-1).indices
    expected = torch.zeros(64, 32, 4, dtype=torch.bool).scatter_(-1, largest, True).view(64, 128)
    assert torch.equal(find_mask(weight, "rows"), expected)
    assert torch.equal(find_mask(weight.T.contiguous(), "columns"), expected.T)
    assert find_mask(torch.ones(4, 8), "rows").sum() == 16, "ties"


def soft_thresholds() -> None:
    weight = torch.randn(64, 128)
    soft, kept = soften(weight, "soft_rows")
    threshold = weight.abs().view(64, 32, 4).sort(dim=-1).values[..., 1:2]
    expected = weight.view(64, 32, 4).sign() * (weight.abs().view(64, 32, 4) - threshold).relu()
    assert torch.equal(soft, expected.view(64, 128))
    assert torch.equal(kept, soft != 0)
    near, _ = soften(weight + 1e-4 * torch.randn_like(weight), "soft_rows")
    assert (near - soft).abs().max() < 2e-3, "continuous"
    tiles, kept = soften(weight, "soft_tile")
    assert not (kept & ~sp.mask24(weight)).any()
    assert (tiles.abs() < weight.abs()).all()


def gradients_are_unbiased_and_of_least_variance() -> None:
    values = torch.randn(8, 6) * torch.logspace(-3, 3, 6)
    values[:4, 0], values[:4, 1] = torch.tensor([0.0, 2, 0, -3]), torch.tensor([100.0, 1, 1, -1])
    seeds = torch.randint(2**31 - 1, (20000, 1), dtype=torch.int32)
    draws = torch.stack([mvue24(values, seed) for seed in seeds]).double()
    assert ((draws.view(-1, 2, 4, 6) != 0).sum(2) <= 2).all()
    assert torch.equal(draws[0, :4, 0].float(), values[:4, 0]), "two nonzeros stay"
    assert (draws[:, 0, 1] == 100).all(), "so does one that exceeds the sum of the others"
    # p_i = min(a_i / h, 1), adding up to 2: only the largest can be cut off.
    group = values.double().view(2, 4, 6).abs()
    total, largest = group.sum(1, keepdim=True), group.amax(1, keepdim=True)
    p = (group / torch.minimum(total / 2, total - largest)).clamp(max=1)
    variance = (group**2 * (1 / p - 1)).nan_to_num(0).view(8, 6)
    error = (draws.mean(0) - values).abs()
    assert (error <= 5 * (variance / len(seeds)).sqrt() + 1e-6 * values.abs()).all()
    assert torch.allclose(draws.var(0), variance, rtol=0.1, atol=1e-9)


class _StraightThrough(nn.Module):
    def __init__(self, beta: Tensor) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, weight: Tensor) -> Tensor:
        sparse = self.beta * weight * sp.mask24(weight)
        return weight + (sparse - weight).detach()


def _linear(recipe: Recipe, dtype: torch.dtype, inputs: int = 32, outputs: int = 64) -> tuple[Linear, Weights]:
    linear = Linear(inputs, outputs).to(dtype)
    nn.init.normal_(linear.weight)
    weights = Weights([linear], [], dtype)
    weights.begin(recipe)
    weights.prepare()
    return linear, weights


def gradients_are_those_of_a_parametrization() -> None:
    linear, _ = _linear(Recipe(mask="optimal", beta="norm"), torch.float64)
    plain = nn.Linear(32, 64, dtype=torch.float64)
    plain.load_state_dict(linear.state_dict())
    weight = linear.weight.detach()
    beta = weight.norm() / (weight * sp.mask24(weight)).norm()
    assert 1.05 < beta < 1.15
    parametrize.register_parametrization(plain, "weight", _StraightThrough(beta))
    x = torch.randn(3, 16, 32, dtype=torch.float64)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = linear(one), plain(two)
    # beta is a float32 in the harness
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    y.square().sum().backward()
    expected.square().sum().backward()
    pairs = (one, two), (linear.weight, plain.parametrizations.weight.original), (linear.bias, plain.bias)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-5)


def each_gemm_reads_what_its_recipe_says() -> None:
    x, dy = torch.randn(16, 32, dtype=torch.float64, requires_grad=True), torch.randn(16, 64, dtype=torch.float64)
    for kind in ("dense", "columns", "optimal", "mvue"):
        recipe = Recipe(mask="rows", grad_input=kind, grad_weight="mvue", decay=0.5, kept=2, dropped=3)
        linear, weights = _linear(recipe, torch.float64)
        w, x.grad = linear.weight.detach().clone(), None
        mask = find_mask(w, "rows")
        y = linear(x)
        torch.testing.assert_close(y, F.linear(x, w * mask))
        y.backward(dy)
        second = w if kind in ("dense", "mvue") else w * find_mask(w, kind)
        estimate = mvue24(dy.T, linear.seed + 1).T if kind == "mvue" else dy
        assert (estimate != dy).any() == (kind == "mvue")
        torch.testing.assert_close(x.grad, estimate @ second)
        weights.process_gradients()
        expected = mvue24(dy, linear.seed).T @ x.detach() * torch.where(mask, 2, 3) + 0.5 * w * ~mask
        torch.testing.assert_close(linear.weight.grad, expected)


def masks_stay_for_refresh_steps() -> None:
    linear, weights = _linear(Recipe(mask="optimal", refresh=3), torch.float32)
    first = weights.masks()[0].clone()
    same = []
    for _ in range(3):
        linear.weight.data.normal_()
        weights.prepare()
        same.append(torch.equal(weights.masks()[0], first))
    assert same == [True, True, False]


def float8_is_that_of_torchao() -> None:
    if importlib.util.find_spec("torchao") is None:
        print("  torchao is not installed: not compared")
        return
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
        linear, _ = _linear(Recipe(float8=recipe), torch.float32)
        theirs = nn.Sequential(nn.Linear(32, 64))
        theirs[0].load_state_dict(linear.state_dict())
        how = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
        theirs = convert_to_float8_training(theirs, config=how)
        x = torch.randn(48, 32)
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        dy = torch.randn(48, 64)
        y, expected = linear(one), theirs(two)
        y.backward(dy)
        expected.backward(dy)
        pairs = (y, expected), (one.grad, two.grad), (linear.weight.grad, theirs[0].weight.grad)
        for ours, other in pairs:
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def float8_of_2_to_4_weights_is_exact_in_bfloat16() -> None:
    linear, _ = _linear(Recipe(mask="optimal", float8="pow2"), torch.float32)
    weight = linear.weight.detach()
    scale = 2 ** torch.floor(torch.log2(448 / weight.abs().max()))
    eight = (weight * scale).to(torch.float8_e4m3fn).float() / scale
    expected = eight * sp.mask24(weight)
    assert torch.equal(linear.for_output, expected)
    assert torch.equal(expected.bfloat16().float(), expected)


def compiled_is_eager() -> None:
    """Captured by Dynamo and AOTAutograd; Inductor is left out, as it takes minutes on a small machine."""
    with tempfile.TemporaryDirectory() as cache:
        text = data.load(Path(cache), 1)
        config = Config(dim=32, layers=3, heads=2, context=32, batch=4, steps=6, warmup=2, stop=0.5, blocks="inner")
        for recipe in (
            Recipe(mask="optimal", beta="norm", grad_weight="mvue", decay=1e-3),
            Recipe(mask="optimal", float8="pow2", grad_input="mvue"),
        ):
            losses = []
            for backend in (None, "aot_eager"):
                torch._dynamo.reset()
                run = Run(replace(config, recipe=recipe), text, torch.device("cpu"), backend)
                for step in range(config.steps):
                    run.step(step)
                losses.append(run.losses)
            torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


def configs_survive_flags_and_json() -> None:
    names = set()
    for config in configs("default", 2):
        assert from_json(asdict(config)) == config
        names.add(key(config))
    assert len(names) == len(list(configs("default", 2))), "two runs are the same"


def a_sweep_from_end_to_end() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE / "sweep.py"), "--out", folder, "--cache", folder, "--megabytes", "1"]
        command += ["--size", "tiny", "--jobs", "2"]
        command += ["--only", "dense", "w24_beta_decay_tail25", "mvue_gi_gw", "float8_w24*", "--", "--no-compile"]
        first = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        assert "0 failed" in first, first
        again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "7 runs are done, 0 to do" in again, again
        table = [sys.executable, str(HERE / "table.py"), "--runs", f"{folder}/runs.jsonl", "--out", folder]
        shown = subprocess.run(table, capture_output=True, text=True, check=True).stdout
        assert "`w24_beta_decay_tail25`" in shown, shown
        assert all((Path(folder) / f"quality.{kind}").exists() for kind in ("md", "csv", "png"))


CHECKS = (
    masks_are_those_of_the_package,
    masks_along_one_dim_keep_the_two_largest,
    soft_thresholds,
    gradients_are_unbiased_and_of_least_variance,
    gradients_are_those_of_a_parametrization,
    each_gemm_reads_what_its_recipe_says,
    masks_stay_for_refresh_steps,
    float8_is_that_of_torchao,
    float8_of_2_to_4_weights_is_exact_in_bfloat16,
    compiled_is_eager,
    configs_survive_flags_and_json,
    a_sweep_from_end_to_end,
)


def main() -> None:
    for check in CHECKS:
        torch.manual_seed(0)
        print(check.__name__.replace("_", " "), flush=True)
        check()
    print(f"{len(CHECKS)} checks passed")


if __name__ == "__main__":
    main()
