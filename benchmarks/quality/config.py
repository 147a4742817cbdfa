"""What a run is: frozen values, and flags for a command line made from them.

The three GEMMs of a linear, with X [M, K], W [N, K], Y [M, N]:

    output       Y  = X  W1^T + b      W1: the weights in the mask of `Recipe.mask`
    grad_input   dX = dY W2            W2: see `Recipe.grad_input`
    grad_weight  dW = dY^T X           straight through to the stored weight, unless `Recipe.grad_weight` says otherwise
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, fields, replace

CHOICES = {
    "mask": ("none", "optimal", "greedy", "rows", "soft_rows", "soft_tile"),
    "grad_input": ("same", "dense", "columns", "optimal", "mvue"),
    "grad_weight": ("dense", "masked", "mvue"),
    "float8": ("none", "pow2", "tensorwise", "rowwise", "rowwise_with_gw_hp"),
    "linears": ("all", "mlp", "no_down"),
    "blocks": ("all", "inner"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a named linear is computed while the recipe is on."""

    mask: str = "none"
    """Of W1. "optimal", "greedy": transposable 4x4 tiles, as `sparse_pass.mask24`. "rows": the two largest of four
    along K. "soft_rows": S-STE (Hu et al., arXiv 2409.09099), soft threshold at the third largest of four along K.
    "soft_tile": the optimal mask, soft threshold at the largest magnitude that it drops in the tile."""

    grad_input: str = "same"
    """W2. "same": W1. "dense": W. "columns": the two largest of four along N. "optimal": the transposable mask.
    "mvue": W, and dY is replaced by its 2:4 estimate with groups along N."""

    grad_weight: str = "dense"
    """"masked": no gradient for dropped weights. "mvue": dY is replaced by its minimum-variance unbiased 2:4 estimate,
    groups along M (Chmiel et al., arXiv 2203.10991)."""

    beta: float | str = 1.0
    """A factor of each sparse weight. "norm": |W| / |S(W)| of each layer, fixed when the recipe starts. "mse": what
    brings beta S(W) nearest to W, fixed (S-STE). "dynamic": "norm", anew in every step."""

    decay: float = 0.0
    """SR-STE (Zhou et al., arXiv 2102.04010): `decay` W is added to the gradient of dropped weights."""

    kept: float = 1.0
    """A factor of the gradient of kept weights (xformers' `sparsify24_ste`: mul1)."""

    dropped: float = 1.0
    """A factor of the gradient of dropped weights (mul0)."""

    refresh: int = 1
    """Choose a new mask every so many steps."""

    float8: str = "none"
    """Which operands are rounded to 8 bits; see `estimators.FLOAT8`. The mask is that of the stored weight."""

    def __post_init__(self) -> None:
        _check(self)
        if isinstance(self.beta, str) and self.beta not in ("norm", "mse", "dynamic"):
            raise ValueError(f"beta={self.beta!r}: expected a number, norm, mse or dynamic")
        if self.float8 != "none" and self.mask.startswith("soft"):
            raise ValueError(f"mask={self.mask!r} with float8={self.float8!r}: the order of the two is not defined")
        if self.refresh > 1 and self.mask.startswith("soft"):
            raise ValueError(f"refresh={self.refresh} with mask={self.mask!r}: a soft threshold has no mask to keep")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A run. Runs with equal values give equal results, but for the order of additions on a GPU."""

    name: str = "dense"
    seed: int = 0
    """Of the initial weights and the batches: runs of one seed share both."""

    size: str = "default"
    """A label of `runs.SIZES`; the next fields are what counts."""

    dim: int = 512
    layers: int = 8
    heads: int = 8
    context: int = 512
    batch: int = 48
    steps: int = 1500

    lr: float = 1e-3
    warmup: int = 100
    """Steps from zero to the full learning rate."""

    cooldown: float = 0.25
    """The last share of the steps, over which the learning rate falls to zero along a line."""

    weight_decay: float = 0.1
    clip: float = 1.0

    start: float = 0.0
    """The share of the steps after which the recipe starts."""

    stop: float = 1.0
    """The share of the steps after which it stops; dense before and after."""

    float8_outside: bool = False
    """Before and after, all but the sparsity stays: named linears in `Recipe.float8`."""

    linears: str = "all"
    """Which linears of a block are named. "mlp": both of the MLP. "no_down": all but its second."""

    blocks: str = "all"
    """"inner": not those of the first and the last block."""

    recipe: Recipe = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        _check(self)
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(f"start={self.start}, stop={self.stop}: expected 0 <= start <= stop <= 1")
        if self.dim % self.heads or self.context * self.batch % 4:
            raise ValueError("dim must be a multiple of heads, and context * batch of 4")

    def recipe_at(self, step: int) -> Recipe:
        if round(self.start * self.steps) <= step < round(self.stop * self.steps):
            return self.recipe
        return Recipe(float8=self.recipe.float8) if self.float8_outside else Recipe()

    def learning_rate(self, step: int) -> float:
        falling = max(1.0, self.cooldown * self.steps)
        return self.lr * min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / falling)


def _check(values: Recipe | Config) -> None:
    for entry in fields(values):
        value = getattr(values, entry.name)
        if entry.name in CHOICES and value not in CHOICES[entry.name]:
            raise ValueError(f"{entry.name}={value!r}: expected one of {', '.join(CHOICES[entry.name])}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for each field of `Config` and of its recipe."""
    for default in (Config(), Recipe()):
        for entry in fields(default):
            value = getattr(default, entry.name)
            flag = f"--{entry.name.replace('_', '-')}"
            if isinstance(value, bool):
                parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value)
            elif not isinstance(value, Recipe):
                kind = _beta if entry.name == "beta" else type(value)
                parser.add_argument(flag, type=kind, choices=CHOICES.get(entry.name), default=value)


def from_flags(args: argparse.Namespace) -> Config:
    recipe = Recipe(**{entry.name: getattr(args, entry.name) for entry in fields(Recipe)})
    plain = {entry.name: getattr(args, entry.name) for entry in fields(Config) if entry.name != "recipe"}
    return Config(**plain, recipe=recipe)


def to_flags(config: Config) -> list[str]:
    """The flags that differ from their defaults: `from_flags` of them is the same config."""
    flags = []
    for values, default in ((config, Config()), (config.recipe, Recipe())):
        for entry in fields(values):
            value = getattr(values, entry.name)
            if isinstance(value, Recipe) or value == getattr(default, entry.name):
                continue
            flag = entry.name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                flags += [f"--{flag}", str(value)]
    return flags


def from_json(record: dict) -> Config:
    """The inverse of `dataclasses.asdict`; fields that were added later take their defaults."""
    known = {entry.name for entry in fields(Config)} - {"recipe"}
    return replace(
        Config(**{name: value for name, value in record.items() if name in known}), recipe=Recipe(**record["recipe"])
    )


def key(config: Config) -> str:
    """What two runs have in common that need not be done twice."""
    values = asdict(config)
    del values["name"], values["size"]
    return repr(sorted(values.pop("recipe").items())) + repr(sorted(values.items()))


def _beta(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
