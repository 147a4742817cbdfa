"""A report of what would happen on a GPU, with the times that are predicted for it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import nn

from ..config import Config, Scheme, WeightSparsity, input_scheme, is_float8, weight_scheme
from ..fqn import parse_config
from ..plan.costs import Preparation
from ..plan.table import ESTIMATORS, estimated, structured_operands
from ..report import Report, Site
from ..serialize import refuse_unknown
from ..vocabulary import KERNEL_DTYPES, GemmName
from .costs import Predicted
from .work import Work, rest_us

_GEMMS: tuple[GemmName, ...] = get_args(GemmName)
_SPARSE = "cusparselt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One linear of the model, named by the config or not. Times are predicted GPU microseconds of one call."""

    fqn: str
    named: bool
    shape: tuple[Any, Any, Any]
    """M, N, K."""
    flops: int
    """Of its GEMMs; 0 where M is not known."""
    dense_us: tuple[float, ...] = ()
    """Of output, grad_input and grad_weight, 0 where the graph has none. Empty where nothing is predicted."""
    planned_us: tuple[float, ...] = ()
    """The same as planned."""
    preparation_us: float = 0.0
    """Of making the structured operands, packed or dense, that the plan asks for."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data, for JSON."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Layer:
        """What `to_dict` wrote. ValueError for a key that is not known."""
        refuse_unknown("Layer.from_dict", data, [field.name for field in fields(cls)])
        values: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in data.items()}
        return cls(**values)

    @property
    def before_us(self) -> float:
        """All of the dense layer."""
        return sum(self.dense_us)

    @property
    def after_us(self) -> float:
        """All of the planned layer."""
        return sum(self.planned_us) + self.preparation_us

    @property
    def gain(self) -> float:
        """How many times faster the layer is, all counted."""
        return self.before_us / self.after_us if self.after_us else 1.0

    def gains(self) -> dict[str, float | None]:
        """How many times faster each GEMM is, without the making of its operand; None where there is none."""
        pairs = zip(_GEMMS, self.dense_us or (0.0,) * 3, self.planned_us or (0.0,) * 3, strict=True)
        return {name: before / after if after else None for name, before, after in pairs}


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast(Report):
    """What :func:`explain` gives for a GPU that is named: the report as it would be there, and predicted times."""

    gpu: str = ""
    layers: tuple[Layer, ...] = ()
    """All linears of the graphs, in their order; those that the config does not name as well."""
    attention_us: float = 0.0
    other_us: float = 0.0
    """Of other matmuls and convolutions, of what lies between matmuls, and of the optimizer in training: estimated by
    operations and bytes, and not measured."""

    @property
    def coverage(self) -> float:
        """The share of the FLOPs of all linears that the config names."""
        total = sum(layer.flops for layer in self.layers)
        return sum(layer.flops for layer in self.layers if layer.named) / total if total else 0.0

    @property
    def dense_us(self) -> float:
        """A dense step."""
        return sum(layer.before_us for layer in self.layers) + self.attention_us + self.other_us

    @property
    def step_us(self) -> float:
        """A step as planned."""
        return sum(layer.after_us for layer in self.layers) + self.attention_us + self.other_us

    @property
    def gain(self) -> float:
        """How many times faster the step is."""
        return self.dense_us / self.step_us if self.step_us else 1.0

    def summary(self) -> list[str]:
        """What is predicted, in lines."""
        linears = sum(layer.before_us for layer in self.layers)
        return [
            f"predicted for {self.gpu}: a step takes {self.step_us / 1e3:.1f} ms, {self.dense_us / 1e3:.1f} ms dense:"
            f" {self.gain:.2f}x",
            f"of the dense step: linears {linears / 1e3:.1f} ms, attention {self.attention_us / 1e3:.1f} ms, all else"
            f" {self.other_us / 1e3:.1f} ms",
            f"the config names {self.coverage:.0%} of the FLOPs of all linears",
            "GEMM times are interpolated from shipped measurements in bfloat16, all else is estimated by operations and"
            " bytes: on the GPU itself kernels are measured",
        ]

    def _remarks(self) -> list[str]:
        return [*self.summary(), *Report._remarks(self)]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data, for JSON."""
        data = Report.to_dict(self)
        data["layers"] = [layer.to_dict() for layer in self.layers]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Forecast:
        """What `to_dict` wrote. ValueError for a key that is not known."""
        refuse_unknown("Forecast.from_dict", data, [field.name for field in fields(cls)])
        layers = tuple(Layer.from_dict(layer) for layer in data.get("layers", ()))
        report = Report.from_dict({name: data[name] for name in data.keys() & _FIELDS_OF_REPORT})
        values: dict[str, Any] = {name: getattr(report, name) for name in _FIELDS_OF_REPORT}
        values |= {name: value for name, value in data.items() if name not in _FIELDS_OF_REPORT}
        return cls(**{**values, "layers": layers})


_FIELDS_OF_REPORT = tuple(field.name for field in fields(Report))


_OTHERS = "re:.*"
_AS_DENSE = WeightSparsity(backend="masked_dense")


