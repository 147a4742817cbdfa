"""What the pass adds to compile time: of a cold compilation, as a model gets deeper, and on a warm start.

    python benchmarks/pass_time.py              # on a CPU, a few minutes
    python benchmarks/pass_time.py --device cuda

The model is a ViT with the names of timm's, at a small width: compile time depends on the number of layers, hardly on
their size. The linears of attention and MLP are named, four a layer. Seconds are wall time.
"""

from __future__ import annotations

import datetime
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
import torch.nn.functional as F
from measure import arguments
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.fx import Graph

import sparse_pass as sp
from sparse_pass import backend as backend_module
from sparse_pass import graph_pass, inductor
from sparse_pass.backend import SparseBackend
from sparse_pass.fqn import parse_config

LINEARS = ["blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.fc1", "blocks.*.mlp.fc2"]
DEPTHS = (12, 24, 48, 96)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(batch, length, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim), Mlp(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Width 128, 2 heads, images of 32x32 in patches of 8."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 128, 8, 8)
        self.pos_embed = nn.Parameter(torch.randn(1, 16, 128) / 50)
        self.blocks = nn.Sequential(*(Block(128, 2) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(1))


def vit(depth: int, device: str) -> tuple[nn.Module, torch.Tensor]:
    return ViT(depth).to(device, torch.bfloat16), torch.randn(2, 3, 32, 32, device=device, dtype=torch.bfloat16)


def schemes(device: str) -> dict[str, sp.WeightSparsity]:
    """Both rewrites. On a CPU the op nodes have to be asked for."""
    sparse = sp.WeightSparsity(backend="cusparselt" if device == "cpu" else "auto")
    return {"masked_dense": sp.WeightSparsity(backend="masked_dense"), "sparse": sparse}


class Clock:
    """Seconds spent in functions, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def on(self, owner: Any, name: str) -> Iterator[None]:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        with mock.patch.object(owner, name, timed):
            yield


def first_step(compiled: Callable[..., torch.Tensor], x: torch.Tensor) -> float:
    """Seconds of the first forward and backward less those of the second: what compiling took."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        compiled(x).float().sum().backward()
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]


def cold(depth: int, device: str) -> pd.DataFrame:
    """The pass in a cold compilation, with everything around it: names, cache keys, the copy for a warm start."""
    first_step(torch.compile(nn.Linear(8, 8).to(device)), torch.randn(2, 8, device=device))  # imports, C++ probing
    rows = []
    for name, scheme in {"dense": None, **schemes(device)}.items():
        torch._dynamo.reset()
        model, x = vit(depth, device)
        clock = Clock()
        backend = sp.sparse_backend(dict.fromkeys(LINEARS, scheme), model=model)
        with (
            fresh_cache(),
            clock.on(graph_pass, "rewrite_graph"),
            clock.on(backend_module, "captured"),
            clock.on(inductor, "copy_graph"),
            clock.on(sp.SparsePass, "uuid"),
        ):
            compiling = first_step(torch.compile(model, backend=backend), x)
        rewriting = clock.seconds.pop("rewrite_graph")
        rows.append(
            {
                "linears": name,
                "rewritten": len(backend.report.sites),
                "compile s": compiling,
                "pass s": rewriting,
                "pass %": 100 * rewriting / compiling,
                "around it s": sum(clock.seconds.values()),
                "all %": 100 * (rewriting + sum(clock.seconds.values())) / compiling,
            }
        )
    return pd.DataFrame(rows)


def depths(device: str, rounds: int) -> pd.DataFrame:
    """The pass alone, best of ``rounds``, on copies of a graph that is captured and not compiled."""
    rewrite_graph = graph_pass.rewrite_graph
    rows: list[dict[str, object]] = []

    def measured(graph: Graph, patterns: Any, names: Any = None, *, strict: bool = False, **rest: Any) -> sp.Report:
        for linears, scheme in schemes(device).items():
            config = parse_config(dict.fromkeys(LINEARS, scheme))
            seconds = []
            for _ in range(rounds):
                copied = copy_of(graph)
                start = time.perf_counter()
                report = rewrite_graph(copied, config, names, strict=strict, **rest)
                seconds.append(time.perf_counter() - start)
            row = {"linears": linears, "layers": depth, "rewritten": len(report.sites), "pass s": min(seconds)}
            rows.append({**row, "ms a linear": 1000 * min(seconds) / len(report.sites)})
        return rewrite_graph(graph, patterns, names, strict=strict, **rest)

    with mock.patch.object(graph_pass, "rewrite_graph", measured):
        for depth in DEPTHS:
            model, x = vit(depth, device)
            sp.explain(model, dict.fromkeys(LINEARS, sp.WeightSparsity()))(x)
    return pd.DataFrame(rows).sort_values(["linears", "layers"])


def copy_of(graph: Graph) -> Graph:
    copied = Graph()
    copied.output(copied.graph_copy(graph, {}))
    copied.output_node().meta = dict(graph.output_node().meta)
    return copied


def warm(depth: int, device: str) -> pd.DataFrame:
    """A start from warm caches: the pass is not called, and a report is made by tracing once more.

    With ``model=`` that waits until somebody reads the report. Without, a name may need its warning at once.
    """
    config = dict.fromkeys(LINEARS, schemes(device)["sparse"])
    model, x = vit(depth, device)
    rows = []

    def start(what: str, backend: SparseBackend | str) -> None:
        torch._dynamo.reset()
        clock = Clock()
        with clock.on(inductor, "report_graph"):
            compiling = first_step(torch.compile(model, backend=backend), x)
            waited = clock.seconds.get("report_graph", 0.0)
            sites = len(backend.report.sites) if isinstance(backend, SparseBackend) else 0
        late = clock.seconds.get("report_graph", 0.0) - waited
        rows.append({"start": what, "compile s": compiling, "of it report s": waited, "report s, when read": late})
        assert sites == (4 * depth if isinstance(backend, SparseBackend) else 0)

    with fresh_cache():
        start("cold", sp.sparse_backend(config, model=model))
        start("warm", sp.sparse_backend(config, model=model))
        start("warm, without model=", sp.sparse_backend(config))
        start("dense, cold", "inductor")
        start("dense, warm", "inductor")
    return pd.DataFrame(rows)


def environment(device: str) -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "CPU": f"{_cpu()}, {torch.get_num_threads()} torch threads",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": f"python {shlex.join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])}",
    }


