"""Training steps in float8: dense bf16, torchao's float8, and 2:4 weights in bf16 and in float8, in one run.

    python benchmarks/float8.py                       # all models, some ten minutes on an H100
    python benchmarks/float8.py --models "Llama 1B"

All variants of a model share its parameters and take turns, each sustained and twice. Blocks are compiled one by one.
"""

from __future__ import annotations

import copy
import functools
import gc
import subprocess
import threading
from collections.abc import Callable
from statistics import median
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from end_to_end import Layer
from measure import arguments, bars, peak_gib, race, save, timed
from torch import nn

import sparse_pass as sp

LINEARS = {"Llama": "re:.*\\.(qkv|proj|gate|up|down)", "ViT": "re:blocks\\..*", "MLP": "re:.*fc[12]"}
SCHEMES = {
    "w24": sp.WeightSparsity(),
    "w24, mvue": sp.WeightSparsity(grad_weight="mvue"),
    "float8 w24": sp.WeightSparsity(precision="float8"),
    "float8 dense, mvue": sp.GradientSparsity(precision="float8"),
    "float8 w24, mvue": sp.WeightSparsity(precision="float8", grad_weight="mvue"),
}
RECIPES = {"torchao float8": "tensorwise", "torchao float8 rowwise": "rowwise"}
VARIANTS = ["dense", *RECIPES, *SCHEMES]


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def llama_1b() -> tuple[nn.Module, torch.Tensor]:
    """24 layers of dim 2048 and hidden 8192, 8 sequences of 2048."""
    return nn.Sequential(*(Layer(2048, 8192, 16) for _ in range(24))), torch.randn(8, 2048, 2048)


def llama_8b() -> tuple[nn.Module, torch.Tensor]:
    """6 of 32 layers of dim 4096 and hidden 14336, 8 sequences of 2048."""
    return nn.Sequential(*(Layer(4096, 14336, 32) for _ in range(6))), torch.randn(8, 2048, 4096)


def vit_l() -> tuple[nn.Module, torch.Tensor]:
    """timm's ViT-L/16, batch 128."""
    import timm

    return timm.create_model("vit_large_patch16_224", pretrained=False), torch.randn(128, 3, 224, 224)


def mlp(rows: int, dim: int, hidden: int) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    return lambda: (nn.Sequential(Mlp(dim, hidden)), torch.randn(rows, dim))


MODELS = {
    "Llama 1B": llama_1b,
    "Llama 8B, 6 layers": llama_8b,
    "ViT-L/16": vit_l,
    "MLP 16384x4096x14336": mlp(16384, 4096, 14336),
    "MLP 44160x1024x4096": mlp(44160, 1024, 4096),
    "MLP 4096x1024x4096": mlp(4096, 1024, 4096),
}


def variant(model: nn.Module, what: str, names: str) -> tuple[nn.Module, Any]:
    """A copy that shares the parameters, its blocks compiled; and the backend if there is one of ours."""
    shared = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    backend: Any = "inductor"
    if what in RECIPES:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        blocks = shared.blocks if hasattr(shared, "blocks") else shared
        convert_to_float8_training(blocks, config=Float8LinearConfig.from_recipe_name(RECIPES[what]))
    elif what in SCHEMES:
        backend = sp.sparse_backend({names: SCHEMES[what]}, model=shared)
    blocks = shared.blocks if hasattr(shared, "blocks") else shared
    for block in blocks:
        block.compile(backend=backend)
    return shared, backend


def watts(step: Callable[[], object], seconds: float) -> float:
    """Median of the power drawn while a step is repeated, W."""
    found: list[float] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.wait(0.1):
            command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-i", "0"]
            found.append(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout))

    asking = threading.Thread(target=ask)
    asking.start()
    once = median(timed(step, 3)) / 1e6
    timed(step, max(3, int(seconds / once)))
    ended.set()
    asking.join()
    return median(found[len(found) // 2 :]) if found else float("nan")


def measure(name: str, variants: list[str], seconds: float) -> list[dict[str, object]]:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    model, x = MODELS[name]()
    model, x = model.to("cuda", torch.bfloat16), x.to("cuda", torch.bfloat16).requires_grad_()
    with_optimizer = not name.startswith("MLP")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    target = torch.randn_like(model(x[:1]).float()).to(torch.bfloat16)

    def step(run: nn.Module) -> None:
        y = run(x)
        (y * target).sum().backward()
        if with_optimizer:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    names = LINEARS[name.split()[0].partition("-")[0]]
    made = {what: variant(model, what, names) for what in variants}
    steps = {what: functools.partial(step, run) for what, (run, _) in made.items()}
    times, peaks, power = race(steps, seconds), {}, {}
    for what, one in steps.items():
        peaks[what], power[what] = peak_gib(one), watts(one, seconds / 4)
    rows = []
    for what, us in times.items():
        backend = made[what][1]
        sites = backend.report.sites if what in SCHEMES else []
        row: dict[str, object] = {"model": name, "variant": what, "step ms": us / 1000}
        if "dense" in times:
            row["over dense"] = times["dense"] / us
        if theirs := [times[one] for one in RECIPES if one in times]:
            row["over torchao"] = min(theirs) / us
        row |= {"peak GiB": peaks[what], "W": power[what]}
        row["not sparse"] = "; ".join(sorted({site.reason for site in sites if site.status != "sparse"}))
        rows.append(row)
    print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)
    return rows


def profile(name: str, variants: list[str]) -> None:
    """GPU milliseconds of one step by kernel, to the terminal."""
    torch._dynamo.reset()
    model, x = MODELS[name]()
    model, x = model.to("cuda", torch.bfloat16), x.to("cuda", torch.bfloat16).requires_grad_()
    for what in variants:
        run, _ = variant(model, what, LINEARS[name.split()[0].partition("-")[0]])
        for _ in range(2):
            run(x).float().mean().backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            run(x).float().mean().backward()
            torch.cuda.synchronize()
        print(name, what)
        print(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=90))


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--profile", action="store_true", help="kernels of one step instead")
    parser.add_argument("--name", default="float8", help="name of the result files")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.accumulated_recompile_limit = 1024
    about = (
        "Forward and backward, and of whole models fused AdamW; bfloat16 parameters, blocks compiled; medians of CUDA "
        "events."
    )
    rows: list[dict[str, object]] = []
    for name in args.models:
        if args.profile:
            profile(name, args.variants)
            continue
        rows += measure(name, args.variants, args.seconds)
        table = pd.DataFrame(rows).round(3)
        save(table, args.name, args.out, about)  # after each: the last one may take long
        bars(table, ["model"], "variant", "over dense", args.name, args.out)


if __name__ == "__main__":
    main()
