"""One named linear: refuse, or decide for each GEMM, rewrite, and report."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node

from .activation import (
    fused_activation,
    mask_grad_input,
    rewrite_input,
    rewrite_input_sparse,
    why_dense_grad_weight,
    why_no_masked_gradient,
)
from .config import ActivationSparsity, Scheme, Tune, WeightSparsity, input_scheme, scheme_text, weight_scheme
from .editor import Editor
from .fqn import Pattern
from .gemms import Linear, Use
from .gradient import rewrite_grad_weight
from .legal import (
    Limits,
    device_limits,
    why_dense_gradient,
    why_not_sparse,
    why_not_sparse_gradient,
    why_not_sparse_input,
    why_skipped,
)
from .profit import SLOWER, why_slower, why_slower_gradient, why_slower_input
from .report import Site, Status
from .rewriter import Rewriter


def refuse(chosen: Sequence[tuple[Linear, Pattern]], strict: bool) -> None:
    """Raise, before anything is edited, for what was asked and cannot be done.

    Raises:
        ValueError: names every linear that is refused, with the reason.
    """
    refused = []
    for linear, pattern in chosen:
        assert pattern.scheme is not None
        if reason := _why_skipped(linear, pattern.scheme):
            if strict or pattern.exact:
                how = "exactly" if pattern.exact else f"by {pattern.text!r}"
                refused.append(f"{linear.names[0]!r} (named {how}): {reason}")
        elif reason := _why_refused(linear, pattern, strict):
            changed = reason.partition(":")[0]
            refused.append(f"{linear.names[0]!r}: {scheme_text(pattern.scheme)} changes {changed}, but {reason}")
    if refused:
        raise ValueError("sparse_pass cannot sparsify " + "; ".join(refused))


def _why_skipped(linear: Linear, scheme: Scheme) -> str | None:
    """Why a scheme cannot be done at all: by its rules, or as a GEMM that it changes is not found.

    A 2:4 input of output alone would be other mathematics in silence: the gradient of another function.
    """
    weight, input = weight_scheme(scheme), input_scheme(scheme)
    reason = why_skipped(linear, scheme) or linear.half or None
    if reason is None and input is not None and not (weight is not None and _wants_gradient(linear, weight)):
        reason = why_dense_grad_weight(linear)
    return reason


def _why_refused(linear: Linear, pattern: Pattern, strict: bool) -> str | None:
    """Why a scheme would leave a gradient as it is that it has to change."""
    weight, input = weight_scheme(pattern.scheme), input_scheme(pattern.scheme)
    if weight is not None and (weight.grad_weight == "masked" or weight.decay):
        if linear.unplaced_grad_weight and not linear.whole_gradient:
            return linear.unplaced_grad_weight
        if linear.has_gradient and linear.grad_output is None:
            return "grad_weight: that of a weight which the graph computes; left as captured"
        if linear.computes and linear.has_gradient and not linear.whole_gradient:
            return "grad_weight: the gradient of the weight has other parts; left as captured"
    if input is not None and input.grad_input == "masked" and (reason := why_no_masked_gradient(linear)):
        return reason
    if strict and weight is not None and _wants_gradient(linear, weight):
        return why_dense_gradient(linear)
    return None


def _wants_gradient(linear: Linear, scheme: WeightSparsity) -> bool:
    """Whether a 2:4 grad_output is asked for and there is a gradient that it is for, found or not."""
    return scheme.grad_weight == "mvue" and linear.has_gradient


GEMMS = ("output", "grad_input", "grad_weight")


class Rewriting:
    """Rewrites the linears of one graph, in graph order."""

    def __init__(self, graph: Graph, mode: FakeTensorMode, tune: Tune) -> None:
        self._edit = Editor(graph, mode)
        self._weights = Rewriter(self._edit, tuned=tune == "auto")
        self._tune = tune

    def rewrite(self, linear: Linear, pattern: Pattern) -> Site:
        """Rewrite one call of a linear that `refuse` let pass."""
        scheme = pattern.scheme
        assert scheme is not None
        m, n, k = linear.shape
        dtype = linear.output.operand.meta["val"].dtype
        kernels: dict[str, str | None] = {
            "output": "dense",
            "grad_input": "dense" if linear.grad_input else None,
            "grad_weight": "dense" if linear.has_gradient else None,
        }
        status: Status = "skipped"
        why = [_why_skipped(linear, scheme) or ""]
        if not why[0]:
            limits = device_limits(linear.weight.meta["val"].device, dtype)
            weight, input = weight_scheme(scheme), input_scheme(scheme)
            why = []
            sparse_input = None
            if input is not None:
                keeps_gradient = weight is not None and _wants_gradient(linear, weight)
                sparse_input = self._rewrite_input(linear, input, limits, kernels, why, grad_weight=not keeps_gradient)
            if weight is not None:
                why += self._rewrite_weight(linear, weight, limits, kernels, output=input is None)
                if _wants_gradient(linear, weight):
                    why += self._rewrite_gradient(linear, weight, limits, kernels)
            if sparse_input is not None:
                sparse_input()
            any_sparse = any(kernels[gemm] not in ("dense", "masked_dense", None) for gemm in GEMMS)
            status = "sparse" if any_sparse else "masked_dense"
        return Site(
            fqn=linear.names[0], pattern=pattern.text, scheme=scheme, dtype=dtype, status=status,
            reason="; ".join(_distinct(why)), shape=(m if isinstance(m, int) else str(m), n, k),
            output=kernels["output"], grad_input=kernels["grad_input"], grad_weight=kernels["grad_weight"],
            fused=kernels.get("fused"), measured=any(SLOWER in reason for reason in why),
        )  # fmt: skip

    def _rewrite_weight(
        self, linear: Linear, scheme: WeightSparsity, limits: Limits, kernels: dict[str, str | None], *, output: bool
    ) -> list[str]:
        """Sparsify the weight in grad_input, and in output if asked. Returns why not by a sparse kernel."""
        uses = (linear.output, *linear.again, *linear.grad_input) if output else linear.grad_input
        reasons = {use: _why_not_sparse(use, linear.weight, scheme, limits) for use in uses}
        sparse = [use for use, reason in reasons.items() if reason is None]
        if (
            sparse
            and self._tune == "auto"
            and scheme.backend == "auto"
            and (slower := why_slower(sparse, linear.weight, scheme))
        ):
            reasons.update(dict.fromkeys(sparse, slower))
            sparse = []
        masked = [use for use, reason in reasons.items() if reason is not None]

        def kernel_of(uses: Sequence[Use]) -> str | None:
            return None if not uses else _kernel(limits) if all(use in sparse for use in uses) else "masked_dense"

        why = []
        if output:
            kernels["output"] = kernel_of([linear.output, *linear.again])
            why += [reason for reason in [reasons[linear.output]] if reason is not None]
        kernels["grad_input"] = kernel_of(linear.grad_input)
        backward = {reason for use in linear.grad_input if (reason := reasons[use]) is not None}
        why += [f"grad_input: {reason}" for reason in sorted(backward)]
        why += [linear.unplaced_grad_input, "" if linear.whole_gradient else linear.unplaced_grad_weight]
        why = [reason for reason in why if reason]
        self._edit.outdated += [node for use in (*uses, *linear.readers) for node in use.chain]
        self._weights.rewrite(linear, scheme, sparse, masked)
        return why

    def _rewrite_gradient(
        self, linear: Linear, scheme: WeightSparsity, limits: Limits, kernels: dict[str, str | None]
    ) -> list[str]:
        """Give grad_weight a 2:4 grad_output. Returns why not, or not by a sparse kernel."""
        if reason := why_dense_gradient(linear):
            return [reason]
        assert linear.grad_weight is not None
        reason = why_not_sparse_gradient(linear, scheme, limits)
        tuned = self._tune == "auto"
        if reason is None and tuned and scheme.backend == "auto":
            reason = why_slower_gradient(linear.grad_weight)
        rewrite_grad_weight(self._edit, linear.grad_weight, sparse=reason is None, tuned=tuned)
        kernels["grad_weight"] = _kernel(limits) if reason is None else "masked_dense"
        return [f"grad_weight: {reason}"] if reason else []

    def _rewrite_input(
        self,
        linear: Linear,
        scheme: ActivationSparsity,
        limits: Limits,
        kernels: dict[str, str | None],
        why: list[str],
        *,
        grad_weight: bool,
    ) -> Callable[[], None] | None:
        """Sparsify the input in output, and in grad_weight if asked.

        Appends to ``why`` why not by a sparse kernel. If by one, returns what is to be done after all other GEMMs of
        the linear are rewritten: it replaces nodes that they are found by.
        """
        grad_weight = grad_weight and linear.grad_operand is not None
        reason = why_not_sparse_input(linear, scheme, limits, grad_weight=grad_weight)
        tuned = self._tune == "auto"
        if reason is None and tuned and scheme.backend == "auto":
            reason = why_slower_input(linear, scheme.mask, grad_weight=grad_weight)
        kernel = _kernel(limits) if reason is None else "masked_dense"
        kernels["output"] = kernel
        if grad_weight:
            kernels["grad_weight"] = kernel
        if scheme.grad_input == "masked":
            mask_grad_input(self._edit, linear, scheme.mask)
        if reason is not None:
            why.append(reason)
            if grad_weight and scheme.mask == "rowwise":
                why.append("grad_weight: a rowwise mask is not 2:4 along M, over which it contracts")
            rewrite_input(self._edit, linear, scheme.mask, grad_weight=grad_weight)
            return None
        activation = None
        if grad_weight or linear.grad_operand is None:
            activation = fused_activation(linear, grad_weight=grad_weight)
        if activation is not None:
            kernels["fused"] = activation.name
        return functools.partial(
            rewrite_input_sparse, self._edit, linear, scheme.mask, activation, grad_weight=grad_weight, tuned=tuned
        )

    def clean(self) -> None:
        """Erase what is left without users: old moves of the weights, unused new nodes."""
        self._edit.clean()


def _why_not_sparse(use: Use, weight: Node, scheme: WeightSparsity, limits: Limits) -> str | None:
    if not use.reads(weight):
        return "the GEMM reads what the graph computes from the weight"
    return why_not_sparse(use, weight, scheme, limits)


def _kernel(limits: Limits) -> str:
    return "cusparselt" if limits.device == "cuda" else "reference"


def _distinct(why: Sequence[str]) -> list[str]:
    """Each reason once; one that holds for all GEMMs is not told again of one."""
    kept: list[str] = []
    for reason in why:
        told = reason.removeprefix("grad_input: ").removeprefix("grad_weight: ")
        if reason not in kept and told not in kept:
            kept.append(reason)
    return kept