def _cpu() -> str:
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def save(tables: dict[str, tuple[str, pd.DataFrame]], device: str, out: Path) -> None:
    """One CSV a table, one page for all."""
    out.mkdir(parents=True, exist_ok=True)
    facts = "\n".join(f"- {key}: {value}" for key, value in environment(device).items())
    page = [f"# pass_time\n\n{__doc__.splitlines()[0]}\n\n{facts}"]
    for name, (about, table) in tables.items():
        table.to_csv(out / f"pass_time_{name}.csv", index=False)
        page.append(f"## {name}\n\n{about}\n\n{table.to_markdown(index=False, floatfmt='.3g')}")
    (out / "pass_time.md").write_text("\n\n".join(page) + "\n")


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, default=24, help="layers of the cold compilation")
    parser.add_argument("--warm-layers", type=int, default=12, help="layers of the warm start")
    parser.add_argument("--rounds", type=int, default=5, help="runs of the pass at each depth; the fastest counts")
    args = parser.parse_args()
    tables = {}
    for name, about, table in (
        ("cold", f"A cold compilation of {args.layers} layers.", lambda: cold(args.layers, args.device)),
        ("depth", "The pass alone, by depth.", lambda: depths(args.device, args.rounds)),
        ("warm", f"Compiling {args.warm_layers} layers from warm caches.", lambda: warm(args.warm_layers, args.device)),
    ):
        tables[name] = (about, table())
        print(f"\n{name}: {about}\n{tables[name][1].to_string(index=False)}", flush=True)
    save(tables, args.device, args.out)


if __name__ == "__main__":
    main()
