"""Training steps of whole models: forward, backward and AdamW; dense, MLP-only and all linears."""

from __future__ import annotations

import gc

import pandas as pd
import torch
import torch.nn.functional as F
from measure import arguments, microseconds, peak_gib, save
from torch import nn

import sparse_pass as sp


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


def llama_1b() -> tuple[nn.Module, torch.Tensor, dict[str, dict[str, sp.WeightSparsity]]]:
    """24 layers of dim 2048 and hidden 8192, 8 sequences of 2048."""
    model = nn.Sequential(*(Layer(2048, 8192, 16) for _ in range(24)))
    mlp = {"re:.*\\.(gate|up|down)": sp.WeightSparsity()}
    return model, torch.randn(8, 2048, 2048), {"MLP": mlp, "all": {**mlp, "re:.*\\.(qkv|proj)": sp.WeightSparsity()}}


def vit_l() -> tuple[nn.Module, torch.Tensor, dict[str, dict[str, sp.WeightSparsity]]]:
    """timm's ViT-L/16, batch 128."""
    import timm

    model = timm.create_model("vit_large_patch16_224", pretrained=False)
    mlp = {"blocks.*.mlp.*": sp.WeightSparsity()}
    every = {**mlp, "blocks.*.attn.*": sp.WeightSparsity()}
    return model, torch.randn(128, 3, 224, 224), {"MLP": mlp, "all": every}


MODELS = {"ViT-L/16": vit_l, "Llama 1B": llama_1b}


def measure(name: str, what: str, mode: str, seconds: float) -> dict[str, object]:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    model, x, configs = MODELS[name]()
    model, x = model.to("cuda", torch.bfloat16), x.to("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    backend = None if what == "dense" else sp.sparse_backend(configs[what], model=model)
    run = torch.compile(model, mode=mode) if backend is None else torch.compile(model, backend=backend, mode=mode)

    def step() -> None:
        run(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=mode == "default")

    time = microseconds(step, seconds, warmup=6)
    sites = backend.report.sites if backend else ()
    return {
        "model": name,
        "linears": what,
        "mode": mode,
        "step ms": time / 1000,
        "peak GiB": peak_gib(step),
        "sparse": sum(site.status == "sparse" for site in sites),
        "masked_dense": sum(site.status == "masked_dense" for site in sites),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--modes", nargs="+", default=["default", "reduce-overhead"])
    args = parser.parse_args()
    rows = []
    for name in args.models:
        for mode in args.modes:
            for what in ("dense", "MLP", "all"):
                rows.append(measure(name, what, mode, args.seconds))
                dense = next(row for row in reversed(rows) if row["linears"] == "dense")
                rows[-1]["speedup"] = dense["step ms"] / rows[-1]["step ms"]
                rows[-1]["memory"] = rows[-1]["peak GiB"] / dense["peak GiB"]
                print(rows[-1], flush=True)
    about = (
        "Forward, backward and fused AdamW, bfloat16, compiled; median of CUDA events. Ratios against dense, same run."
    )
    save(pd.DataFrame(rows).round(3), "end_to_end", args.out, about)


if __name__ == "__main__":
    main()
