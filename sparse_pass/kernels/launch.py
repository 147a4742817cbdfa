"""Launch Triton kernels at a fraction of the host time of ``kernel[grid](...)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .recent import remember

_ALIGNMENT = 16  # what Triton looks at in a pointer
_RUNNERS: dict[tuple[Any, ...], Callable[..., object]] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int, ...],
    constants: tuple[object, ...],
    num_warps: int,
) -> None:
    """Run a kernel whose parameters are these tensors, numbers and constants, in this order, on the current stream.

    Binding the arguments and looking up what they compile to takes Triton some 15 us a call. Here it is done once for
    all calls that compile to the same: those with equal numbers and constants, with the same dtype of the first tensor,
    which with the constants tells those of the others, and with pointers that are multiples of 16, as nearly all are.
    Other calls go Triton's way.
    """
    addresses = [tensor.data_ptr() for tensor in tensors]
    aligned = not any(address % _ALIGNMENT for address in addresses)
    key = (kernel, tensors[0].get_device(), tensors[0].dtype, numbers, constants, num_warps)
    runner = _RUNNERS.get(key) if aligned else None
    if runner is not None:
        runner(*addresses, *numbers, *constants)  # for a tensor it would ask the driver
        return
    compiled = kernel[grid](*tensors, *numbers, *constants, num_warps=num_warps)
    if compiled is not None and aligned:  # the interpreter compiles nothing
        blocks = (*grid, 1)
        remember(_RUNNERS, key, compiled[blocks])
