"""A config worth naming, from the shapes of a model and what is predicted for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from .config import Scheme, WeightSparsity
from .explain import explain
from .model_names import linear_weights, unwrapped
from .predict.forecast import Forecast
from .usage import by_position

_LEAST_GAIN = 1.02
"""Below this a layer is not worth a mask: predictions are no better than a few percent."""


@by_position(1, lambda _: "suggest(model) returns a function of the model's inputs: suggest(model)(x)")
def suggest(
    model: nn.Module, *, device: str = "h100", scheme: Scheme | None = None
) -> Callable[..., dict[str, Scheme | None]]:
    """Propose a config: ``config = suggest(model)(*args, **kwargs)``.

    It names the linears that are predicted to gain with the scheme, forward and backward, by shape: what 2:4 weights do
    to a loss it does not know. Tables of embeddings that a linear shares are left out, and so is the head, where the
    model tells it by ``get_output_embeddings()`` or ``get_classifier()``. Where all linears that a `*`
    pattern names gain, the pattern stands for them. As `explain` it runs one forward, on any device, the meta device
    included, and leaves no trace.

    Args:
        model: eager or compiled module.
        device: the GPU to predict for, as for :func:`explain`.
        scheme: what to give the layers; None for ``WeightSparsity()``.

    Returns:
        A function that takes the model's inputs and returns names to schemes. It is empty where nothing gains.

    Raises:
        TypeError: inputs of the model beside it.
        ValueError: a ``device`` without measurements, or a value that is no scheme.
    """
    chosen = WeightSparsity() if scheme is None else scheme
    run = explain(model, {"re:.*": chosen}, device=device)

    def propose(*args: Any, **kwargs: Any) -> dict[str, Scheme | None]:
        report = run(*args, **kwargs)
        assert isinstance(report, Forecast)
        return dict.fromkeys(patterns_of(_worth_it(report, unwrapped(model)), _all_names(report)), chosen)

    return propose


def _worth_it(report: Forecast, model: nn.Module) -> list[str]:
    """Names of the linears that gain in all their calls together, in the order of the graph."""
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    for layer in report.layers:
        before[layer.fqn] = before.get(layer.fqn, 0.0) + layer.before_us
        after[layer.fqn] = after.get(layer.fqn, 0.0) + layer.after_us
    sparse = {site.fqn for site in report.sites if site.status == "sparse"}
    weights = linear_weights(model)
    left = _left_dense(model)
    return [
        name for name in before
        if name in sparse and before[name] > _LEAST_GAIN * after[name] and id(weights.get(name)) not in left
    ]  # fmt: skip


def _left_dense(model: nn.Module) -> set[int]:
    """Ids of weights that are customarily left dense: tables of embeddings, and the head that the model says it has."""
    tables = [one for one in model.modules() if isinstance(one, (nn.Embedding, nn.EmbeddingBag))]
    # As transformers and timm call it.
    asked = [getattr(model, name, None) for name in ("get_output_embeddings", "get_classifier")]
    heads = [head for method in asked if callable(method) and isinstance(head := method(), nn.Module)]
    return {id(weight) for one in (*tables, *heads) for weight in one.parameters(recurse=False)}


def _all_names(report: Forecast) -> list[str]:
    return list(dict.fromkeys(layer.fqn for layer in report.layers))


def patterns_of(names: Collection[str], known: Collection[str]) -> list[str]:
    """Patterns that name ``names`` and no other of ``known``: numbers become `*` where that names no more."""
    wanted = set(names)
    found: dict[str, None] = {}
    for name in names:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
        regex = re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))
        same = {one for one in known if regex.fullmatch(one)}
        found[pattern if len(same) > 1 and same <= wanted else name] = None
    return list(found)
