"""Write 2:4 sparsity into dense weights, for deployment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from .config import Config, WeightSparsity, gradient_scheme, input_scheme, weight_scheme
from .dynamo.fsdp import gathered_dtypes
from .fqn import Pattern, normalize, parse_config
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
    a 2:4 input that a dense model does not have. Nor is anything written where only gradients were 2:4.

    Args:
        model: any module; compiled or wrapped ones too.
        config: names to schemes, as for :func:`sparse_backend`; only ``mask`` and ``scale`` of a scheme count, and
            only of a `WeightSparsity` that stands alone. With a ``scale`` call it once: each call multiplies by it.
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
    found = list(pruned_weights(model, config, whole))
    for one in found:
        if one.sparsity is not None and one.weight.is_meta:
            raise ValueError(f"{one.name!r} is on the meta device: load its data before prune_")
    kept = []
    for one in found:
        if (how := one.sparsity) is not None:
            seen = one.weight.detach().to(dtype or one.seen)
            kept.append((one.weight, mask24(seen, how.mask), how.factor))
    with torch.no_grad():
        for weight, mask, scale in kept:
            # Not a product: 0 * inf would leave a NaN where the mask drops an infinity.
            local(weight).masked_fill_(~local(mask), 0)
            if scale != 1:
                local(weight).mul_(scale)
    return Report(sites=tuple(map(site_of, found)))


@dataclass(frozen=True, kw_only=True, slots=True)
class PrunedWeight:
    """A named weight, and what `prune_` makes of it."""

    name: str
    weight: nn.Parameter
    seen: torch.dtype
    """The dtype that the compiled code is given it in, on which masks are chosen."""
    pattern: Pattern
    sparsity: WeightSparsity | None
    """None if it stays dense."""
    reason: str
    """Why it does."""


def pruned_weights(model: nn.Module, config: Config, whole: nn.Module | None = None) -> Iterator[PrunedWeight]:
    """The named weights of a model, each once.

    Args:
        whole: the model that ``model`` is a part of, if names are names in that.

    Raises:
        ValueError: a name that names no linear weight, an exactly named weight that cannot be 2:4 sparse, or one that
            is computed from other parameters.
    """
    patterns = parse_config(config)
    check_names(whole or model, patterns)
    gathered = gathered_dtypes(model)
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
        if sparsity is None:
            said = {"the input": input_scheme(scheme), "gradients": gradient_scheme(scheme)}
            what = " and ".join(text for text, part in said.items() if part is not None)
            reason = f"the scheme is of {what} only: the weight stays dense"
        elif input_scheme(scheme) is not None:
            reason = "the output is computed with the dense weight: of a pair it is the input that is 2:4 there"
        else:
            reason = why_shape_skipped(weight.shape) or ""
        pruned_by = None if reason else sparsity
        seen = gathered.get(id(weight), weight.dtype)
        yield PrunedWeight(name=name, weight=weight, seen=seen, pattern=pattern, sparsity=pruned_by, reason=reason)


def site_of(one: PrunedWeight) -> Site:
    """The row of a report."""
    assert one.pattern.scheme is not None
    return Site(
        fqn=one.name,
        pattern=one.pattern.text,
        scheme=one.pattern.scheme,
        shape=("-", *one.weight.shape),
        dtype=one.weight.dtype,
        status="skipped" if one.reason else "sparse",
        reason=one.reason,
    )


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
