"""Many steps of a small model with a number of rows that changes: memory, plans, and the loss beside masked_dense."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from statistics import fmean

import pandas as pd
import torch
from measure import arguments, save
from torch import nn

import sparse_pass as sp
from sparse_pass.kernels import cusparselt


def resident_mib() -> float:
    """Memory of this process on the host."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=256)
    args = parser.parse_args()
    torch.manual_seed(0)
    dim = args.dim
    layers = [nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)]
    start = nn.Sequential(*layers).to("cuda", torch.bfloat16)
    teacher = copy.deepcopy(start)
    runs = {}
    for name, scheme in (("2:4", sp.WeightSparsity()), ("masked_dense", sp.WeightSparsity(backend="masked_dense"))):
        model = copy.deepcopy(start)
        for weight in model.parameters():
            weight.data.mul_(0.7)
        # tune="off": otherwise a shape as small as this one goes masked_dense.
        backend = sp.sparse_backend({"*": scheme}, model=model, tune="off")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        runs[name] = (torch.compile(model, backend=backend, dynamic=True), optimizer, backend)
    generator = torch.Generator("cuda").manual_seed(1)
    sizes = torch.Generator().manual_seed(2)
    rows, losses, tenth = [], {name: [] for name in runs}, args.steps // 10
    for step in range(args.steps):
        count = int(torch.randint(16, 2048, (), generator=sizes))
        x = torch.randn(count, dim, device="cuda", dtype=torch.bfloat16, generator=generator)
        with torch.no_grad():
            wanted = teacher(x)
        for name, (run, optimizer, _) in runs.items():
            loss = (run(x) - wanted).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[name].append(loss.detach())
        if (step + 1) % tenth == 0:
            rows.append(
                {
                    "steps": step + 1,
                    "peak GPU MiB": round(torch.cuda.max_memory_allocated() / 2**20, 2),
                    "host MiB": round(resident_mib(), 1),
                    "plans": len(cusparselt._PLANS),
                    **{f"loss, {name}": fmean(torch.stack(values).tolist()) for name, values in losses.items()},
                }
            )
            print(rows[-1], flush=True)
            torch.cuda.reset_peak_memory_stats()
            losses = {name: [] for name in runs}
    for _, _, backend in runs.values():
        print(backend.report)
    about = (
        f"{args.steps} steps of Linear, GELU, Linear (dim {dim}, bfloat16) against a dense teacher, 16 to 2047 rows at"
        " random; both runs see the same data; a row is a tenth of the steps, losses are means over it."
    )
    save(pd.DataFrame(rows).round(5), "soak", args.out, about)


if __name__ == "__main__":
    main()
