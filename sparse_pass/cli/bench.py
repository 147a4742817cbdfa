"""Measure the GEMMs of linear layers on this machine's GPU."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..plan.costs import Costs, Measured, Preparation, Product
from ..plan.limits import device_limits
from ..vocabulary import MIN_CAPABILITY
from .output import show_rows
from .plan import planned

Shape = tuple[int, int, int]


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit status."""
    device, dtype = torch.device("cuda"), getattr(torch, args.dtype)
    if why_not := why_no_gpu(device, dtype):
        raise ValueError(f"{why_not}; `sparse-pass explain MODEL --gpu h100` predicts without a GPU")
    shapes = args.shape or shapes_of(args)
    rows = measured(Measured(), _with_progress(shapes), device, dtype)
    show_rows(f"GPU microseconds, {args.dtype}", rows)
    if args.csv:
        write_csv(rows, args.csv)
    if args.png:
        plot(rows, args.png)
    return 0


def why_no_gpu(device: torch.device, dtype: torch.dtype) -> str:
    """Why nothing can be measured here; empty if it can."""
    if not torch.cuda.is_available():
        return "bench needs a CUDA GPU"
    limits = device_limits(device, dtype)
    if limits.capability is None or limits.capability < MIN_CAPABILITY:
        return "bench needs a GPU with sparse tensor cores"
    return limits.unavailable


def shapes_of(args: argparse.Namespace) -> list[Shape]:
    """M, K, N of the linears of a model that 2:4 kernels can take, each once."""
    _, report = planned(args, "h100")  # for the shapes alone
    found = dict.fromkeys((layer.shape[0], layer.shape[2], layer.shape[1]) for layer in report.layers)
    return [shape for shape in found if isinstance(shape[0], int) and not (shape[1] % 64 or shape[2] % 64)]


def measured(costs: Costs, shapes: Iterable[Shape], device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row for each shape: dense and 2:4 time of each GEMM, of S(W), and how many times faster the layer is.

    ``layer`` is the layer in training with 2:4 weights: a dense grad_weight, and S(W) made once. It takes the time of
    the dense output for that of the dense grad_weight, which has as many operations.
    """
    rows = []
    for m, k, n in shapes:
        output = costs.product(Product(form="linear", device=device, dtype=dtype, m=m, n=n, k=k))
        grad_input = costs.product(Product(form="linear", device=device, dtype=dtype, m=m, n=k, k=n))
        grad_weight = costs.product(Product(form="grad_weight", device=device, dtype=dtype, m=m, n=n, k=k))
        packing = costs.preparation(
            Preparation(operand="S(W)", device=device, shape=(n, k), stored=dtype, dtype=dtype, mask="optimal")
        )
        if output is None or grad_input is None or grad_weight is None or packing is None:
            raise ValueError(f"M, K, N = {m}, {k}, {n}: torch's own cuSPARSELt calls, which run here, are not timed")
        before = output[1] + grad_input[1] + grad_weight[1]
        after = output[0] + grad_input[0] + grad_weight[1] + packing[0]
        rows.append({
            "M": m, "K": k, "N": n,
            "output dense": output[1], "output 2:4": output[0],
            "grad_input dense": grad_input[1], "grad_input 2:4": grad_input[0],
            "grad_weight dense": grad_weight[1], "grad_weight 2:4": grad_weight[0],
            "S(W)": packing[0], "layer gain": before / after,
        })  # fmt: skip
    return rows


def _with_progress(shapes: Sequence[Shape]) -> Iterable[Shape]:
    from rich.progress import track

    shown: Iterable[Shape] = track(shapes, description="measuring")
    return shown


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The table as it was measured."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars of how many times faster each layer is. ModuleNotFoundError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError('--png needs matplotlib: pip install "sparse_pass[cli]"') from None
    figure = Figure(figsize=(8, 1 + 0.4 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([f"{row['M']}, {row['K']}, {row['N']}" for row in rows], [row["layer gain"] for row in rows])
    axes.axvline(1, color="grey", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("dense / 2:4 weights, forward and backward of the layer")
    axes.set_ylabel("M, K, N")
    figure.savefig(path, dpi=120)
