"""The packed layouts that devices read: how each is packed and multiplied, and what it is right for.

`probe` tries them on a device in the order of `BACKENDS` and takes the first whose results are right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..vocabulary import FLOAT8, KERNEL_DTYPES, Form
from . import torch_cslt


def _no_packer(op: str, stored: torch.dtype) -> None:
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """One packed layout. What it is asked for is on the current device, contiguous, and of whole tiles."""

    name: str
    pack: Callable[[Tensor], Tensor]
    """Of a matrix [R, C] with its zeros, any strides, the packed one: 1-D, `vocabulary.packed_numel` elements."""
    multiply: Callable[[Form, Tensor, Tensor, int, Tensor | None, bool], Tensor]
    """Of a form, B, A packed, its number of rows, a bias or None, and whether the kernel may be the one that measures
    fastest: D."""
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    packer: Callable[[str, torch.dtype], Callable[..., Any] | None] = _no_packer
    """The kernel that masks and packs in one, by the name of an operator and the dtype that its tensor is stored in;
    None if there is none, and `pack` makes it."""
    compiled: str | None = None
    """The module with the functions that compiled code calls, see `compiled`; None where it calls the operators."""
    is_measured: bool = False
    """Whether `measure` knows how to time its products; others choose their algorithm themselves."""


def _by_binding(form: Form, dense: Tensor, packed: Tensor, n: int, bias: Tensor | None, tuned: bool) -> Tensor:
    from . import cusparselt, tuner

    product = tuner.product if tuned else cusparselt.product
    return product(form, dense, packed, n, bias)


def _triton_packer(op: str, stored: torch.dtype) -> Callable[..., Any] | None:
    if stored == torch.float64:  # rare, and the kernels compare in float32
        return None
    from . import mvue, mvue_float8, sparsify, sparsify_float8

    modules = {"sparsify_float8": sparsify_float8, "sparsify_mvue_float8": mvue_float8}
    return getattr(modules.get(op, mvue if "mvue" in op else sparsify), op)  # type: ignore[no-any-return]


SM90 = Backend(
    name="sm90",
    dtypes=(*KERNEL_DTYPES, FLOAT8),
    pack=torch_cslt.compress,
    multiply=_by_binding,
    packer=_triton_packer,
    compiled="sparse_pass.kernels.compiled",
    is_measured=True,
)
"""Hopper's layout, by kernels of ours and cuSPARSELt with cached plans. The library packs the same bytes."""

COMPRESS = Backend(name="compress", pack=torch_cslt.compress, multiply=torch_cslt.product)
"""Whatever layout cuSPARSELt has on the device, packed and multiplied by torch's own calls."""

BACKENDS = (SM90, COMPRESS)
