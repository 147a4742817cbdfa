"""What the benchmarks share: timing by CUDA events, and results that say where they come from."""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from matplotlib import pyplot as plt


def arguments(description: str) -> argparse.ArgumentParser:
    """Flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for the results")
    parser.add_argument("--seconds", type=float, default=1.0, help="GPU seconds to spend on each figure")
    return parser


def microseconds(step: Callable[[], object], seconds: float = 1.0, warmup: int = 3) -> float:
    """Median GPU time of one call of ``step``, between CUDA events. Host time counts where the GPU waits for it."""
    for _ in range(warmup):
        step()
    torch.cuda.synchronize()
    once = timed(step, 1)[0]
    return median(timed(step, max(5, min(200, int(seconds * 1e6 / max(once, 1.0))))))


def timed(step: Callable[[], object], count: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [1000 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def race(steps: Mapping[str, Callable[[], object]], seconds: float = 1.0) -> dict[str, float]:
    """`microseconds` of several steps: each runs alone, first in this order and then in the reverse, which evens out
    a GPU that gets warm.

    The first quarter of each run is left out: under its power limit the GPU takes a while to find the clock that a
    step allows, and training runs at that one.
    """
    for _ in range(5):
        for step in steps.values():
            step()
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for name, step in [*steps.items(), *reversed(steps.items())]:
        once = median(timed(step, 3))
        found = timed(step, max(8, min(2000, int(seconds / 2 * 1e6 / max(once, 1.0)))))
        times[name] += found[len(found) // 4 :]
    return {name: median(found) for name, found in times.items()}


def captured(step: Callable[[], object], calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``calls`` calls of ``step``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            step()
    return graph


def peak_gib(step: Callable[[], object]) -> float:
    """Peak memory that torch's allocator holds in one call of ``step``, GiB; all that is held before is in it."""
    gc.collect()  # graphs of earlier models are in cycles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def environment() -> dict[str, str]:
    """Everything a reader needs to run it again."""
    from sparse_pass.kernels.cusparselt_library import version

    clocks = subprocess.run(
        ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "GPU": torch.cuda.get_device_name(),
        "clocks now (SM, memory), driver": clocks.splitlines()[0] if clocks else "unknown",
        "torch": torch.__version__,
        "cuSPARSELt": ".".join(map(str, version())),
        "Python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": f"python {shlex.join([Path(sys.argv[0]).as_posix(), *_without_out(sys.argv[1:])])}",
    }


def _without_out(words: list[str]) -> list[str]:
    """Where the files went is of no use to a reader."""
    if "--out" not in words:
        return words
    at = words.index("--out")
    return words[:at] + words[at + 2 :]


def save(table: pd.DataFrame, name: str, out: Path, about: str) -> None:
    """Print a table, and write it as CSV and as markdown with its environment."""
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / f"{name}.csv", index=False)
    facts = "\n".join(f"- {key}: {value}" for key, value in environment().items())
    (out / f"{name}.md").write_text(f"# {name}\n\n{about}\n\n{facts}\n\n{table.to_markdown(index=False)}\n")
    print(f"\n{name}: {about}\n{table.to_string(index=False)}", flush=True)


def bars(
    table: pd.DataFrame, groups: Sequence[str], kinds: str | None, value: str, name: str, out: Path, line: float = 1.0
) -> None:
    """Plot a column of a table as ``name``.png: a group of bars for each row of the columns ``groups``, a bar of it for
    each value of the column ``kinds``, and a line where nothing is gained."""
    told = [column for column in groups if table[column].nunique() > 1] or list(groups)
    label = table[told].astype(str).agg(" | ".join, axis=1).rename("")
    kinds_of = table[kinds] if kinds else value
    table = table.assign(label=label, kinds=kinds_of)
    wide = table.pivot(index="label", columns="kinds", values=value).loc[
        label.unique(), kinds_of.unique() if kinds else [value]
    ]
    height = 1.2 + 0.18 * wide.size + 0.15 * len(wide)
    axes = wide.iloc[::-1].plot.barh(figsize=(9, height), width=0.8, legend=False)
    if kinds is not None:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    axes.axvline(line, color="grey", linewidth=1)
    axes.set_xlabel(value)
    axes.set_ylabel("")
    axes.figure.savefig(out / f"{name}.png", dpi=100, bbox_inches="tight")
    plt.close(axes.figure)
