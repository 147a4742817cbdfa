"""The runs of the comparison, in order of importance, and the sizes that they can be done at."""

from __future__ import annotations

from collections.abc import Iterator

from config import Config, Recipe

SIZES = {
    "default": {},  # 25.7M parameters, 36.9M tokens: 1.4 a parameter
    "mid": {"steps": 5240},  # 5 a parameter
    "long": {"steps": 20950},  # 20 a parameter
    "small": {"dim": 256, "layers": 6, "heads": 4, "context": 256, "batch": 64, "steps": 800},  # 4.9M, 2.7 a parameter
    "small_long": {"dim": 256, "layers": 6, "heads": 4, "context": 256, "batch": 64, "steps": 6000},  # 20 a parameter
    "tiny": {"dim": 64, "layers": 2, "heads": 2, "context": 64, "batch": 8, "steps": 20, "warmup": 5},  # for check.py
}

W24, BETA = {"mask": "optimal"}, {"mask": "optimal", "beta": "norm"}
MVUE, DENSE_MVUE = {"mask": "optimal", "grad_weight": "mvue"}, {"grad_weight": "mvue"}
ROWS = {"mask": "rows", "beta": "norm"}
TAIL = {"stop": 0.75}
HALF = {"batch_factor": 2, "step_factor": 0.5}

# name: (fields of the recipe, fields of the config). `step_factor` and `batch_factor` multiply those of the size.
# All of a name's runs have the same schedule; "dense" and "dense_batch2" at fewer steps make the curve that the others
# are held against, and are done for the first seed alone.
RUNS: dict[str, tuple[dict, dict]] = {
    "dense": ({}, {}),
    "w24_beta_tail25": (BETA, TAIL),
    "dense 0.9": ({}, {"step_factor": 0.9}),
    "w24": (W24, {}),
    "mvue_gw": (DENSE_MVUE, {}),
    "dense 0.8": ({}, {"step_factor": 0.8}),
    "w24_beta_decay_tail25": (BETA | {"decay": 1e-4}, TAIL),
    "w24_tail25": (W24, TAIL),
    "w24_beta": (BETA, {}),
    "float8_tensorwise": ({"float8": "tensorwise"}, {}),
    "float8_pow2": ({"float8": "pow2"}, {}),
    "sste": ({"mask": "soft_rows", "beta": "mse"}, {}),
    "float8_w24_beta_tail25": (BETA | {"float8": "pow2"}, TAIL | {"float8_outside": True}),
    "w24_decay_tail25": (W24 | {"decay": 1e-4}, TAIL),
    "mlp_beta_tail25": (BETA, TAIL | {"linears": "mlp"}),
    "dense 0.7": ({}, {"step_factor": 0.7}),
    "mvue_gw_tail25": (DENSE_MVUE, TAIL),
    "inner_beta_tail25": (BETA, TAIL | {"blocks": "inner"}),
    "no_down_beta_tail25": (BETA, TAIL | {"linears": "no_down"}),
    "w24_mvue_beta_tail25": (MVUE | {"beta": "norm"}, TAIL),
    "mvue_gi_gw": ({"grad_input": "mvue", "grad_weight": "mvue"}, {}),
    "rows_forward_beta_tail25": (ROWS | {"grad_input": "dense"}, TAIL),
    "rows_columns_beta_tail25": (ROWS | {"grad_input": "columns"}, TAIL),
    "mlp_beta_decay_tail25": (BETA | {"decay": 1e-4}, TAIL | {"linears": "mlp"}),
    "greedy_beta_tail25": (BETA | {"mask": "greedy"}, TAIL),
    "w24_beta_tail40": (BETA, {"stop": 0.6}),
    "w24_beta_tail15": (BETA, {"stop": 0.85}),
    "w24_dynamic_tail25": (W24 | {"beta": "dynamic"}, TAIL),
    "w24_beta_warm10_tail25": (BETA, {"start": 0.1, "stop": 0.75}),
    "w24_beta_decay3_tail25": (BETA | {"decay": 3e-4}, TAIL),
    "sste_tail25": ({"mask": "soft_rows", "beta": "mse"}, TAIL),
    "w24_mvue": (MVUE, {}),
    "w24_mvue_tail25": (MVUE, TAIL),
    "mvue_gi_gw_tail25": ({"grad_input": "mvue", "grad_weight": "mvue"}, TAIL),
    "mlp_mvue_beta_tail25": (MVUE | {"beta": "norm"}, TAIL | {"linears": "mlp"}),
    "float8_rowwise": ({"float8": "rowwise"}, {}),
    "float8_rowwise_gw_hp": ({"float8": "rowwise_with_gw_hp"}, {}),
    "float8_mvue_gw": (DENSE_MVUE | {"float8": "pow2"}, {}),
    "w24_beta_refresh10_tail25": (BETA | {"refresh": 10}, TAIL),
    "w24_beta_refresh100_tail25": (BETA | {"refresh": 100}, TAIL),
    "w24_beta_dropped0.5_tail25": (BETA | {"dropped": 0.5}, TAIL),
    "w24_beta_dropped2_tail25": (BETA | {"dropped": 2.0}, TAIL),
    "w24_beta_masked_tail25": (BETA | {"grad_weight": "masked"}, TAIL),
    "soft_tile": ({"mask": "soft_tile", "beta": "mse"}, {}),
    "rows_beta": (ROWS, {}),
    "rows_forward_beta": (ROWS | {"grad_input": "dense"}, {}),
    "w24_beta_tail25_cooldown40": (BETA, TAIL | {"cooldown": 0.4}),
    "w24_beta_tail10_cooldown10": (BETA, {"stop": 0.9, "cooldown": 0.1}),
    "dense_cooldown40": ({}, {"cooldown": 0.4}),
    "dense_cooldown10": ({}, {"cooldown": 0.1}),
    "dense_batch2": ({}, HALF),
    "dense_batch2 0.9": ({}, HALF | {"step_factor": 0.45}),
    "mvue_gw_batch2": (DENSE_MVUE, HALF),
    "w24_beta_batch2_tail25": (BETA, HALF | TAIL),
    "w24_mvue_beta_batch2_tail25": (MVUE | {"beta": "norm"}, HALF | TAIL),
}


def configs(size: str, seeds: int) -> Iterator[Config]:
    """All runs, seed after seed."""
    for seed in range(seeds):
        for name, (recipe, changes) in RUNS.items():
            if seed == 0 or " " not in name:
                yield config(name, recipe, changes, size, seed)


def config(name: str, recipe: dict, changes: dict, size: str, seed: int) -> Config:
    values = SIZES[size] | changes
    base = Config(**SIZES[size])
    values["steps"] = round(base.steps * values.pop("step_factor", 1))
    values["batch"] = base.batch * values.pop("batch_factor", 1)
    return Config(**values, name=name.split()[0], seed=seed, size=size, recipe=Recipe(**recipe))
