"""Train a small GPT dense and 2:4 sparse, by one scheme or several, side by side, and compare.

    python examples/train_gpt.py                      # CPU, about two minutes
    python examples/train_gpt.py --device cuda --dtype bfloat16 \
        --layers 12 --dim 1024 --heads 16 --context 1024 --batch 32 --lr 6e-4 \
        --activation squared_relu --scheme w24 w24-mvue act24

The text is what every machine with Python has: the source files of the standard library, byte by
byte, every tenth file held out. All runs start from the same weights and see the same batches. The
sparse ones differ in one argument: `torch.compile(model, backend=sparse_backend(...))`.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import re
import statistics
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import arguments
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import sparse_pass as sp

W24, MVUE, ACT24 = sp.WeightSparsity(), sp.WeightSparsity(grad_weight="mvue"), sp.ActivationSparsity()
# Of the first layer of an MLP and any other one, and of the second, whose input the activation function has made.
SCHEMES = {
    "w24": (W24, W24),
    "w24-greedy": (sp.WeightSparsity(mask="greedy"),) * 2,
    "w24-masked": (sp.WeightSparsity(grad_weight="masked"),) * 2,
    "w24-mvue": (MVUE, MVUE),
    # With tiles of four tokens, what is kept of a token depends on the next ones: a loss to compare speed by, not one
    # of a model that could be used. By rows there is no such leak, and no sparse kernel.
    "act24": (None, ACT24),
    "act24-rowwise": (None, sp.ActivationSparsity(mask="rowwise")),
    "w24+act24": (W24, (ACT24, W24)),
    "w24-mvue+act24": (MVUE, (ACT24, W24)),
    # The weights stay dense: only matmuls of the backward are 2:4.
    "grad24": (sp.GradientSparsity(),) * 2,
}
LAYERS = ("blocks.*.mlp.fc1", "blocks.*.mlp.fc2")


# The model: nothing in it knows of sparsity.


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS = {"gelu": functools.partial(F.gelu, approximate="tanh"), "squared_relu": squared_relu}


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        split = (batch, length, 3, self.heads, dim // self.heads)
        q, k, v = self.qkv(x).view(split).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(batch, length, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.activation = ACTIVATIONS[activation]
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, activation: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes in, loss out: tokens [batch, context + 1] -> their mean next-byte loss in nats."""

    def __init__(self, layers: int, dim: int, heads: int, context: int, activation: str) -> None:
        super().__init__()
        self.token = nn.Embedding(256, dim)
        self.position = nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, activation) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Two branches a block add up: keep the variance of their sum independent of depth.
                residual = name.endswith(("proj.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x = self.token(inputs) + self.position.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# The text.


def load_text() -> tuple[Tensor, Tensor]:
    """Training and validation bytes, uint8; every tenth file is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if len(files) < 20:
        raise SystemExit(f"found only {len(files)} source files of the standard library")
    train = b"".join(file.read_bytes() for i, file in enumerate(files) if i % 10)
    held_out = b"".join(file.read_bytes() for i, file in enumerate(files) if i % 10 == 0)
    return tuple(torch.frombuffer(bytearray(t), dtype=torch.uint8) for t in (train, held_out))


def cut(text: Tensor, starts: Tensor, context: int) -> Tensor:
    """Tokens [len(starts), context + 1]."""
    return text[starts[:, None] + torch.arange(context + 1)].long()


# Training.


@dataclass
class Run:
    """What one training run left behind."""

    train_loss: list[float] = field(default_factory=list)
    val_steps: list[int] = field(default_factory=list)
    val_loss: list[float] = field(default_factory=list)
    step_ms: float = math.nan
    first_step_s: float = math.nan
    peak_gib: float | None = None


def autocast(args: argparse.Namespace) -> AbstractContextManager[object]:
    dtype = getattr(torch, args.dtype)
    return torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32)


def evaluate(forward: Callable[[Tensor], Tensor], batches: Sequence[Tensor], args: argparse.Namespace) -> float:
    with torch.no_grad(), autocast(args):
        return statistics.fmean(forward(batch.to(args.device)).item() for batch in batches)


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, args.steps // 10)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, args.steps - warmup)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * done))


def train(
    name: str,
    model: GPT,
    forward: Callable[[Tensor], Tensor],
    text: Tensor,
    val_batches: Sequence[Tensor],
    args: argparse.Namespace,
) -> Run:
    """Train `model` through `forward`, the compiled callable of the same model."""
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(args.seed)  # the same batches in every run
    run, seconds = Run(), []
    every = math.ceil(args.steps / args.evals)
    progress = tqdm(range(args.steps), desc=f"{name:>14}", unit="step", disable=None)
    for step in progress:
        starts = torch.randint(len(text) - args.context, (args.batch,), generator=generator)
        tokens = cut(text, starts, args.context).to(args.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        begin = time.perf_counter()
        with autocast(args):
            loss = forward(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.train_loss.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - begin)
        if (step + 1) % every == 0 or step + 1 == args.steps:
            run.val_steps.append(step + 1)
            run.val_loss.append(evaluate(forward, val_batches, args))
            tqdm.write(f"{name:>14}  step {step + 1:5d}  val loss {run.val_loss[-1]:.4f}")
        progress.set_postfix_str(f"loss {run.train_loss[-1]:.3f}", refresh=False)
    run.first_step_s = seconds[0]
    run.step_ms = 1e3 * statistics.median(seconds[len(seconds) // 10 or 1 :] or seconds)
    if cuda:
        run.peak_gib = torch.cuda.max_memory_allocated() / 2**30
    return run


# What to show.


def rewritten_table(scheme: str, report: sp.Report) -> Table:
    """The kernels of a report, one row for layers that differ in their block number alone."""
    table = Table(title=f"What {scheme} rewrote", box=box.SIMPLE_HEAD)
    for column in ("layers", "graph", "output", "grad_input", "grad_weight"):
        table.add_column(column)
    rows = Counter(
        (
            re.sub(r"\.\d+\.", ".*.", site.fqn),
            "train" if site.grad_weight else "eval",
            *(kernel or "-" for kernel in (site.output, site.grad_input, site.grad_weight)),
        )
        for site in report.sites
    )
    for (layers, *rest), count in rows.items():
        table.add_row(f"{count} x {layers}", *rest)
    reasons = Counter(f"{site.status}: {site.reason or 'as asked'}" for site in report.sites)
    table.caption = "\n".join(f"{count} sites {reason}" for reason, count in reasons.items())
    return table


def results_table(runs: dict[str, Run], after: dict[str, dict[str, float]], args: argparse.Namespace) -> Table:
    table = Table(title=f"After {args.steps} steps", box=box.SIMPLE_HEAD)
    table.add_column("")
    columns = ["val loss (nats/byte)", "median step", "first step"]
    for column in columns + ["peak memory"] * (args.device == "cuda"):
        table.add_column(column, justify="right")
    for name, run in runs.items():
        cells = [f"{run.val_loss[-1]:.4f}", f"{run.step_ms:.1f} ms", f"{run.first_step_s:.1f} s"]
        if run.peak_gib is not None:
            cells.append(f"{run.peak_gib:.2f} GiB")
        table.add_row(f"{name} run", *cells)
        for how, loss in after.get(name, {}).items():
            table.add_row(f"  {how}", f"{loss:.4f}")
    return table


def plot(runs: dict[str, Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    window = max(1, len(runs["dense"].train_loss) // 50)
    for number, (name, run) in enumerate(runs.items()):
        color = f"C{number}"
        mean = [statistics.fmean(run.train_loss[max(0, i - window + 1) : i + 1]) for i in range(len(run.train_loss))]
        axes.plot(range(1, len(mean) + 1), mean, color=color, alpha=0.5, label=f"{name}, training")
        axes.plot(run.val_steps, run.val_loss, "o-", color=color, label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title="Same weights, same batches")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--scheme", nargs="+", choices=SCHEMES, default=["w24"], help="what the named layers get; one run for each"
    )
    parser.add_argument("--sparse", nargs="+", default=list(LAYERS), metavar="PATTERN", help="layers to make sparse")
    parser.add_argument("--device", type=arguments.device, choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--inner",
        choices=("inductor", "aot_eager"),
        default="inductor",
        help="compiler below the pass; aot_eager runs op by op and needs no C++ compiler",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the matmuls (autocast); the parameters stay float32",
    )
    parser.add_argument("--activation", choices=ACTIVATIONS, default="gelu", help="of the MLPs")
    parser.add_argument("--layers", type=arguments.positive, default=2)
    parser.add_argument("--dim", type=arguments.positive, default=128)
    parser.add_argument("--heads", type=arguments.positive, default=4)
    parser.add_argument("--context", type=arguments.positive, default=64)
    parser.add_argument("--batch", type=arguments.positive, default=16)
    parser.add_argument("--steps", type=arguments.positive, default=1000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--evals", type=arguments.positive, default=6, help="evaluations in a run")
    parser.add_argument("--val-batches", type=arguments.positive, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/train_gpt"), help="folder of plot and results")
    args = parser.parse_args(argv)
    if args.dim % args.heads:
        parser.error(f"--dim {args.dim} is not a multiple of --heads {args.heads}")
    with torch.device("meta"):
        model = GPT(args.layers, args.dim, args.heads, args.context, args.activation)
    for scheme in args.scheme:
        if len(set(SCHEMES[scheme])) == 2 and not any(pattern.endswith("fc2") for pattern in args.sparse):
            parser.error(f"--scheme {scheme} gives 2:4 inputs to names that end in fc2, and --sparse has none")
        try:
            sp.sparse_backend(config_of(scheme, args.sparse), model=model)
        except ValueError as error:
            parser.error(f"--sparse: {error}")
    return args


def config_of(scheme: str, patterns: Sequence[str]) -> dict[str, object]:
    first, second = SCHEMES[scheme]
    return {pattern: second if pattern.endswith("fc2") else first for pattern in patterns}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    console = Console(highlight=False)
    text, held_out = load_text()
    spread = torch.linspace(0, len(held_out) - args.context - 1, args.val_batches * args.batch)
    val_batches = [cut(held_out, starts, args.context) for starts in spread.long().split(args.batch)]

    torch.manual_seed(args.seed)
    start = GPT(args.layers, args.dim, args.heads, args.context, args.activation)
    parameters = sum(p.numel() for p in start.parameters())
    console.print(
        f"GPT with {parameters / 1e6:.1f}M parameters, {len(text) / 1e6:.1f} MB of text,"
        f" {args.batch * args.context} bytes a step, {args.device} {args.dtype}"
    )

    model = copy.deepcopy(start).to(args.device)
    runs = {"dense": train("dense", model, torch.compile(model, backend=args.inner), text, val_batches, args)}
    after = {}
    for scheme in args.scheme:
        del model  # one at a time on the device, for the peak memory of each
        torch._dynamo.reset()
        model = copy.deepcopy(start).to(args.device)
        # The whole difference between the runs.
        config = config_of(scheme, args.sparse)
        backend = sp.sparse_backend(config, model=model, inner=args.inner)
        runs[scheme] = train(scheme, model, torch.compile(model, backend=backend), text, val_batches, args)

        # Back to dense: the parameters were dense all along, so any other way to run the model will do.
        dense_again = evaluate(torch.compile(model, backend=args.inner), val_batches, args)
        after[scheme] = {"its weights, dense again": dense_again}
        if isinstance(SCHEMES[scheme][0], sp.WeightSparsity):
            pruned = copy.deepcopy(model)
            skipped = [site for site in sp.prune_(pruned, config).sites if site.status == "skipped"]
            how = "its weights, sp.prune_" + (" where it can" if skipped else "")
            after[scheme][how] = evaluate(pruned, val_batches, args)
            for reason, count in Counter(site.reason for site in skipped).items():
                console.print(f"{scheme}: sp.prune_ leaves {count} of the weights dense: {reason}")
        console.print(rewritten_table(scheme, backend.report))
    console.print(results_table(runs, after, args))
    if args.device == "cpu":
        console.print(
            "A CPU has no 2:4 matmuls: the sparse run computes the same mathematics as on a GPU,"
            " with dense matmuls, and is not faster."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    plot(runs, args.out / "loss.png")
    record = {"args": vars(args) | {"out": str(args.out)}, "after": after}
    record |= {name: vars(run) for name, run in runs.items()}
    (args.out / "results.json").write_text(json.dumps(record, indent=1))
    console.print(f"wrote {args.out / 'loss.png'} and {args.out / 'results.json'}")


if __name__ == "__main__":
    main()
