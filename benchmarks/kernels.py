"""The kernels by themselves: sparsify against copy bandwidth, host time of a call, and the library's algorithms.

GPU times are from replays of a CUDA graph, so that no host time is in them, but for torch's compress.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pandas as pd
import torch
from measure import arguments, captured, microseconds, save
from torch import Tensor

from sparse_pass import reference
from sparse_pass.kernels import compiled, cusparselt, sparsify, torch_cslt, tuner

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
            for mask in reference.MASKS:
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


def host_table() -> pd.DataFrame:
    n = k = 256
    weight, x, bias = normal(n, k), normal(256, k), normal(n)
    packed, _ = sparse.sparsify(weight, "optimal")
    output = normal(256, n)
    dense = weight * sparsify.mask24(weight, "optimal")
    steps: dict[str, Callable[[], object]] = {
        "binding": lambda: cusparselt.linear(x, packed, None, n),
        "binding, bias": lambda: cusparselt.linear(x, packed, bias, n),
        "compiled code's call": lambda: compiled.linear_into(x, packed, tuned=True, out=output),
        "compiled code's call, bias": lambda: compiled.linear_into(x, packed, bias, tuned=True, out=output),
        "compiled code's call, sparsify": lambda: compiled.sparsify(weight, "optimal", weight.dtype),
        "torch.ops linear": lambda: sparse.linear(x, packed, None, n),
        "torch.ops linear, bias": lambda: sparse.linear(x, packed, bias, n),
        "torch.ops linear, bias, padded rows": lambda: sparse.linear(x[:250], packed, bias, n),
        "torch.ops sparsify": lambda: sparse.sparsify(weight, "optimal"),
        "torch._cslt_sparse_mm": lambda: torch_cslt.linear(x, packed, bias, n),
        "dense linear": lambda: torch.nn.functional.linear(x, dense, bias),
    }
    with torch.no_grad():
        return pd.DataFrame([{"call": name, "host us": round(host(step), 1)} for name, step in steps.items()])


def algorithms_table(seconds: float, dtype: torch.dtype, algorithms: list[int]) -> pd.DataFrame:
    rows = []
    for m, k, n in GEMMS:
        x, weight, bias = normal(m, k, dtype=dtype), normal(n, k, dtype=dtype), normal(n, dtype=dtype)
        masked = weight * sparsify.mask24(weight, "optimal")
        packed, packed_t = sparsify.sparsify(weight, "optimal", dtype)
        grad = normal(m, n, dtype=dtype)
        for gemm, operand, values, b, features in (
            ("output", x, packed, bias, n),
            ("grad_input", grad, packed_t, None, k),
        ):
            problem = cusparselt.Problem(x.get_device(), dtype, m, features, operand.shape[1], b is not None)
            right = masked.T if gemm == "output" else masked
            row: dict[str, object] = {
                "M": m,
                "K": k,
                "N": n,
                "GEMM": gemm,
                "dense": round(replayed(lambda: torch.nn.functional.linear(operand, right.T, b), seconds, 3)),  # noqa: B023
            }
            times = {}
            for algorithm in algorithms or range(cusparselt.Plan(problem, 0, b).algorithms):
                try:
                    plan = cusparselt.Plan(problem, algorithm, b)
                    times[algorithm] = round(replayed(lambda: plan(operand, values, b), seconds, 3))  # noqa: B023
                except RuntimeError:
                    continue  # refused for this shape: an empty cell
            best = min(times, key=times.__getitem__)
            row |= {"best": times[best], "best id": best, "speedup": round(row["dense"] / times[best], 2)}
            rows.append(row | {f"id {algorithm}": us for algorithm, us in times.items()})
    return pd.DataFrame(rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--warps", type=int, nargs="+", default=[4], help="warps a sparsify program; 4 is the default")
    parser.add_argument("--only", choices=["sparsify", "host", "algorithms"], help="one table; all three without")
    # All of 0.8.0 in one process have ended in an illegal instruction: see the tuner.
    parser.add_argument(
        "--algorithms", type=int, nargs="*", default=list(tuner.CANDIDATES[0, 8]), help="ids; none: all"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.only in (None, "sparsify"):
        about = "S(W) and S(W)^T from W in one kernel; two compress: of the masked weight and its transpose, by torch."
        save(sparsify_table(args.seconds / 5, args.warps), "kernels_sparsify", args.out, about)
    if args.only in (None, "host"):
        about = "Host time of a call, bfloat16, [256, 256] x [256, 256]^T: launches that the GPU does not wait for."
        save(host_table(), "kernels_host", args.out, about)
    if args.only in (None, "algorithms"):
        for dtype in (torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            about = f"GPU microseconds of each cuSPARSELt algorithm id, {name}; output with a bias; dense by torch."
            save(
                algorithms_table(args.seconds / 20, dtype, args.algorithms),
                f"kernels_algorithms_{name}",
                args.out,
                about,
            )


if __name__ == "__main__":
    main()
