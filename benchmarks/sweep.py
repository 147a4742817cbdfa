"""One linear, forward and backward, over the number of rows: from where on 2:4 weights pay."""

from __future__ import annotations

import pandas as pd
import torch
from matplotlib import pyplot as plt
from measure import arguments, race, save
from torch import nn

import sparse_pass as sp

SIZES = [(768, 3072), (1024, 4096), (2048, 2048), (2048, 8192), (4096, 4096), (4096, 14336)]
ROWS = [128, 512, 1024, 2048, 4096, 8192, 16384, 65536]


def _step(run, model: nn.Module, x: torch.Tensor, grad: torch.Tensor):
    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        run(x).backward(grad)
        x.grad = None
        model.zero_grad(set_to_none=True)

    return step


def measure(k: int, n: int, rows: int, dtype: torch.dtype, seconds: float) -> dict[str, object]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n)).to("cuda", dtype)
    x = torch.randn(rows, k, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(rows, n, device="cuda", dtype=dtype)
    steps, kernels = {}, {}
    for name, scheme in (
        ("dense", None),
        ("tuned", sp.WeightSparsity()),
        ("sparse", sp.WeightSparsity(backend="cusparselt")),
        ("masked_dense", sp.WeightSparsity(backend="masked_dense")),
    ):
        backend = sp.sparse_backend({"0": scheme}, model=model)
        # CUDA graphs: a step of one linear is shorter than its launches.
        run = torch.compile(model, backend=backend, mode="reduce-overhead")
        steps[name] = _step(run, model, x, grad)
        steps[name]()
        kernels[name] = backend.report.sites[0].output if backend.report.sites else "dense"
    times = race(steps, seconds)
    return {
        "K": k,
        "N": n,
        "M": rows,
        **{f"{name} us": time for name, time in times.items()},
        "chosen": kernels["tuned"],
        "speedup tuned": times["dense"] / times["tuned"],
        "speedup sparse": times["dense"] / times["sparse"],
        "tuned over masked_dense": times["masked_dense"] / times["tuned"],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    rows = [measure(k, n, m, getattr(torch, args.dtype), args.seconds) for k, n in SIZES for m in ROWS]
    table = pd.DataFrame(rows).round(3)
    save(table, "sweep", args.out, f"Linear forward and backward, {args.dtype}, CUDA graphs, GPU microseconds a step.")
    wins = table[table["speedup sparse"] > 1].groupby(["K", "N"])["M"].min().rename("break-even M").reset_index()
    save(wins, "break_even", args.out, "Smallest M of the sweep from which 2:4 weights beat the dense layer.")
    for (k, n), group in table.groupby(["K", "N"]):
        plt.plot(group["M"], group["speedup sparse"], marker="o", label=f"K={k}, N={n}")
    plt.axhline(1, color="grey", linewidth=1)
    plt.xscale("log", base=2)
    plt.xlabel("M (rows)")
    plt.ylabel("dense / 2:4, forward + backward")
    plt.legend()
    plt.savefig(args.out / "sweep.png", dpi=120)


if __name__ == "__main__":
    main()
