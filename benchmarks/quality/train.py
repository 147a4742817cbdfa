"""One run: train a byte GPT by one recipe, and write a JSON file about it.

    python benchmarks/quality/train.py --out w24.json --name w24 --mask optimal --beta norm --stop 0.75

Flags: the fields of `config.Config` and `config.Recipe`. A file that exists already is left alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads OpenMP

import data
import torch
from config import Config, Recipe, add_flags, from_flags
from model import GPT, choose
from torch import Tensor, nn
from weights import Weights

EVALUATIONS = 10
"""How often the held-out loss is looked at on the way, on an eighth of the batches."""
HELD_OUT_TOKENS = 2_000_000
MEASURES = 24
"""How often masks and gradients are measured."""
WINDOW = 50
"""Steps between two looks at the clock, for which the GPU is waited for."""


class Run:
    """A model, its optimizer and what is noted on the way."""

    def __init__(self, config: Config, text: data.Text, device: torch.device, backend: str | None) -> None:
        """backend: of torch.compile; None: not compiled."""
        self.config, self.text = config, text
        torch.manual_seed(config.seed)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = GPT(config.layers, config.dim, config.heads, config.context, dtype).to(device)
        named, others = choose(self.model, config.linears, config.blocks)
        self.weights = Weights(named, others, dtype, backend)
        if backend:
            self.model.compile_parts(backend)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        vectors = [p for p in self.model.parameters() if p.dim() != 2]
        groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
        generator = torch.Generator().manual_seed(config.seed)
        starts = torch.randint(len(text.train) - config.context, (config.steps, config.batch), generator=generator)
        self.starts = starts.to(device)
        self.losses = torch.zeros(config.steps, device=device)
        self.held_out: list[tuple[int, float]] = []
        self.measures: list[tuple[int, dict[str, Tensor]]] = []
        self.compute_seconds: list[float] = []

    def step(self, number: int) -> None:
        config, weights = self.config, self.weights
        if number == 0 or config.recipe_at(number) != weights.recipe:
            weights.begin(config.recipe_at(number))
        refresh = weights.recipe.refresh  # of the steps that choose new masks, the first after each 1/24 of the run
        measured = number % max(1, config.steps // MEASURES) < refresh and weights.age % refresh == 0 < weights.age
        before = [mask.clone() for mask in weights.masks()] if measured else []
        weights.prepare()
        loss = self.model(data.windows(self.text.train, self.starts[number], config.context))
        loss.backward()
        weights.process_gradients()
        if before:
            self.measures.append((number, weights.measures(before)))
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses[number] = loss.detach()

    def evaluate(self, share: float = 1.0) -> float:
        """The held-out loss with the weights as prepared last; windows that do not overlap, the same in every run."""
        config, held_out = self.config, self.text.held_out
        size = config.context + 1
        count = min(HELD_OUT_TOKENS // config.context, len(held_out) // size)
        batches = max(1, int(share * (count // config.batch)))
        spacing = len(held_out) // (batches * config.batch)
        starts = torch.arange(batches * config.batch, device=held_out.device) * spacing
        starts = starts.clamp(max=len(held_out) - size)
        # With gradients on, so that the graphs of training serve; nothing is kept of them.
        losses = [
            self.model(data.windows(held_out, part, config.context)).detach() for part in starts.split(config.batch)
        ]
        return torch.stack(losses).mean().item()

    def train(self) -> bool:
        """Returns whether the loss stayed finite."""
        config = self.config
        every = max(1, config.steps // EVALUATIONS)
        begin = time.perf_counter()
        for number in range(config.steps):
            self.step(number)
            if (number + 1) % WINDOW == 0:
                if not math.isfinite(self.losses[number].item()):
                    return False
                self.compute_seconds.append((time.perf_counter() - begin) / WINDOW)
                begin = time.perf_counter()
            if (number + 1) % every == 0 and number + 1 < config.steps:
                paused = time.perf_counter()
                self.held_out.append((number + 1, self.evaluate(1 / 8)))
                begin += time.perf_counter() - paused
                step_ms = 1e3 * self.compute_seconds[-1] if self.compute_seconds else math.nan
                print(f"step {number + 1}: held out {self.held_out[-1][1]:.4f}, {step_ms:.1f} ms a step", flush=True)
        return True


def results(run: Run, finite: bool) -> dict:
    """What of a run is kept. `held_out` is the loss as trained last, `held_out_dense` that of the stored weights."""
    config, weights = run.config, run.weights
    found = {"held_out": math.nan, "held_out_dense": math.nan}
    if finite:
        weights.prepare()  # of the weights after the last step
        found["held_out"] = found["held_out_dense"] = run.evaluate()
        if weights.recipe != Recipe():
            weights.begin(Recipe())
            weights.prepare()
            found["held_out_dense"] = run.evaluate()
    width = max(1, config.steps // 60)
    curve = [round(part.mean().item(), 4) for part in run.losses.split(width)]
    measures = [{"step": step} | {k: round(v.item(), 6) for k, v in of.items()} for step, of in run.measures]
    return {
        "config": asdict(config),
        **{name: round(loss, 5) for name, loss in found.items()},
        "diverged": not finite,
        "held_out_curve": [(step, round(loss, 4)) for step, loss in run.held_out],
        "train_curve": {"steps each": width, "losses": curve},
        "measures": measures,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "step_ms": round(1e3 * statistics.median(run.compute_seconds), 2) if run.compute_seconds else None,
        "text": {"train": len(run.text.train), "held_out": len(run.text.held_out), "digest": run.text.digest},
    }


def environment(device: torch.device) -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    default = Path(tempfile.gettempdir()) / "quality"
    parser.add_argument("--cache", type=Path, default=default, help="folder of the text")
    parser.add_argument("--megabytes", type=float, default=200.0, help="at most so much text")
    add_flags(parser)
    args = parser.parse_args()
    if args.out.exists():
        print(f"{args.out} exists already")
        return
    torch.set_float32_matmul_precision("high")
    begin = time.perf_counter()
    device = torch.device(args.device)
    text = data.load(args.cache, args.megabytes).to(device)
    run = Run(from_flags(args), text, device, "inductor" if args.compile else None)
    record = results(run, run.train())
    record |= {"seconds": round(time.perf_counter() - begin, 1), "environment": environment(device)}
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps(record))
    part.replace(args.out)


if __name__ == "__main__":
    main()
