"""Two checkouts of the package in one run: step times of MLPs over dense, and host time of a compiled call.

    git worktree add /tmp/before v0.1.0
    python benchmarks/compare.py --before /tmp/before

Each is measured in processes of its own, in turns. Figures of the same checkout tell how far they vary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pandas as pd
import torch
import torch.nn.functional as F
from measure import arguments, race, save
from torch import nn

SHAPES = ((44160, 1024, 4096), (16384, 4096, 14336), (13008, 1024, 4096))
ROOT = Path(__file__).resolve().parent.parent


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Linear(dim, hidden), nn.Linear(hidden, dim), activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def speed_ups(rows: int, dim: int, hidden: int, seconds: float) -> dict[str, float]:
    import sparse_pass as sp

    w24, mvue = sp.WeightSparsity(), sp.WeightSparsity(grad_weight="mvue")
    variants = {
        "dense": ({}, F.gelu),
        "w24": ({"fc1": w24, "fc2": w24}, F.gelu),
        "mvue": ({"fc1": mvue, "fc2": mvue}, F.gelu),
        "dense, squared relu": ({}, squared_relu),
        "act24": ({"fc2": sp.ActivationSparsity()}, squared_relu),
    }
    x = torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    steps = {}
    for what, (config, activation) in variants.items():
        torch._dynamo.reset()
        model = Mlp(dim, hidden, activation).to("cuda", torch.bfloat16)
        backend = sp.sparse_backend(config, model=model) if config else "inductor"
        compiled = torch.compile(model, backend=backend)

        def step(model: nn.Module = model, compiled: nn.Module = compiled) -> None:
            model.zero_grad()
            x.grad = None
            compiled(x).backward(grad)

        step()  # compiled while this variant alone is known
        steps[what] = step
    times = race(steps, seconds)
    dense = {"w24": "dense", "mvue": "dense", "act24": "dense, squared relu"}
    return {f"{what}, {rows} x {dim} x {hidden}": times[of] / times[what] for what, of in dense.items()}


def host_us(calls: int = 300) -> dict[str, float]:
    """Of eight small linears, whose kernels are shorter than their launch."""
    import sparse_pass as sp

    torch._dynamo.reset()
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))).to("cuda", torch.bfloat16)
    backend = sp.sparse_backend({"re:.*": sp.WeightSparsity(backend="cusparselt")}, model=model)
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)

    def forward() -> None:
        with torch.no_grad():
            compiled(x)

    def step() -> None:
        compiled(x).sum().backward()

    return {"host us, forward": _host(forward, calls), "host us, step": _host(step, calls)}


def _host(call: Callable[[], None], calls: int) -> float:
    times = []
    for _ in range(calls):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - begin))
    return median(times[calls // 10 :])


def one_process(seconds: float) -> None:
    import sparse_pass

    found = {"package": str(Path(sparse_pass.__file__).parent)} | host_us()
    for shape in SHAPES:
        found |= speed_ups(*shape, seconds)
    print(json.dumps(found))


def measured(checkout: Path, seconds: float) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__)), "--one", "--seconds", str(seconds)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    imported = Path(found.pop("package"))
    if imported.parent != checkout.resolve():
        raise RuntimeError(f"{imported} was measured and not that of {checkout}: is the package installed?")
    return found


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each checkout")
    parser.add_argument("--one", action="store_true", help="measure what is imported, and print it")
    args = parser.parse_args()
    if args.one:
        one_process(args.seconds)
        return
    if args.before is None:
        parser.error("--before: the other checkout")
    runs: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    for _ in range(args.rounds):
        runs["before"].append(measured(args.before, args.seconds))
        runs["after"].append(measured(ROOT, args.seconds))
    rows = []
    for what in runs["after"][0]:
        figures = {which: [run[what] for run in several] for which, several in runs.items()}
        row: dict[str, object] = {"figure": what}
        row |= {f"{which} {at + 1}": value for which, several in figures.items() for at, value in enumerate(several)}
        rows.append(row | {"after / before": median(figures["after"]) / median(figures["before"])})
    save(pd.DataFrame(rows).round(3), "compare", args.out, __doc__.splitlines()[0])


if __name__ == "__main__":
    main()
