"""Training steps of whole models: forward, backward and AdamW; dense, MLP-only, all linears, and those with MVUE."""

from __future__ import annotations

import functools
import gc
from typing import TypeAlias

import pandas as pd
import torch
import torch.nn.functional as F
from measure import arguments, bars, captured, microseconds, peak_gib, race, save
from naive import swap
from torch import nn

import sparse_pass as sp

Configs: TypeAlias = "dict[str, dict[str, sp.WeightSparsity]]"


class Layer(nn.Module):
    """A Llama-style layer: RMSNorm, causal attention, SwiGLU."""

    def __init__(self, dim: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, dim))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _configs(mlp: str, rest: str) -> Configs:
    w24, mvue = sp.WeightSparsity(), sp.WeightSparsity(grad_weight="mvue")
    return {"MLP": {mlp: w24}, "all": {mlp: w24, rest: w24}, "all, mvue": {mlp: mvue, rest: mvue}}


def llama_1b() -> tuple[nn.Module, torch.Tensor, Configs]:
    """24 layers of dim 2048 and hidden 8192, 8 sequences of 2048."""
    model = nn.Sequential(*(Layer(2048, 8192, 16) for _ in range(24)))
    return model, torch.randn(8, 2048, 2048), _configs("re:.*\\.(gate|up|down)", "re:.*\\.(qkv|proj)")


def vit_l() -> tuple[nn.Module, torch.Tensor, Configs]:
    """timm's ViT-L/16, batch 128."""
    import timm

    model = timm.create_model("vit_large_patch16_224", pretrained=False)
    return model, torch.randn(128, 3, 224, 224), _configs("blocks.*.mlp.*", "blocks.*.attn.*")


MODELS = {"ViT-L/16": vit_l, "Llama 1B": llama_1b}


def measure(name: str, mode: str, linears: list[str], seconds: float, naive: bool) -> list[dict[str, object]]:
    """One model with one optimizer, stepped dense and sparse."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    model, x, configs = MODELS[name]()
    configs = {what: config for what, config in configs.items() if what in linears}
    model, x = model.to("cuda", torch.bfloat16), x.to("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    backends = {what: sp.sparse_backend(config, model=model) for what, config in configs.items()}
    runs = {"dense": torch.compile(model, mode=mode)}
    runs |= {what: torch.compile(model, backend=backend, mode=mode) for what, backend in backends.items()}

    def step(run) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        run(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    steps = {what: functools.partial(step, run) for what, run in runs.items()}
    times = race(steps, seconds)
    named = {what: sorted({site.fqn for site in backend.report.sites}) for what, backend in backends.items()}
    sparsify_ms = {what: _sparsify_ms(model, names, seconds) for what, names in named.items()}
    # CUDA graphs keep the memory of all three: what one of them needs is not to be seen there.
    peaks = {what: peak_gib(one) if mode == "default" else float("nan") for what, one in steps.items()}
    rows = []
    for what, us in times.items():
        statuses = [site.status for site in backends[what].report.sites] if what in backends else []
        rows.append(
            {
                "model": name,
                "linears": what,
                "mode": mode,
                "step ms": us / 1000,
                "peak GiB": peaks[what],
                "sparse": statuses.count("sparse"),
                "masked_dense": statuses.count("masked_dense"),
                "speedup": times["dense"] / us,
                "memory": peaks[what] / peaks["dense"],
                "S(W) ms": sparsify_ms.get(what, 0.0),
            }
        )
    if naive and "all" in named:
        swap(model, named["all"])
        us = microseconds(functools.partial(step, model), seconds / 4, warmup=1)
        swap(model, named["all"], nn.Linear)
        row = {"model": name, "linears": "all, naive _cslt, eager", "mode": mode, "step ms": us / 1000}
        rows.append(row | {"speedup": times["dense"] / us})
    print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)
    return rows


def _sparsify_ms(model: nn.Module, names: list[str], seconds: float) -> float:
    """What S(W) and S(W)^T of the named layers take in a step."""
    weights = [model.get_submodule(name).weight.detach() for name in names]
    graph = captured(lambda: [torch.ops.sparse_pass.sparsify(weight, "optimal") for weight in weights])
    return microseconds(graph.replay, seconds / 8) / 1000


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--modes", nargs="+", default=["default", "reduce-overhead"])
    linears = ["MLP", "all", "all, mvue"]
    parser.add_argument("--linears", nargs="+", default=linears, choices=linears)
    parser.add_argument("--no-naive", dest="naive", action="store_false", help="without the route by torch._cslt_*")
    parser.add_argument("--name", default="end_to_end", help="name of the result files")
    args = parser.parse_args()
    about = "Forward, backward and fused AdamW, bfloat16, compiled; medians of CUDA events, all variants in one run."
    rows: list[dict[str, object]] = []
    for name in args.models:
        for mode in args.modes:
            rows += measure(name, mode, args.linears, args.seconds, args.naive and mode == "default")
            table = pd.DataFrame(rows).round(3)
            save(table, args.name, args.out, about)  # after each: the last one may take long
            bars(table, ["model", "mode"], "linears", "speedup", args.name, args.out)


if __name__ == "__main__":
    main()
