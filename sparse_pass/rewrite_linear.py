"""One named linear: refuse, or decide for each GEMM, rewrite, and report."""

from __future__ import annotations

from collections.abc import Sequence

from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node

from .config import Scheme, Tune
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
    why_skipped,
)
from .profit import why_slower
from .report import Site, Status
from .rewriter import Rewriter


def refuse(chosen: Sequence[tuple[Linear, Pattern]], strict: bool) -> None:
    """Raise, before anything is edited, for what was asked and cannot be done.

    Raises:
        ValueError: names every linear that is refused, with the reason.
    """
    refused = []
    for linear, pattern in chosen:
        scheme = pattern.scheme
        assert scheme is not None
        if reason := why_skipped(linear):
            if strict or pattern.exact:
                how = "exactly" if pattern.exact else f"by {pattern.text!r}"
                refused.append(f"{linear.names[0]!r} (named {how}): {reason}")
        elif linear.unplaced.startswith("grad_weight") and (scheme.grad_weight == "masked" or scheme.decay):
            refused.append(f"{linear.names[0]!r}: {scheme} changes grad_weight, but {linear.unplaced}")
        elif strict and _wants_gradient(linear, scheme) and (reason := why_dense_gradient(linear)):
            refused.append(f"{linear.names[0]!r}: {scheme} changes grad_weight, but {reason}")
    if refused:
        raise ValueError("sparse_pass cannot sparsify " + "; ".join(refused))


def _wants_gradient(linear: Linear, scheme: Scheme) -> bool:
    """Whether a 2:4 grad_output is asked for and there is a gradient that it is for, found or not."""
    has_gradient = linear.grad_output is not None or linear.unplaced.startswith("grad_weight")
    return scheme.grad_weight == "mvue" and has_gradient


class Rewriting:
    """Rewrites the linears of one graph, in graph order."""

    def __init__(self, graph: Graph, mode: FakeTensorMode, tune: Tune) -> None:
        self._edit = Editor(graph, mode)
        self._weights = Rewriter(self._edit, tuned=tune == "auto")
        self._tune = tune
        self._old: list[Node] = []

    def rewrite(self, linear: Linear, pattern: Pattern) -> Site:
        """Rewrite one call of a linear that `refuse` let pass."""
        scheme = pattern.scheme
        assert scheme is not None
        m, n, k = linear.shape
        dtype = linear.output.operand.meta["val"].dtype

        def site(
            status: Status,
            reason: str,
            output: str | None,
            grad_input: str | None,
            grad_weight: str | None,
        ) -> Site:
            return Site(
                fqn=linear.names[0], pattern=pattern.text, scheme=scheme, dtype=dtype, status=status, reason=reason,
                shape=(m if isinstance(m, int) else str(m), n, k),
                output=output, grad_input=grad_input, grad_weight=grad_weight,
            )  # fmt: skip

        grad_weight = None if linear.grad_output is None else "dense"
        grad_input = "dense" if linear.grad_input else None
        skipped = why_skipped(linear)
        if skipped:
            return site("skipped", skipped, "dense", grad_input, grad_weight)
        limits = device_limits(linear.weight.meta["val"].device, dtype)
        uses = (linear.output, *linear.grad_input)
        reasons = {use: why_not_sparse(use, linear.weight, scheme, limits) for use in uses}
        sparse = [use for use, reason in reasons.items() if reason is None]
        if sparse and self._tune == "auto" and scheme.backend == "auto" and (slower := why_slower(sparse)):
            reasons.update(dict.fromkeys(sparse, slower))
            sparse = []
        masked = [use for use, reason in reasons.items() if reason is not None]
        kernel = "cusparselt" if limits.device == "cuda" else "reference"

        def kernel_of(uses: Sequence[Use]) -> str | None:
            return None if not uses else kernel if all(use in sparse for use in uses) else "masked_dense"

        output, grad_input = kernel_of([linear.output]), kernel_of(linear.grad_input)
        why = [] if reasons[linear.output] is None else [str(reasons[linear.output])]
        backward = {str(reasons[use]) for use in linear.grad_input if reasons[use] is not None} - set(why)
        why += [f"grad_input: {reason}" for reason in sorted(backward)]
        why += [linear.unplaced] if linear.unplaced else []
        self._old += [node for use in uses for node in use.chain]
        self._weights.rewrite(linear, scheme, sparse, masked)
        if _wants_gradient(linear, scheme):
            sparse_gradient, reason = self._rewrite_gradient(linear, scheme, limits)
            if sparse_gradient is not None:
                grad_weight = kernel if sparse_gradient else "masked_dense"
            if reason and reason.removeprefix("grad_weight: ") not in why and reason not in why:
                why.append(reason)
        any_sparse = sparse or grad_weight == kernel
        return site("sparse" if any_sparse else "masked_dense", "; ".join(why), output, grad_input, grad_weight)

    def _rewrite_gradient(self, linear: Linear, scheme: Scheme, limits: Limits) -> tuple[bool | None, str]:
        """Give grad_weight a 2:4 grad_output. Returns whether its kernel is sparse, None if left alone, and why not."""
        if reason := why_dense_gradient(linear):
            return None, reason
        assert linear.grad_weight is not None
        reason = why_not_sparse_gradient(linear, scheme, limits)
        rewrite_grad_weight(self._edit, linear.grad_weight, sparse=reason is None)
        return reason is None, f"grad_weight: {reason}" if reason else ""

    def clean(self) -> None:
        """Erase what is left without users: old moves of the weights, unused new nodes."""
        self._edit.clean(self._old)
