"""What the pass did: one frozen record per named linear and compiled graph, printed as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from html import escape
from typing import Any, Literal, TypeAlias

import torch

from .config import Scheme, scheme_text
from .serialize import refuse_unknown, scheme_from_dict, scheme_to_dict

Status: TypeAlias = Literal["sparse", "masked_dense", "skipped"]
Dim: TypeAlias = "int | torch.SymInt | str"


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One named linear in one compiled graph.

    A GEMM field holds its kernel: ``"cusparselt"``, ``"cutlass"`` (of torch, on SM8x without cuSPARSELt),
    ``"masked_dense"``, ``"dense"``, ``"reference"`` (CPU kernels, for tests), or None where the graph has no such GEMM.
    """

    fqn: str
    """Module name, or parameter name where no linear module owns the weight."""
    pattern: str
    """The config key that named it."""
    scheme: Scheme
    """As the config has it."""
    shape: tuple[Dim, Dim, Dim]
    """(M, N, K): input [M, K], weight [N, K], output [M, N], as this rank computes them (see ``shard_of``). M may be
    symbolic (a string such as ``"s0*128"``)."""
    dtype: torch.dtype
    """dtype of the GEMMs (under autocast not the parameter's)."""
    status: Status
    reason: str = ""
    """Why not sparse, or what was not found; empty when all went as asked."""
    output: str | None = None
    grad_input: str | None = None
    grad_weight: str | None = None
    fused: str | None = None
    """The activation function that the kernel of a 2:4 input computes by itself, such as ``"squared_relu"``."""
    measured: bool = False
    """Whether it is a measurement that chose dense matmuls of the masked operand over 2:4 kernels."""
    training: bool | None = None
    """Whether the graph has a backward: a graph of inference has none. None if there is no graph, as of `prune_`."""
    shard_of: str = ""
    """Where the graph has a shard of the weight, as under tensor parallelism: the shape of the whole weight, and how it
    is split, such as ``"[128, 64], rows in 2 over mesh dim 'tp'"``."""
    serves: tuple[str, ...] = ()
    """Other layers that have run this very row: parts of a model that are compiled one by one share a graph where they
    are alike and treated alike."""
    steps: str = ""
    """The steps of a `Schedule` in which the graph runs, such as ``"steps 500 to 7499"``; empty without a schedule."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data, for JSON."""
        data: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        data["scheme"] = scheme_to_dict(self.scheme)
        data["shape"] = [dim if isinstance(dim, int) else str(dim) for dim in self.shape]
        data["dtype"] = str(self.dtype).removeprefix("torch.")
        data["serves"] = list(self.serves)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Site:
        """The row that `to_dict` wrote. ValueError for a key, a scheme or a dtype that is not known."""
        refuse_unknown("Site.from_dict", data, [field.name for field in fields(cls)])
        values = dict(data)
        values["scheme"] = scheme_from_dict(data["scheme"], f"scheme of {data['fqn']!r}")
        values["dtype"] = getattr(torch, data["dtype"], None)
        if not isinstance(values["dtype"], torch.dtype):
            raise ValueError(f"Site.from_dict: dtype {data['dtype']!r} of {data['fqn']!r} is no dtype of torch")
        for name in values.keys() & {"shape", "serves"}:
            values[name] = tuple(values[name])
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All named linears of one or more graphs, and the patterns that named nothing."""

    sites: tuple[Site, ...] = ()
    unmatched: tuple[str, ...] = ()
    """Config keys that named no linear in any graph compiled so far."""
    notes: tuple[str, ...] = ()
    """What a reader must know to read the rest, such as parameter names that were not visible."""
    graphs: int = 0
    """Compiled graphs that were looked at."""
    inference_graphs: int = 0
    """How many of them have no backward."""
    uncaptured: tuple[str, ...] = ()
    """Named linears of the model (known with ``model=``) that no graph holds: not called, or run eagerly and dense."""

    def __str__(self) -> str:
        lines = [self._head()]
        if self.sites:
            lines += _aligned(_table(self.sites))
        return "\n".join([*lines, *self._remarks()])

    def to_markdown(self) -> str:
        """The table of ``print(report)`` in Markdown, and its remarks as a list."""
        lines = [self._head()]
        if self.sites:
            head, *rows = [[cell.replace("|", "\\|") for cell in row] for row in _table(self.sites)]
            lines += ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))]
        remarks = [f"- {remark}" for remark in self._remarks()]
        return "\n".join([*lines, *([""] if remarks else []), *remarks])

    def _repr_html_(self) -> str:
        """The same, as a notebook shows it."""
        parts = [f"<p>{escape(self._head())}</p>"]
        if self.sites:
            head, *rows = _table(self.sites)
            colors = [_COLORS[site.status] for site in self.sites]
            parts.append(f"<table><thead><tr>{_cells('th', head)}</tr></thead><tbody>")
            for row, color in zip(rows, colors, strict=True):
                parts.append(f'<tr style="box-shadow: inset 4px 0 {color}">{_cells("td", row)}</tr>')
            parts.append("</tbody></table>")
        if remarks := self._remarks():
            parts.append(f"<ul>{''.join(f'<li>{escape(remark)}</li>' for remark in remarks)}</ul>")
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data, for JSON. ``Report.from_dict(report.to_dict()) == report``."""
        data = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _plain(value) for name, value in data.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote. ValueError for a key that is not known."""
        refuse_unknown("Report.from_dict", data, [field.name for field in fields(cls)])
        values: dict[str, Any] = {name: _frozen(value) for name, value in data.items()}
        return cls(**{**values, "sites": tuple(Site.from_dict(site) for site in data.get("sites", ()))})

    def _head(self) -> str:
        layers = {name for site in self.sites for name in (site.fqn, *site.serves)}
        by_status = {(site.status, name) for site in self.sites for name in (site.fqn, *site.serves)}
        counts = Counter(status for status, _ in by_status)
        head = f"sparse_pass: {len(layers)} named linears in {self.graphs} graph(s)"
        if 0 < self.inference_graphs < self.graphs:
            head += f", {self.inference_graphs} of inference"
        if counts:
            head += ": " + ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
        return head

    def _remarks(self) -> list[str]:
        """What is said below the table."""
        return [
            *(
                f"uncaptured: {name!r} is in no graph so far: it was not called, or Dynamo runs it eagerly, and so"
                " dense (TORCH_LOGS=graph_breaks says why)"
                for name in self.uncaptured
            ),
            *(f"unmatched: {pattern!r} named no linear" for pattern in self.unmatched),
            *(f"note: {note}" for note in self.notes),
        ]


def merge(reports: Iterable[Report], patterns: Iterable[str]) -> Report:
    """One report for several graphs. ``patterns`` are all config keys, in order."""
    reports = list(reports)
    if not reports:
        note = "no graph was compiled yet, or Dynamo ran the model without capturing it"
        return Report(unmatched=tuple(patterns), notes=(note,))
    nowhere = [pattern for pattern in patterns if all(pattern in r.unmatched for r in reports)]
    return Report(
        sites=tuple(site for report in reports for site in report.sites),
        unmatched=tuple(nowhere),
        notes=tuple(dict.fromkeys(note for report in reports for note in report.notes)),
        graphs=sum(report.graphs for report in reports),
        inference_graphs=sum(report.inference_graphs for report in reports),
    )


_COLUMNS: dict[str, Callable[[Site], str]] = {
    "fqn": lambda site: site.fqn,
    "graph": lambda site: "training" if site.training else "inference",
    "steps": lambda site: site.steps.removeprefix("steps "),
    "scheme": lambda site: scheme_text(site.scheme),
    "M, N, K": lambda site: ", ".join(map(str, site.shape)),
    "of weight": lambda site: site.shard_of,
    "status": lambda site: site.status,
    "output": lambda site: f"{site.output or '-'}{f' of {site.fused}' if site.fused else ''}",
    "grad_input": lambda site: site.grad_input or "-",
    "grad_weight": lambda site: site.grad_weight or "-",
    "reason": lambda site: site.reason,
}


_COLORS: dict[Status, str] = {"sparse": "#2e7d32", "masked_dense": "#f9a825", "skipped": "#c62828"}
"""Of a bar beside each row in a notebook; the row says it in words as well."""


def _table(sites: Sequence[Site]) -> list[list[str]]:
    """The columns, and a row of cells for each site. The kind of graph is a column where there are both."""
    columns = dict(_COLUMNS)
    if len({site.training for site in sites}) == 1:
        del columns["graph"]
    if not any(site.steps for site in sites):
        del columns["steps"]
    if not any(site.shard_of for site in sites):
        del columns["of weight"]
    return [list(columns), *([cell(site) for cell in columns.values()] for site in sites)]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cells(tag: str, row: Sequence[str]) -> str:
    return "".join(f'<{tag} style="text-align: left">{escape(cell)}</{tag}>' for cell in row)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [one.to_dict() if isinstance(one, Site) else one for one in value]
    return value
