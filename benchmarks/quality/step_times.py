"""What a step by a recipe takes, as a share of a dense bfloat16 step: measured where it could be, else put together.

Figures of one H100 in one run, torch 2.11, bfloat16, every block compiled, forward, backward and fused AdamW, 16,384
tokens a step: "1B" is 24 layers of d=2048, h=8192; "8B" is 6 layers of d=4096, h=14336. From
benchmarks/results/h100/float8.md; "tensorwise" and "rowwise" are those of torchao 0.18.
"""

from __future__ import annotations

from config import Config, Recipe

STEP_MS = {
    "1B": {"dense": 316.7, "w24": 273.6, "w24_mvue": 258.6, "tensorwise": 264.4, "rowwise": 325.3,
           "float8_w24": 253.1, "float8_w24_mvue": 213.3},
    "8B": {"dense": 256.8, "w24": 210.9, "w24_mvue": 192.9, "tensorwise": 178.9, "rowwise": 218.2,
           "float8_w24": 180.4, "float8_w24_mvue": 139.7},
}  # fmt: skip
GEMM_US = {"dense": 2950, "float8": 1569, "float8_w24": 1066}
"""Sustained, M, K, N = 16384, 4096, 14336: what a step with 2:4 float8 weights saves is scaled by them to one with
dense float8 weights and power-of-two scales, which has no step time yet."""


def step_time(config: Config, model: str) -> tuple[float, bool] | None:
    """The mean over the steps of a run, dense = 1, and whether nothing in it is an estimate; None if unknown."""
    steps = range(config.steps)
    kinds = {config.recipe_at(step) for step in steps}
    times = {recipe: _share(recipe, config, model) for recipe in kinds}
    if None in times.values():
        return None
    mean = sum(times[config.recipe_at(step)][0] for step in steps) / config.steps
    return mean, all(measured for _, measured in times.values())


def _share(recipe: Recipe, config: Config, model: str) -> tuple[float, bool] | None:
    ms = STEP_MS[model]
    named = _named(config)
    if recipe.float8 not in ("none", "pow2"):
        if recipe.float8 not in ms or recipe.mask != "none" or "mvue" in (recipe.grad_input, recipe.grad_weight):
            return None
        return 1 - named * (1 - ms[recipe.float8] / ms["dense"]), named == 1
    w24 = "float8_w24" if recipe.float8 == "pow2" else "w24"
    both, grad_weight = 1 - ms[w24] / ms["dense"], (ms[w24] - ms[f"{w24}_mvue"]) / ms["dense"]
    saved, measured = 0.0, True
    for sparse in (_sparse_output(recipe), _sparse_grad_input(recipe)):
        if recipe.float8 == "pow2" and not sparse:
            saved += both / 2 * (GEMM_US["dense"] - GEMM_US["float8"]) / (GEMM_US["dense"] - GEMM_US["float8_w24"])
            measured = False
        elif sparse:
            # What a 2:4 dY costs to make is in the measured saving of grad_weight, and alike for grad_input.
            saved += grad_weight if recipe.grad_input == "mvue" and recipe.mask == "none" else both / 2
    if recipe.grad_weight == "mvue":
        saved += grad_weight
    sparse = _sparse_output(recipe), _sparse_grad_input(recipe), recipe.grad_weight == "mvue"
    dense = (False,) * 3
    measured &= sparse in (dense, (True, True, False), (True, True, True)) and (named == 1 or not any(sparse))
    measured &= recipe.refresh == 1 and not recipe.mask.startswith("soft")
    return 1 - named * saved, measured


def _sparse_output(recipe: Recipe) -> bool:
    return recipe.mask != "none"


def _sparse_grad_input(recipe: Recipe) -> bool:
    """W2 is 2:4 along N, or dY is."""
    transposable = recipe.mask in ("optimal", "greedy", "soft_tile")
    return recipe.grad_input in ("columns", "optimal", "mvue") or (recipe.grad_input == "same" and transposable)


def _named(config: Config) -> float:
    """The share of the multiplications in linears of blocks that is in named ones."""
    linears = {"all": 1.0, "mlp": 8 / 12, "no_down": 8 / 12}[config.linears]
    return linears * ((config.layers - 2) / config.layers if config.blocks == "inner" else 1.0)
