"""A model by its name, with random weights on the meta device, and inputs for it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


class NoModel(ValueError):
    """A model that cannot be made, and what to write instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A model and the arguments of one call."""

    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any]


_TOKENS, _SEQUENCES, _IMAGES = 2048, 8, 64


def make_model(
    name: str, dtype: torch.dtype, *, batch: int | None = None, tokens: int | None = None, settings: Sequence[str] = ()
) -> Made:
    """Make a model on the meta device.

    Args:
        name: ``package.module:factory``, a timm name, a transformers model type or the path of its config.
        settings: ``field=value``, for timm's ``create_model`` or the config of transformers.

    Raises:
        NoModel: what cannot be found or made.
    """
    sizes = dict(map(_setting, settings))
    if ":" in name:
        return _from_factory(name, dtype, sizes)
    for of_library in (_from_timm, _from_transformers):
        made = of_library(name, dtype, batch, tokens, sizes)
        if made is not None:
            return made
    missing = [one for one in ("timm", "torchvision", "transformers") if importlib.util.find_spec(one) is None]
    hint = f"; {' and '.join(missing)} not installed: pip install {' '.join(missing)}" if missing else ""
    raise NoModel(f"{name!r} is no package.module:factory, no timm name, no transformers model type or config{hint}")


def _setting(text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise NoModel(f"--set {text!r}: expected FIELD=VALUE such as hidden_size=4096")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return field, value  # a word


def _from_factory(name: str, dtype: torch.dtype, sizes: dict[str, Any]) -> Made:
    module, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise NoModel(f"{name!r} cannot be imported: {error}") from None
    with torch.device("meta"):
        made = factory(**sizes)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise NoModel(
            f"{name!r} returned {type(made).__name__}: expected (model, inputs), with inputs a tuple or a dict"
        )
    model, inputs = made
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    moved = torch.utils._pytree.tree_map_only(torch.Tensor, lambda one: _as_input(one, dtype), inputs)
    args, kwargs = ((), moved) if isinstance(moved, dict) else (tuple(moved), {})
    return Made(model=model.to("meta", dtype), args=args, kwargs=kwargs)


def _as_input(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to("meta", dtype) if tensor.is_floating_point() else tensor.to("meta")


def _from_timm(
    name: str, dtype: torch.dtype, batch: int | None, tokens: int | None, sizes: dict[str, Any]
) -> Made | None:
    # timm imports torchvision, which one may have left out with --no-deps: names of transformers work all the same.
    if importlib.util.find_spec("timm") is None or importlib.util.find_spec("torchvision") is None:
        return None
    import timm

    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, **sizes)
    shape = (batch or _IMAGES, *sizes.get("input_size", model.pretrained_cfg["input_size"]))
    return Made(model=model.to(dtype), args=(torch.empty(shape, device="meta", dtype=dtype),), kwargs={})


def _from_transformers(
    name: str, dtype: torch.dtype, batch: int | None, tokens: int | None, sizes: dict[str, Any]
) -> Made | None:
    if importlib.util.find_spec("transformers") is None:
        return None
    import transformers

    if Path(name).exists():
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=True, **sizes)
    elif name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name, **sizes)
    else:
        return None
    config.use_cache = False
    kinds = (
        transformers.AutoModelForMaskedLM,
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageClassification,
        transformers.AutoModel,
    )
    kind = next((one for one in kinds if type(config) in one._model_mapping), None)
    if kind is None:
        raise NoModel(
            f"{name!r}: transformers has no model class for {type(config).__name__} that takes text or images"
        )
    with torch.device("meta"):
        model = kind.from_config(config).to(dtype)
    if model.main_input_name == "pixel_values":
        side = config.image_size
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        image = torch.empty(batch or _IMAGES, config.num_channels, height, width, device="meta", dtype=dtype)
        return Made(model=model, kwargs={"pixel_values": image})
    longest = getattr(config, "max_position_embeddings", None) or _TOKENS
    shape = (batch or _SEQUENCES, tokens or min(_TOKENS, longest))
    return Made(model=model, kwargs={"input_ids": torch.zeros(shape, device="meta", dtype=torch.long)})
