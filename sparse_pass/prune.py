"""Write 2:4 sparsity into dense weights, for deployment."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from .config import Config, Scheme, input_scheme, weight_scheme
from .dynamo.fsdp import gathered_dtypes
from .fqn import normalize, parse_config
from .model_names import check_names, chosen_weights
from .ops.definitions import mask24
from .ops.shards import local
from .plan.legal import why_shape_skipped
from .report import Report, Site

_REMOVALS = {
    "WeightNorm": "remove_weight_norm(module)",
    "SpectralNorm": "remove_spectral_norm(module)",
    "BasePruningMethod": "prune.remove(module, 'weight')",
}
"""By the classes of hooks that compute a weight before each call; two of them are deprecated, so by name."""


def prune_(
    model: nn.Module, config: Config, *, dtype: torch.dtype | None = None, whole: nn.Module | None = None
) -> Report:
    """Replace the named weights by S(weight), in place; shapes, dtypes and the state_dict's keys stay.

    The mask is the one that training used, so the pruned model computes in plain eager or compiled
    dense PyTorch what it computed under the pass: that of the tensor which the compiled code is given as the parameter.
    It is the stored parameter, under autocast too. Under FSDP2 with ``MixedPrecisionPolicy(param_dtype=...)`` it is the
    gathered one, which is rounded to that dtype: FSDP2's own modules are asked for it, and of a checkpoint that was
    loaded elsewhere ``dtype`` must say so.

    Weights that are DTensors are pruned shard by shard, and gathered one by one where a shard ends inside of a 4x4
    tile, so all ranks must call this. Of a weight whose input was the 2:4 operand of the output, by
    itself or in a pair with the weight, nothing is written: the output was computed with the dense weight, and with
    a 2:4 input that a dense model does not have.

    Args:
        model: any module; compiled or wrapped ones too.
        config: names to schemes, as for :func:`sparse_backend`; only ``mask`` of a scheme counts, and only of
            a `WeightSparsity` that stands alone.
        dtype: masks are chosen on the weights rounded to it. By default on what FSDP2's policies say, and else on the
            weights as they are.
        whole: the model that ``model`` is a part of, as for :func:`sparse_backend`.

    Returns:
        Report: one site per weight, ``sparse`` or ``skipped``; M is ``"-"``, as no GEMM is involved.

    Raises:
        ValueError: a ``dtype`` that is not of floating point; a name that names no linear weight, an exactly named
            weight that cannot be 2:4 sparse, a weight without data (meta device) or one that a parametrization
            computes. Nothing is written then.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}: expected the floating point dtype that training saw, such as torch.bfloat16")
    patterns = parse_config(config)
    check_names(whole or model, patterns)
    gathered = gathered_dtypes(model)
    sites, kept = [], []
    for name, weight, pattern in chosen_weights(model, patterns):
        scheme = pattern.scheme
        assert scheme is not None
        sparsity = weight_scheme(scheme)
        if weight is None:
            if sparsity is None or input_scheme(scheme) is not None:
                continue  # nothing is to be done, and there is no weight to report
            raise ValueError(
                f"{name!r} computes its weight from other parameters, so that a mask cannot be written into it:"
                f" call {_removal(model, name)} first, or map it to None"
            )
        reason = _why_left(scheme, weight)
        if sparsity is not None and not reason:
            if weight.is_meta:
                raise ValueError(f"{name!r} is on the meta device: load its data before prune_")
            seen = weight.detach().to(dtype or gathered.get(id(weight), weight.dtype))
            kept.append((weight, mask24(seen, sparsity.mask)))
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
            local(weight).masked_fill_(~local(mask), 0)
    return Report(sites=tuple(sites))


def _why_left(scheme: Scheme, weight: nn.Parameter) -> str:
    """Why nothing is written into a weight; empty if its mask is."""
    if weight_scheme(scheme) is None:
        return "the scheme is of the input only: the weight stays dense"
    if input_scheme(scheme) is not None:
        return "the output is computed with the dense weight: of a pair it is the input that is 2:4 there"
    return why_shape_skipped(weight.shape) or ""


def _removal(model: nn.Module, name: str) -> str:
    """What writes a computed weight into a parameter of its own: by what computes it."""
    module = next(module for path, module in model.named_modules(remove_duplicate=False) if normalize(path) == name)
    if parametrize.is_parametrized(module, "weight"):
        return "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
    for hook in module._forward_pre_hooks.values():
        for kind in type(hook).__mro__:
            if kind.__name__ in _REMOVALS:
                return f"torch.nn.utils.{_REMOVALS[kind.__name__]}"
    return "what gives the module a parameter `weight` of its own"
