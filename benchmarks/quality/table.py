"""Make the table and the plot of a sweep: how many more steps does a recipe need for dense's held-out loss?

    python benchmarks/quality/table.py                      # reads and writes benchmarks/results/quality
    python benchmarks/quality/table.py --runs out/runs.jsonl --out out

A recipe's *steps factor* is its steps over the steps after which dense training, with a schedule of that length, has
the same held-out loss: dense runs of several lengths make a curve, loss over the logarithm of the steps, that is read
between its points (beyond them along its outermost piece: marked with *). *Time to loss* is the factor times the mean
step time (dense = 1, `step_times`; estimates are marked with ~): below 1, the recipe pays.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from config import Config, from_json, key
from matplotlib import pyplot as plt
from step_times import STEP_MS, step_time

CURVES = ("dense", "dense_batch2")
"""The names of the runs that the others are held against."""


@dataclass(frozen=True)
class Curve:
    """Dense training: (steps, mean held-out loss), by steps."""

    points: tuple[tuple[int, float], ...]

    def steps(self, loss: float) -> float:
        """After how many steps dense training has this loss; NaN with fewer than two points."""
        if len(self.points) < 2:
            return math.nan
        pieces = list(itertools.pairwise(self.points))
        (a, loss_a), (b, loss_b) = next((piece for piece in pieces if loss > piece[1][1]), pieces[-1])
        share = (loss - loss_a) / (loss_b - loss_a)
        return math.exp(math.log(a) + share * (math.log(b) - math.log(a)))

    def covers(self, loss: float) -> bool:
        return len(self.points) > 1 and self.points[-1][1] <= loss <= self.points[0][1]


@dataclass(frozen=True)
class Row:
    """A recipe: the runs that differ in their seed alone."""

    config: Config
    records: tuple[dict, ...]
    curve: Curve

    def losses(self, name: str = "held_out") -> list[float]:
        return [record[name] for record in self.records]

    def factors(self) -> list[float]:
        return [self.config.steps / self.curve.steps(loss) for loss in self.losses()]

    def values(self) -> dict[str, object]:
        losses, factors, last = self.losses(), self.factors(), self.records[0]["measures"][-1:]
        finite = [loss for loss in losses if math.isfinite(loss)]
        values: dict[str, object] = {
            "recipe": self.config.name,
            "steps": self.config.steps,
            "seeds": len(losses),
            "diverged": len(losses) - len(finite),
            "held-out loss": _mean(finite, 4),
            "lowest": min(finite, default=math.nan),
            "highest": max(finite, default=math.nan),
            "run dense": _mean(self.losses("held_out_dense"), 4),
            "steps factor": _mean(factors, 3),
            "factor spread": round((max(factors) - min(factors)) / 2, 3),
            "beyond the curve": "" if all(map(self.curve.covers, finite)) else "*",
            "kept": last[0]["kept"] if last else math.nan,
            "flips": last[0]["flips"] if last else math.nan,
        }
        for model in STEP_MS:
            time, measured = step_time(self.config, model) or (math.nan, True)
            values[f"step time {model}"] = round(time, 3)
            values[f"time to loss {model}"] = round(time * values["steps factor"], 3)
            values[f"estimate {model}"] = "" if measured else "~"
        values["emulated step ms"] = self.records[0]["step_ms"]
        return values


def read(files: Sequence[Path]) -> list[dict]:
    """The records, each run once."""
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines() if line]
    return list({key(from_json(record["config"])): record for record in lines}.values())


def rows(records: list[dict]) -> dict[str, list[Row]]:
    """By title: a model, a batch and a text, within which losses can be compared."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for record in records:
        config = from_json(record["config"])
        shape = (config.dim, config.layers, config.context, config.batch, record["text"]["digest"])
        groups[shape].append(record)
    return {_title(group): _group_rows(group) for group in groups.values()}


def _title(group: list[dict]) -> str:
    config, text = from_json(group[0]["config"]), group[0]["text"]
    return (
        f"{group[0]['parameters'] / 1e6:.1f}M parameters (d={config.dim}, {config.layers} layers),"
        f" {config.context * config.batch:,} tokens a step, text {text['digest']}"
        f" of {(text['train'] + text['held_out']) / 1e6:.0f} MB"
    )


