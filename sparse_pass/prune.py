"""Write 2:4 sparsity into dense weights, for deployment."""

from __future__ import annotations

import torch
from torch import nn

from .config import Config, weight_scheme
from .fqn import parse_config
from .legal import why_shape_skipped
from .model_names import check_names, chosen_weights
from .ops import mask24
from .report import Report, Site


def prune_(model: nn.Module, config: Config) -> Report:
    """Replace the named weights by S(weight), in place; shapes, dtypes and the state_dict's keys stay.

    The mask is the one that training used, so the pruned model computes in plain eager or compiled
    dense PyTorch what it computed under the pass.

    Args:
        model: any module; compiled or wrapped ones too.
        config: names to schemes, as for :func:`sparse_backend`; only ``mask`` of a scheme counts, and only of
            those of weights.

    Returns:
        Report: one site per weight, ``sparse`` or ``skipped``; M is ``"-"``, as no GEMM is involved.

    Raises:
        ValueError: a name that names no linear weight, an exactly named weight that cannot be 2:4
            sparse, a weight without data (meta device) or one that a parametrization computes. Nothing is
            written then.
    """
    patterns = parse_config(config)
    check_names(model, patterns)
    sites, kept = [], []
    for name, weight, pattern in chosen_weights(model, patterns):
        scheme = pattern.scheme
        assert scheme is not None
        sparsity = weight_scheme(scheme)
        if weight is None:
            if sparsity is None:
                continue  # nothing is to be done, and there is no weight to report
            raise ValueError(
                f"{name!r} computes its weight from other parameters, so that a mask cannot be written into it:"
                " call torch.nn.utils.parametrize.remove_parametrizations first, or map it to None"
            )
        if sparsity is None:
            reason = "the scheme is of the input only: the weight stays dense"
        elif weight.is_meta:
            raise ValueError(f"{name!r} is on the meta device: load its data before prune_")
        else:
            reason = why_shape_skipped(weight.shape) or ""
            if not reason:
                kept.append((weight, mask24(weight.detach(), sparsity.mask)))
        n, k = weight.shape
        sites.append(
            Site(
                fqn=name,
                pattern=pattern.text,
                scheme=scheme,
                shape=("-", n, k),
                dtype=weight.dtype,
                status="skipped" if reason else "sparse",
                reason=reason,
            )
        )
    with torch.no_grad():
        for weight, mask in kept:
            # Not a product: 0 * inf would leave a NaN where the mask drops an infinity.
            weight.masked_fill_(~mask, 0)
    return Report(sites=tuple(sites))
