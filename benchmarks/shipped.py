"""The measurements that the package ships, for predictions: made of the CSV files of results, without a GPU.

    python benchmarks/shipped.py    # writes sparse_pass/predict/measurements.json

Run it after benchmarks/sweep.py and benchmarks/kernels.py have written new files. Kernels that were timed on the H200
alone are taken from there for the H100 as well.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
TARGET = ROOT / "sparse_pass" / "predict" / "measurements.json"

GPUS: dict[str, dict[str, Any]] = {
    # `copy`: GB/s of a copy, read and written, as kernels_sparsify.csv has it.
    "h200": {"name": "NVIDIA H200", "folder": "", "copy": 4272},
    # Not measured there: the same share of 3350 GB/s, the specification, as the H200 reaches of its 4800.
    "h100": {"name": "NVIDIA H100 80GB HBM3", "folder": "h100", "copy": 2980},
}


def rows(folder: str, name: str) -> list[dict[str, str]]:
    """A table of results; empty if there is none for that GPU."""
    path = RESULTS / folder / f"{name}.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def linears(folder: str, copy: float) -> list[list[float]]:
    """[M, K, N, dense us, 2:4 us] of one GEMM: the mean of those of a linear, forward and backward, of sweep.csv.

    What a step of the sweep does besides is taken off: S(W), as it was measured by itself, and the sum for the gradient
    of the bias, which reads grad_output once. grad_weight is dense there, and takes as long as the other two.
    """
    found = []
    packing = {(int(row["K"]), int(row["N"])): _packing(folder, row) for row in rows(folder, "sweep")}
    for row in rows(folder, "sweep"):
        m, k, n = int(row["M"]), int(row["K"]), int(row["N"])
        bias = 2 * m * n / copy / 1e3 + 2
        dense = (float(row["dense us"]) - bias) / 3
        sparse = (float(row["sparse us"]) - bias - packing[k, n] - dense) / 2
        found.append([m, k, n, round(dense, 2), round(sparse, 2)])
    return found


def _packing(folder: str, row: dict[str, str]) -> float:
    """Of S(W) and S(W)^T. The sweep's own figure is one sample of a short kernel; that of kernels.py is better."""
    size = int(row["K"]) * int(row["N"])
    for kernel in rows(folder, "kernels_sparsify"):
        is_it = (kernel["stored"], kernel["packed"], kernel["mask"]) == ("bfloat16", "bfloat16", "optimal")
        if is_it and int(kernel["N"]) * int(kernel["K"]) == size:
            return float(kernel["us"])
    return float(row["S(W) us"])


def gemms(folder: str) -> list[list[Any]]:
    """[form, M, N, K, dense us, 2:4 us] of the linear's GEMMs that kernels.py has timed one by one."""
    forms = {
        "output": "linear", "output, S(W)": "linear", "grad_input": "linear", "grad_input, S(W)": "linear",
        "grad_weight, MVUE(dY)": "grad_weight", "grad_input, MVUE(dY)": "grad_input", "output, S(X)": "input",
        "grad_weight, S(X)": "input_grad_weight",
    }  # fmt: skip
    found = []
    for row in rows(folder, "kernels_algorithms_bfloat16"):
        m, k, n = int(row["M"]), int(row["K"]), int(row["N"])
        form = forms[row["GEMM"]]
        if form == "linear" and row["GEMM"].startswith("grad_input"):
            k, n = n, k  # it is asked for as a linear of the transposed weight
        found.append([form, m, n, k, float(row["dense"]), float(row["best"])])
    return found


def preparations(folder: str) -> list[list[Any]]:
    """[operand, mask, stored, elements, packed us, dense us] of structured operands. The dense one may be None."""
    found: list[list[Any]] = []
    for row in rows(folder, "kernels_sparsify"):
        if row["packed"] == "bfloat16":
            elements = int(row["N"]) * int(row["K"])
            found.append(["S(W)", row["mask"], row["stored"], elements, float(row["us"]), None])
    of_rows = rows(folder, "kernels_rows")
    dense = {(row["M"], row["K"]): float(row["us"]) for row in of_rows if row["kernel"] == "MVUE(dY), dense"}
    names = {"MVUE(dY)^T": ("MVUE(dY)", ""), "MVUE(dY^T)^T": ("MVUE(dY^T)", ""), "S(x), none": ("S(X)", "optimal")}
    for row in of_rows:
        if row["kernel"] in names:
            operand, mask = names[row["kernel"]]
            also = dense[row["M"], row["K"]] if operand.startswith("MVUE") else None
            elements = int(row["M"]) * int(row["K"])
            found.append([operand, mask, "bfloat16", elements, float(row["us"]), also])
    return found


def slower(folder: str) -> float:
    """How much longer S(W) of the largest weight takes than on the H200, for kernels that were timed there alone."""
    times = [max((int(row["K"]) * int(row["N"]), float(row["S(W) us"])) for row in rows(one, "sweep"))
             for one in (folder, "")]  # fmt: skip
    return times[0][1] / times[1][1]


def build() -> dict[str, Any]:
    """The content of the file."""
    made: dict[str, Any] = {}
    for key, gpu in GPUS.items():
        folder, copy = gpu["folder"], gpu["copy"]
        made[key] = {
            "name": gpu["name"],
            "capability": [9, 0],
            "copy_gb_s": copy,
            "linears": linears(folder, copy),
            "gemms": gemms(folder),
            "preparations": preparations(folder) or preparations(""),
            "preparations_slower": 1.0 if preparations(folder) else round(slower(folder), 3),
        }
    return {"made by": "benchmarks/shipped.py, of benchmarks/results/*.csv; microseconds, bfloat16", "gpus": made}


def text() -> str:
    """The file as it is written: a row of numbers a line, so that a change can be read."""
    lines = json.dumps(build(), indent=1)
    return lines.replace(",\n     ", ", ").replace("[\n     ", "[").replace("\n    ]", "]") + "\n"


if __name__ == "__main__":
    TARGET.write_text(text())
    print(f"wrote {TARGET.relative_to(ROOT)}, {TARGET.stat().st_size} bytes")
