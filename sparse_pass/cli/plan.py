"""From flags to a config and what is predicted of it."""

from __future__ import annotations

import argparse
import json

import torch

from ..config import Scheme
from ..explain import explain
from ..predict.forecast import Forecast
from ..serialize import load_config, scheme_from_dict
from ..suggest import suggest
from .models import make_model


def planned(args: argparse.Namespace, gpu: str) -> tuple[dict[str, Scheme | None], Forecast]:
    """The config, given or suggested, and the forecast. An empty config names nothing: no layer gains."""
    made = make_model(
        args.model, getattr(torch, args.dtype), batch=args.batch, tokens=args.tokens, settings=args.set
    )  # fmt: skip
    if args.config:
        config = load_config(args.config)
    else:
        config = suggest(made.model, device=gpu, scheme=_scheme(args.scheme))(*made.args, **made.kwargs)
    report = explain(made.model, config or {"re:.*": None}, device=gpu)(*made.args, **made.kwargs)
    assert isinstance(report, Forecast)
    return config, report


def _scheme(text: str) -> Scheme:
    if not text.lstrip().startswith("{"):
        return scheme_from_dict(text, "--scheme")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--scheme {text!r} is no JSON: {error}") from None
    return scheme_from_dict(data, "--scheme")