def with_others(config: Config) -> tuple[frozenset[str], dict[str, Scheme | None]]:
    """A config that names all linears of a model, for their shapes, and which of its keys stand for those left dense.

    An entry that is None leaves what it names to such a key, which comes first where the entry is an exact name.
    """
    exact = {f"re:{re.escape(one.text)}": one.text for one in parse_config(config) if one.exact and one.scheme is None}
    everything: dict[str, Scheme | None] = dict.fromkeys(exact, _AS_DENSE)
    everything |= {text: scheme or _AS_DENSE for text, scheme in config.items() if text not in exact.values()}
    everything.setdefault(_OTHERS, _AS_DENSE)
    left = {text for text, scheme in config.items() if scheme is None}
    return frozenset({*exact, *left, *({_OTHERS} - config.keys())}), everything


def forecast(report: Report, others: Collection[str], costs: Predicted, work: Work, model: nn.Module) -> Forecast:
    """A report of all linears, with the times of the GPU.

    Args:
        report: of a config that `with_others` made.
        others: the keys of it whose rows are no part of the result.
    """
    layers = tuple(layer_of(site, costs, named=site.pattern not in others) for site in report.sites)
    training = any(site.training for site in report.sites)
    dtypes = {site.dtype for site in report.sites}
    size = max((dtype.itemsize for dtype in dtypes), default=2)
    attention, other = rest_us(work, model, [layer.shape for layer in layers], size, costs.gpu, training=training)
    notes = report.notes
    if dtypes - set(KERNEL_DTYPES):
        text = "GEMMs that are not in bfloat16 or float16 are not predicted: call the model under torch.autocast"
        notes += (f"{text}, or make it a bfloat16 one",)
    if any(is_float8(site.scheme) for site in report.sites):
        notes += ("no times of float8 GEMMs are shipped: they count as 2:4 ones of 16 bits, and may be faster",)
    sites = tuple(_predicted(site) for site in report.sites if site.pattern not in others)
    values = {name: getattr(report, name) for name in _FIELDS_OF_REPORT} | {"sites": sites, "notes": notes}
    return Forecast(**values, gpu=costs.gpu.name, layers=layers, attention_us=attention, other_us=other)


def _predicted(site: Site) -> Site:
    """The plan knows of measurements alone."""
    return replace(site, reason=site.reason.replace("measured slower", "predicted slower"), measured=False)


def layer_of(site: Site, costs: Predicted, *, named: bool) -> Layer:
    """What is predicted of one row of a report."""
    there = {name: getattr(site, name) is not None for name in _GEMMS}
    if site.status == "skipped":  # it is dense, and the report has no kernels
        there = {"output": True, "grad_input": bool(site.training), "grad_weight": bool(site.training)}
    sizes = [size for size in site.shape if isinstance(size, int)]
    if len(sizes) < 3:
        return Layer(fqn=site.fqn, named=named, shape=site.shape, flops=0)
    m, n, k = sizes
    flops = 2 * m * n * k * sum(there.values())
    if site.dtype not in KERNEL_DTYPES:
        return Layer(fqn=site.fqn, named=named, shape=site.shape, flops=flops)
    dense, planned = [], []
    for name, form in _forms(site.scheme).items():
        # That of a weight in grad_input is asked for as the linear of the transposed weight.
        linear = costs.gpu.gemm("linear", m, *((k, n) if name == "grad_input" else (n, k)))
        sparse = linear if form == "linear" else costs.gpu.gemm(form, m, n, k)
        dense.append(linear[0] if there[name] else 0.0)
        planned.append(sparse[1] if getattr(site, name) == _SPARSE else dense[-1])
    return Layer(
        fqn=site.fqn, named=named, shape=site.shape, flops=flops,
        dense_us=tuple(dense), planned_us=tuple(planned),
        preparation_us=_preparation(site, costs, m, n, k) if named and site.status != "skipped" else 0.0,
    )  # fmt: skip


def _forms(scheme: Scheme) -> dict[GemmName, str]:
    """The form of each GEMM, as `plan.costs.Product` has it; those that stay dense are like that of a linear."""
    of_role: dict[GemmName, dict[str, str]] = {
        "output": {"input": "input"},
        "grad_input": {"grad_output": "grad_input"},
        "grad_weight": {"grad_output": "grad_weight", "input": "input_grad_weight"},
    }
    roles = structured_operands(scheme)
    return {name: of_role[name].get(str(roles[name]), "linear") for name in _GEMMS}


def _preparation(site: Site, costs: Predicted, m: int, n: int, k: int) -> float:
    """Of all structured operands: packed where a 2:4 kernel reads them, else dense."""
    weight, input, roles = weight_scheme(site.scheme), input_scheme(site.scheme), structured_operands(site.scheme)
    estimators = estimated(site.scheme)
    total = 0.0
    for role in dict.fromkeys(role for role in roles.values() if role is not None):
        readers = [name for name in _GEMMS if roles[name] == role and getattr(site, name) is not None]
        if role == "grad_output":  # each GEMM draws one of its own
            operands = [(ESTIMATORS[estimators[name]].measured_as.get(name, ""), (m, n), "") for name in readers]
        elif role == "weight" and weight is not None:
            operands = [("S(W)", (n, k), weight.mask)] * bool(readers)
        else:
            operands = [("S(X)", (m, k), input.mask if input is not None else "")] * bool(readers)
        for (operand, shape, mask), reader in zip(operands, readers, strict=False):
            times = costs.preparation(
                Preparation(
                    operand=operand, device=torch.device("meta"), shape=shape, stored=site.dtype, dtype=site.dtype,
                    mask=mask,
                )
            )  # fmt: skip
            kernels = [getattr(site, reader)] if role == "grad_output" else [getattr(site, name) for name in readers]
            total += times[0 if _SPARSE in kernels else 1] if times is not None else 0.0
    return total
