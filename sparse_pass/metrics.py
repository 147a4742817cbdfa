"""How masks and weights fare during a training, read every n steps."""

from __future__ import annotations

import csv as csv_format
import math
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from .config import Config
from .fqn import parse_config
from .model_names import check_names
from .ops.definitions import mask24
from .ops.shards import local, why_not_whole_tiles
from .prune import PrunedWeight, pruned_weights

COLUMNS = ("flip_rate", "kept_magnitude", "kept_square", "dropped_gradient")
_BITS = 8

Readings: TypeAlias = "dict[int, dict[str, dict[str, float]]]"


class ScalarWriter(Protocol):
    """What TensorBoard's ``SummaryWriter`` has."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one value."""


class Metrics:
    """What the masks do to the weights of the named layers, every n steps::

        metrics = sp.Metrics(model, config, every=50)
        for batch in batches:
            loss(batch).backward()
            metrics.step()  # gradients are there, the optimizer has not moved the weights yet
            optimizer.step()
        metrics.read(csv="masks.csv", writer=SummaryWriter())

    Values of a layer with weight W, mask m (as training chooses it), and gradient G:

        flip_rate         share of the elements of m that are not as at the last measurement: |m xor m_last| / (N K)
                          (Hu et al. 2024, arXiv 2404.01847, there from step to step). NaN the first time
        kept_magnitude    sum |m W| / sum |W|
        kept_square       sum (m W)^2 / sum W^2
        dropped_gradient  norm(G where m drops) / norm(G). NaN without a gradient

    A ``scale`` of the scheme is left out: it is a known factor. Values are NaN too where they would divide by zero.
    Sums are in float32, on the device of the weight; nothing waits for the device until ``read``. Between measurements
    one bit per weight is kept.

    The layers are those of :func:`prune_`; those that it leaves dense are in ``skipped``, and warned of once. They are
    measured whether the step is a sparse one or, by a `Schedule`, a dense one. Of parameters that are sharded (DTensor,
    as of FSDP2) the part of this process is measured, so each process has its own values; a part whose dims are no
    multiples of 4 cuts tiles, and is skipped.

    Args:
        model: any module; compiled or wrapped ones too.
        config: names to schemes, as for :func:`prune_`.
        every: measure in steps 0, every, 2 * every and so on.

    Raises:
        ValueError: what :func:`prune_` refuses; ``every`` below 1.
    """

    def __init__(self, model: nn.Module, config: Config, *, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"Metrics(every={every!r}): expected a number of steps, 1 or more")
        check_names(model, parse_config(config))
        self.skipped: dict[str, str] = {}
        """Why a named layer is not measured."""
        self._model = model
        self._config = config
        self._every = every
        self._next = 0
        self._bits: dict[str, Tensor] = {}
        self._pending: dict[int, dict[str, Tensor]] = {}

    def step(self, step: int | None = None) -> bool:
        """A backward is done. Returns whether this step is measured.

        Args:
            step: its number; by default one more than that of the last call, from 0 on.
        """
        step = self._next if step is None else step
        self._next = step + 1
        if step % self._every:
            return False
        self._pending[step] = self._measure()
        return True

    def read(self, *, csv: str | PathLike[str] | None = None, writer: ScalarWriter | None = None) -> Readings:
        """All measurements since the last call: step -> layer -> name -> value. Waits for the device.

        Args:
            csv: a file to append a row per step and layer to; with a head if it is new. NaN is an empty cell.
            writer: gets each value but NaN by ``add_scalar(f"{name}/{layer}", value, step)``, as TensorBoard's does.
        """
        pending, self._pending = self._pending, {}
        readings = {step: _on_host(values) for step, values in pending.items()}
        if csv is not None:
            _append(Path(csv), readings)
        if writer is not None:
            for step, layers in readings.items():
                for layer, values in layers.items():
                    for name, value in values.items():
                        if not math.isnan(value):
                            writer.add_scalar(f"{name}/{layer}", value, step)
        return readings

    @torch.no_grad()
    def _measure(self) -> dict[str, Tensor]:
        measured, skipped = {}, {}
        for one in pruned_weights(self._model, self._config):  # anew: FSDP2 replaces parameters, others load data late
            reason = one.reason or why_not_whole_tiles(local(one.weight))
            if one.weight.is_meta:
                reason = reason or "it is on the meta device and has no data"
            if reason:
                skipped[one.name] = reason
            else:
                measured[one.name] = self._values(one)
        new = [f"{name!r}: {reason}" for name, reason in skipped.items() if name not in self.skipped]
        self.skipped |= skipped
        if new:
            warnings.warn(f"sparse_pass: Metrics leaves out {'; '.join(new)}", stacklevel=4)
        return measured

    def _values(self, one: PrunedWeight) -> Tensor:
        """The values of a layer, in the order of `COLUMNS`, float32 on its device."""
        assert one.sparsity is not None
        weight = local(one.weight.detach())
        mask = mask24(weight.to(one.seen), one.sparsity.mask)
        kept = weight.masked_fill(~mask, 0)
        ratios = [_norm(kept, order) / _norm(weight, order) for order in (1, 2)]
        if one.weight.grad is None:
            dropped = torch.full_like(ratios[0], math.nan)
        else:
            gradient = local(one.weight.grad.detach())
            dropped = _norm(gradient.masked_fill(mask, 0)) / _norm(gradient)
        return torch.stack([self._flips(one.name, mask), ratios[0], ratios[1].square(), dropped])

    def _flips(self, name: str, mask: Tensor) -> Tensor:
        places = torch.arange(_BITS, dtype=torch.uint8, device=mask.device)
        bits = (mask.reshape(-1, _BITS).to(torch.uint8) << places).sum(-1, dtype=torch.uint8)
        last, self._bits[name] = self._bits.get(name), bits
        if last is None or last.shape != bits.shape:
            return torch.full((), math.nan, device=mask.device)
        changed = ((last ^ bits).unsqueeze(-1) >> places) & 1
        return changed.sum(dtype=torch.int64).float() / mask.numel()


def _norm(tensor: Tensor, order: int = 2) -> Tensor:
    norm: Tensor = vector_norm(tensor, order, dtype=torch.float32)
    return norm


def _on_host(values: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    layers: dict[str, dict[str, float]] = {}
    for device in {tensor.device for tensor in values.values()}:
        here = [name for name, tensor in values.items() if tensor.device == device]
        rows = torch.stack([values[name] for name in here]).tolist()  # one copy from each device
        layers |= {name: dict(zip(COLUMNS, row, strict=True)) for name, row in zip(here, rows, strict=True)}
    return {name: layers[name] for name in values}


def _append(path: Path, readings: Readings) -> None:
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv_format.writer(file)
        if is_new:
            writer.writerow(["step", "layer", *COLUMNS])
        for step, layers in readings.items():
            for layer, values in layers.items():
                writer.writerow([step, layer, *("" if math.isnan(value) else value for value in values.values())])
