"""The kernels by themselves: sparsify against copy bandwidth, host time of a call, and the library's algorithms.

GPU times are from replays of a CUDA graph, so that no host time is in them, but for torch's compress.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pandas as pd
import torch
from measure import arguments, bars, captured, microseconds, save
from torch import Tensor

from sparse_pass import vocabulary
from sparse_pass.kernels import compiled, cusparselt, mvue, sparsify, torch_cslt
from sparse_pass.kernels.cusparselt_library import version
from sparse_pass.kernels.measure import dense_matmul
from sparse_pass.kernels.problem import Problem, algorithms
from sparse_pass.ops.reference import inputs as reference_inputs

sparse = torch.ops.sparse_pass

WEIGHTS = [(14336, 4096), (8192, 2048), (4096, 4096), (4096, 1024), (1024, 4096)]
# (M, K, N) of the GEMM table in docs/performance.md.
GEMMS = [
    (44160, 1024, 4096),
    (44160, 4096, 1024),
    (13008, 1024, 4096),
    (13008, 4096, 1024),
    (16384, 4096, 14336),
    (16384, 14336, 4096),
    (16384, 2048, 8192),
    (16384, 8192, 2048),
]
# (M, K) of an input or a gradient.
ROWS = [(44160, 4096), (44160, 1024), (16384, 14336), (16384, 4096), (25216, 4096), (25216, 1024)]
HOST_CALLS = 200


def replayed(step: Callable[[], object], seconds: float, calls: int = 10) -> float:
    """GPU time of one call of ``step`` in microseconds, without gaps between the calls."""
    return microseconds(captured(step, calls).replay, seconds) / calls


def host(step: Callable[[], object]) -> float:
    """Host time of one call in microseconds: the GPU's queue takes all the calls of a round without waiting."""
    step()
    rounds = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            step()
        rounds.append((time.perf_counter() - start) / HOST_CALLS * 1e6)
    return median(rounds)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def copy_gigabytes(seconds: float) -> float:
    """GB/s, read and written, of a copy of 2 GiB."""
    source = torch.empty(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    # An idle GPU clocks its memory down: half a second of copies brings it up.
    return 2 * source.nbytes / microseconds(lambda: target.copy_(source), max(seconds, 0.3), warmup=250) / 1e3


def sparsify_table(seconds: float, warps: list[int]) -> pd.DataFrame:
    copy_rate = copy_gigabytes(seconds)
    rows = []
    for n, k in WEIGHTS:
        for stored, packed in (
            (torch.bfloat16, torch.bfloat16),
            (torch.float16, torch.float16),
            (torch.float32, torch.bfloat16),
        ):
            for mask in vocabulary.MASKS:
                weight = normal(n, k, dtype=stored)
                moved = weight.nbytes + 2 * 2 * n * k * 9 // 16
                masked = (weight * sparsify.mask24(weight, mask)).to(packed)
                # Not from a graph: torch does not promise that it can be captured.
                compress = microseconds(lambda m=masked: (torch_cslt.compress(m), torch_cslt.compress(m.T)), seconds)
                for count in warps:
                    sparsify._WARPS = count
                    ours = replayed(lambda w=weight, m=mask, p=packed: sparsify.sparsify(w, m, p), seconds)
                    rows.append(
                        {
                            "N": n,
                            "K": k,
                            "stored": str(stored).removeprefix("torch."),
                            "packed": str(packed).removeprefix("torch."),
                            "mask": mask,
                            "warps": count,
                            "us": round(ours, 1),
                            "GB/s": round(moved / ours / 1e3),
                            "copy GB/s": round(copy_rate),
                            "of copy": round(moved / ours / 1e3 / copy_rate, 3),
                            "two compress us": round(compress, 1),
                            "faster": round(compress / ours, 1),
                        }
                    )
    return pd.DataFrame(rows)


def rows_table(seconds: float) -> pd.DataFrame:
    copy_rate = copy_gigabytes(seconds)
    seed = torch.zeros(1, device="cuda", dtype=torch.int64)
    rows = []
    for m, k in ROWS:
        x, gate = normal(m, k), normal(m, k)
        # Bytes that must be moved, an element.
        kernels: dict[str, tuple[float, Callable[[], object]]] = {
            "MVUE(dY)^T": (3.125, lambda: mvue.sparsify_mvue(x, seed)),  # noqa: B023
            "MVUE(dY^T)^T": (3.125, lambda: mvue.sparsify_mvue(x.T, seed)),  # noqa: B023
            "MVUE(dY)^T and sums": (3.125, lambda: mvue.sparsify_mvue_sum(x, seed)),  # noqa: B023
            "MVUE(dY), dense": (4, lambda: mvue.mvue24(x, seed)),  # noqa: B023
        }
        for name in reference_inputs.ACTIVATIONS:
            beside = gate if name in reference_inputs.GATED else None
            kernels[f"S(x), {name}"] = (
                4.25 if beside is None else 6.25,
                lambda beside=beside, name=name: sparsify.sparsify_input(x, beside, "optimal", name),  # noqa: B023
            )
        for name, (moved, kernel) in kernels.items():
            us = replayed(kernel, seconds, 5)
            rate = moved * m * k / us / 1e3
            rows.append(
                {
                    "M": m,
                    "K": k,
                    "kernel": name,
                    "us": round(us, 1),
                    "GB/s": round(rate),
                    "copy GB/s": round(copy_rate),
                    "of copy": round(rate / copy_rate, 3),
                }
            )
    return pd.DataFrame(rows)


def host_table() -> pd.DataFrame:
    n = k = 256
    weight, x, bias = normal(n, k), normal(256, k), normal(n)
    packed, _ = sparse.sparsify(weight, "optimal")
    output = normal(256, n)
    dense = weight * sparsify.mask24(weight, "optimal")
    steps: dict[str, Callable[[], object]] = {
        "binding": lambda: cusparselt.product("linear", x, packed, n),
        "binding, bias": lambda: cusparselt.product("linear", x, packed, n, bias),
        "compiled code's call": lambda: compiled.linear_into(x, packed, tuned=True, out=output),
        "compiled code's call, bias": lambda: compiled.linear_into(x, packed, bias, tuned=True, out=output),
        "compiled code's call, sparsify": lambda: compiled.sparsify(weight, "optimal", weight.dtype),
        "torch.ops linear": lambda: sparse.linear(x, packed, None, n),
        "torch.ops linear, bias": lambda: sparse.linear(x, packed, bias, n),
        "torch.ops linear, bias, padded rows": lambda: sparse.linear(x[:250], packed, bias, n),
        "torch.ops sparsify": lambda: sparse.sparsify(weight, "optimal"),
        "torch._cslt_sparse_mm": lambda: torch_cslt.product("linear", x, packed, n, bias),
        "dense linear": lambda: torch.nn.functional.linear(x, dense, bias),
    }
    with torch.no_grad():
        return pd.DataFrame([{"call": name, "host us": round(host(step), 1)} for name, step in steps.items()])


def problems(m: int, k: int, n: int, dtype: torch.dtype) -> dict[str, Problem]:
    """The GEMMs of a linear, by what is 2:4 in them."""
    return {
        "output, S(W)": Problem(0, dtype, m, n, k, True, "linear"),
        "grad_input, S(W)": Problem(0, dtype, m, k, n, False, "linear"),
        "grad_weight, MVUE(dY)": Problem(0, dtype, k, n, -(-m // 64) * 64, False, "grad_weight"),
        "grad_input, MVUE(dY)": Problem(0, dtype, k, -(-m // 64) * 64, n, False, "grad_input"),
        "output, S(X)": Problem(0, dtype, n, -(-m // 64) * 64, k, False, "input"),
        "grad_weight, S(X)": Problem(0, dtype, n, k, -(-m // 64) * 64, False, "input_grad_weight"),
    }


def algorithms_table(seconds: float, dtype: torch.dtype, every: bool) -> pd.DataFrame:
    rows = []
    for m, k, n in GEMMS:
        for gemm, problem in problems(m, k, n, dtype).items():
            kept, dense = normal(problem.n, problem.k, dtype=dtype), normal(*problem.dense_shape, dtype=dtype)
            bias = normal(problem.n, dtype=dtype) if problem.bias else None
            packed = sparsify.sparsify(kept, "optimal", dtype)[0]
            kept.masked_fill_(~sparsify.mask24(kept, "optimal"), 0)
            dense_us = round(replayed(dense_matmul(problem, kept, dense, bias), seconds, 3))
            times = {}
            ids = range(cusparselt.Plan(problem, 0, bias).algorithms) if every else ()
            for algorithm in ids or algorithms(version(), dtype, problem.form, problem.capability):
                try:
                    plan = cusparselt.Plan(problem, algorithm, bias)
                    times[algorithm] = round(replayed(lambda: plan(dense, packed, bias), seconds, 3))  # noqa: B023
                except RuntimeError:
                    continue  # refused for this shape: an empty cell
            best = min(times, key=times.__getitem__)
            row = {"M": m, "K": k, "N": n, "GEMM": gemm, "dense": dense_us, "best": times[best], "best id": best}
            row["speedup"] = round(dense_us / times[best], 2)
            rows.append(row | {f"id {algorithm}": us for algorithm, us in sorted(times.items())})
    return pd.DataFrame(rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--warps", type=int, nargs="+", default=[4], help="warps a sparsify program; 4 is the default")
    parser.add_argument("--only", choices=["sparsify", "rows", "host", "algorithms"], help="one table; all without")
    # All of 0.8.0 in one process have ended in an illegal instruction: see `problem`.
    parser.add_argument("--every-id", action="store_true", help="all algorithm ids, not those of the tuner alone")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.only in (None, "sparsify"):
        about = "S(W) and S(W)^T from W in one kernel; two compress: of the masked weight and its transpose, by torch."
        table = sparsify_table(args.seconds / 5, args.warps)
        save(table, "kernels_sparsify", args.out, about)
        bars(table, ["N", "K", "stored", "packed", "warps"], "mask", "of copy", "kernels_sparsify", args.out)
    if args.only in (None, "rows"):
        about = "Gradients and inputs, bfloat16: one kernel each, against the bandwidth of a copy."
        table = rows_table(args.seconds / 10)
        save(table, "kernels_rows", args.out, about)
        bars(table, ["M", "K"], "kernel", "of copy", "kernels_rows", args.out)
    if args.only in (None, "host"):
        about = "Host time of a call, bfloat16, [256, 256] x [256, 256]^T: launches that the GPU does not wait for."
        table = host_table()
        save(table, "kernels_host", args.out, about)
        dense = float(table.set_index("call")["host us"]["dense linear"])
        bars(table, ["call"], None, "host us", "kernels_host", args.out, line=dense)
    if args.only in (None, "algorithms"):
        for dtype in (torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            about = f"GPU microseconds of each cuSPARSELt algorithm id, {name}; dense by torch, of the same GEMM."
            table = algorithms_table(args.seconds / 20, dtype, args.every_id)
            save(table, f"kernels_algorithms_{name}", args.out, about)
            bars(table, ["M", "K", "N"], "GEMM", "speedup", f"kernels_algorithms_{name}", args.out)


if __name__ == "__main__":
    main()