def _group_rows(group: list[dict]) -> list[Row]:
    recipes: dict[Config, list[dict]] = defaultdict(list)
    for record in group:
        recipes[replace(from_json(record["config"]), seed=0)].append(record)
    dense: dict[int, float] = {
        config.steps: fmean(record["held_out"] for record in found)
        for config, found in recipes.items()
        if config.name in CURVES
    }
    curve = Curve(tuple(sorted(dense.items())))
    made = [Row(config, tuple(found), curve) for config, found in recipes.items()]
    return sorted(made, key=lambda row: (row.config.steps * (row.config.name in CURVES), _order(row)))


def _order(row: Row) -> float:
    factor = fmean(row.factors())
    return factor if math.isfinite(factor) else math.inf


def _mean(values: list[float], digits: int) -> float:
    return round(fmean(values), digits) if values else math.nan


def markdown(title: str, table: list[Row]) -> str:
    """The columns that a reader needs; the CSV has all."""
    head = ["recipe", "steps", "seeds", "held-out loss (lowest to highest)", "run dense", "steps factor"]
    head += [f"{what}, {model}" for model in STEP_MS for what in ("step time", "time to loss")]
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", "|:---" + "|---:" * (len(head) - 1) + "|"]
    for row in table:
        v = row.values()
        loss = f"{v['held-out loss']:.4f}" + (f" ({v['lowest']:.4f} to {v['highest']:.4f})" if v["seeds"] > 1 else "")
        loss += f", {v['diverged']} diverged" if v["diverged"] else ""
        factor = f"{v['steps factor']:.3f}" + (f" ± {v['factor spread']:.3f}" if v["seeds"] > 1 else "")
        cells = [f"`{v['recipe']}`", f"{v['steps']:,}", f"{v['seeds']}", loss, f"{v['run dense']:.4f}"]
        cells.append(factor + v["beyond the curve"])
        for model in STEP_MS:
            cells += [f"{v[f'estimate {model}']}{v[f'{what} {model}']:.3f}" for what in ("step time", "time to loss")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def environments(records: list[dict]) -> list[str]:
    found = defaultdict(set)
    for record in records:
        for name, value in record["environment"].items():
            found[name].add(value)
    return [f"- {name}: {', '.join(sorted(values))}" for name, values in found.items()]


def plot(groups: dict[str, list[Row]], path: Path) -> None:
    """Steps factor and time to loss of each recipe, a panel for each group."""
    shown = {title: [row for row in table if math.isfinite(_order(row))] for title, table in groups.items()}
    shown = {title: table for title, table in shown.items() if table}
    if not shown:
        return
    heights = [1 + len(table) for table in shown.values()]
    figure, panels = plt.subplots(
        len(shown), 1, figsize=(9, 0.24 * sum(heights) + 1.2 * len(shown)), squeeze=False, height_ratios=heights
    )
    for (title, table), axes in zip(shown.items(), panels[:, 0], strict=True):
        for place, row in enumerate(table):
            values, factors = row.values(), row.factors()
            axes.plot(factors, [place] * len(factors), "o-", color="C0", label="" if place else "steps factor, seeds")
            for color, model in enumerate(STEP_MS, 1):
                label = "" if place else f"time to loss, {model}"
                axes.plot(values[f"time to loss {model}"], place, "|", color=f"C{color}", markersize=11, label=label)
        axes.set_yticks(range(len(table)), [f"{row.config.name}, {row.config.steps:,}" for row in table], fontsize=7)
        axes.invert_yaxis()
        axes.axvline(1, color="grey", linewidth=1)
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("dense = 1", fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    panels[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    default = Path(__file__).parent.parent / "results" / "quality"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", default=[default / "runs.jsonl"])
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    records = read(args.runs)
    groups = rows(records)
    args.out.mkdir(parents=True, exist_ok=True)
    explained = __doc__.split("\n\n")[-1].strip()
    command = "- command: python benchmarks/quality/sweep.py, then python benchmarks/quality/table.py"
    facts = "\n".join([*environments(records), command])
    tables = "\n\n".join(markdown(title, table) for title, table in groups.items())
    text = f"# Time to loss\n\n{explained}\n\n{facts}\n\n{tables}\n\n![steps factors](quality.png)\n"
    (args.out / "quality.md").write_text(text)
    lines = [{"group": title} | row.values() for title, table in groups.items() for row in table]
    with (args.out / "quality.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)
    plot(groups, args.out / "quality.png")
    print(text)


if __name__ == "__main__":
    main()
