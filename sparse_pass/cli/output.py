"""What the commands print: tables by rich, an optional extra of the package."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from ..config import Config, Scheme, scheme_text
from ..doctor import Diagnosis
from ..predict.forecast import Forecast, Layer
from ..report import Site

if TYPE_CHECKING:
    from rich.console import Console


_WIDTH = 140


class NoRich(ModuleNotFoundError):
    """rich is missing."""


def console() -> Console:
    """Where tables go. NoRich if rich is not installed."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        raise NoRich('tables need rich: pip install "sparse_pass[cli]"') from None
    # Where nobody watches, as in a file, no terminal says how wide a table may be.
    return Console() if sys.stdout.isatty() else Console(width=_WIDTH)


def show_diagnosis(found: Diagnosis) -> None:
    """What `doctor` found, for people."""
    from rich.table import Table

    out = console()
    about = Table(show_header=False, box=None)
    for name in ("python", "torch", "cuda", "triton", "cusparselt", "cache"):
        about.add_row(name, getattr(found, name))
    about.add_row("", found.cache_about)
    out.print(about)
    if found.devices:
        table = Table("GPU", "capability", "dtype", "layout", "verified", "kernels")
        for device in found.devices:
            for one in device.kernels:
                major, minor = device.capability
                verified = "yes" if one.verified else "no"
                table.add_row(device.name, f"{major}.{minor}", one.dtype, one.layout or "-", verified, one.about)
        out.print(table)
    if found.accelerated:
        out.print("[green]2:4 kernels can run here[/green]; `sparse-pass explain MODEL` says which layers gain")
    else:
        out.print(f"[red]nothing can be accelerated here[/red]: {found.remedy}", soft_wrap=True)


def show_forecast(report: Forecast, config: Config, *, every: bool) -> None:
    """A table of layers, the summary, and the config to paste."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    out = console()
    heads = ("linear", "M, N, K", "scheme", "output", "grad_input", "grad_weight", "all", "reason")
    rows = forecast_rows(report, every=every)
    shown = [at for at, head in enumerate(heads) if head != "reason" or any(row[at] for row in rows)]
    caption = "1.30x: a 2:4 kernel, and how many times faster than dense. all: the three, and making their operands"
    table = Table(title=f"predicted for {report.gpu}", caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for at in shown:
        table.add_column(heads[at], overflow="fold", no_wrap=heads[at] == "M, N, K")
    for row in rows:
        table.add_row(*(row[at] for at in shown))
    out.print(table)
    for line in report.summary():
        out.print(line, soft_wrap=True, highlight=False)
    for line in (*report.notes, *(f"unmatched: {text!r} named no linear" for text in report.unmatched)):
        out.print(f"note: {line}", soft_wrap=True, highlight=False)
    if any(config.values()):
        out.print("\n" + config_text(config), soft_wrap=True, highlight=False, markup=False)
    else:
        out.print("\nno linear of this model gains at this size: train it dense, or with more rows in a step")


def forecast_rows(report: Forecast, *, every: bool) -> list[list[str]]:
    """Cells of the table: one row for all layers that are alike but for numbers in their names, unless ``every``."""
    sites = iter(report.sites)
    grouped: dict[tuple[str, ...], list[str]] = {}
    for layer in report.layers:
        site = next(sites) if layer.named else None
        cells = _cells(layer, site)
        name = layer.fqn if every else re.sub(r"(?<![^.])\d+(?![^.])", "*", layer.fqn)
        grouped.setdefault((name, *cells), []).append(layer.fqn)
    return [
        [f"{name} ({len(names)})" if len(names) > 1 else names[0], *cells] for (name, *cells), names in grouped.items()
    ]


def _cells(layer: Layer, site: Site | None) -> tuple[str, ...]:
    shape = ", ".join(map(str, layer.shape))
    if site is None:
        return shape, "-", "dense", "dense", "dense", "-", "not named"
    kernels = []
    for name, gain in layer.gains().items():
        kernel = getattr(site, name) or "-"
        kernels.append(f"{gain:.2f}x" if kernel == "cusparselt" and gain is not None else kernel)
    gain_of_layer = f"{layer.gain:.2f}x" if layer.dense_us else "?"
    return shape, scheme_text(site.scheme), *kernels, gain_of_layer, site.reason


def config_text(config: Config) -> str:
    """Python that makes a config."""
    lines = [f"    {name!r}: {_code(scheme)}," for name, scheme in config.items()]
    return "\n".join(["import sparse_pass as sp", "", "config = {", *lines, "}"])


def _code(scheme: Scheme | None) -> str:
    if isinstance(scheme, tuple):
        return f"({', '.join(_code(one) for one in scheme)})"
    if scheme is None:
        return "None"
    changed = [f"{f.name}={getattr(scheme, f.name)!r}" for f in fields(scheme) if getattr(scheme, f.name) != f.default]
    return f"sp.{type(scheme).__name__}({', '.join(changed)})"


def show_rows(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """A plain table."""
    from rich.table import Table

    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row.values()))
    console().print(table)
