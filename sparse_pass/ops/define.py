"""Define an operator of `torch.ops.sparse_pass`: schema, check, fake, CPU and CUDA kernel, in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("sparse_pass", "DEF")
_Function = Callable[..., Any]


class Kernels(NamedTuple):
    """What the dispatcher calls."""

    fake: _Function
    cpu: _Function
    cuda: _Function


def define(
    schema: str, *, check: _Function, fake: _Function, cpu: _Function, cuda: _Function, is_mask: bool = False
) -> Kernels:
    """Define an operator by functions of the arguments of its schema.

    Args:
        check: raises ValueError for what the others must not see; also while a graph is traced.
        fake: the results with their shapes, strides and dtypes.
        cpu: the reference.
        is_mask: the result is one, and nobody wants its derivative. All others refuse to have one.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def trace(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        if not is_mask and torch.is_grad_enabled() and _with_gradient(args):
            raise NotImplementedError(_NO_DERIVATIVE)
        return fake(*args, **kwargs)

    def checked(compute: _Function) -> _Function:
        def call(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            if is_mask or not torch.is_grad_enabled() or not (sources := _with_gradient(args)):
                return compute(*args, **kwargs)
            with torch.no_grad():
                results = compute(*args, **kwargs)
            if isinstance(results, Tensor):
                return _Refusal.apply(results, *sources)  # type: ignore[no-untyped-call]
            return tuple(_Refusal.apply(one, *sources) for one in results)  # type: ignore[no-untyped-call]

        return call

    kernels = Kernels(trace, checked(cpu), checked(cuda))
    torch.library.register_fake(f"sparse_pass::{name}", kernels.fake, lib=_LIBRARY)
    _LIBRARY.impl(name, kernels.cpu, "CPU")
    _LIBRARY.impl(name, kernels.cuda, "CUDA")
    if not is_mask:
        _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    return kernels


# Autograd. The ops have no derivative, for which torch's default is a warning and missing gradients. A Python function
# under the autograd key that refuses would double the host time of every call, so the kernels refuse by themselves:
# when a gradient comes back, or while a graph with one is traced.

_NO_DERIVATIVE = (
    "sparse_pass ops have no derivative: the pass puts them into graphs that already hold their backward. Train through"
    " sparse_pass.sparse_backend, or call them under torch.no_grad()"
)


def _with_gradient(args: tuple[Any, ...]) -> list[Tensor]:
    return [one for one in args if isinstance(one, Tensor) and one.requires_grad]


class _Refusal(torch.autograd.Function):
    """The result as it is; an error where a gradient is to be propagated through it."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(_NO_DERIVATIVE)
