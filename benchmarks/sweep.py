"""One linear, forward and backward, over the number of rows: from where on 2:4 weights pay."""

from __future__ import annotations

import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from measure import arguments, captured, microseconds, peak_gib, race, save
from naive import naive_linear
from torch import Tensor

from sparse_pass.kernels import compiled, problem, sparsify
from sparse_pass.kernels import measure as tuning

SIZES = [(768, 3072), (1024, 4096), (2048, 2048), (2048, 8192), (4096, 4096), (4096, 14336)]
ROWS = [128, 512, 1024, 2048, 4096, 8192, 16384, 65536]


def measure(k: int, n: int, rows: int, dtype: torch.dtype, seconds: float) -> dict[str, object]:
    """GPU time of what the compiled linear runs, replayed from a CUDA graph: a step is shorter than its launches."""
    torch.manual_seed(0)
    weight, bias = torch.randn(n, k, device="cuda", dtype=dtype), torch.randn(n, device="cuda", dtype=dtype)
    x = torch.randn(rows, k, device="cuda", dtype=dtype)
    grad = torch.randn(rows, n, device="cuda", dtype=dtype)

    def dense(weight: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, weight, bias), grad @ weight, grad.T @ x, grad.sum(0)

    def sparse() -> tuple[Tensor, ...]:
        packed, packed_t = compiled.sparsify(weight, "optimal", dtype)
        output, grad_input = x.new_empty(rows, n), x.new_empty(rows, k)
        compiled.linear_into(x, packed, bias, tuned=True, out=output)
        compiled.linear_into(grad, packed_t, tuned=True, out=grad_input)
        return output, grad_input, grad.T @ x, grad.sum(0)

    def masked() -> tuple[Tensor, ...]:
        return dense(torch.where(sparsify.mask24(weight, "optimal"), weight, 0))

    steps = {"dense": lambda: dense(weight), "sparse": sparse, "masked_dense": masked}
    graphs = {name: captured(step) for name, step in steps.items()}
    times = race({name: graph.replay for name, graph in graphs.items()}, seconds)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]

    def naive() -> None:
        torch.autograd.grad(naive_linear(*leaves), leaves, grad)

    # By its kernels and its launches: torch does not promise that compress can be captured.
    naive_us = microseconds(naive, seconds / 4)
    peaks = {name: peak_gib(steps[name]) for name in ("dense", "sparse")}
    parts = [tuning.preparation_of("S(W)", 0, (n, k), dtype, dtype, "optimal")]
    for sizes in ((n, k, True), (k, n, False)):
        parts.append(tuning.timing_of(problem.Problem(0, dtype, rows, *sizes), measure=True))
    pays = sum(one.sparse_us for one in parts) < sum(one.dense_us for one in parts)
    chosen = "sparse" if pays else "masked_dense"
    return {
        "K": k,
        "N": n,
        "M": rows,
        **{f"{name} us": time for name, time in times.items()},
        "naive _cslt us, eager": naive_us,
        "S(W) us": parts[0].sparse_us,
        "memory": peaks["sparse"] / peaks["dense"],
        "chosen": chosen,
        "speedup tuned": times["dense"] / times[chosen],
        "speedup sparse": times["dense"] / times["sparse"],
        "over masked_dense": times["masked_dense"] / times[chosen],
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
