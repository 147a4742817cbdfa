"""The packed layouts that devices read: how each is packed and multiplied, and what it is right for.

`probe` tries them on a device in the order of `BACKENDS` and takes the first whose results are right.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..vocabulary import FLOAT8, KERNEL_DTYPES, Form
from . import torch_cslt


def _no_packer(op: str, stored: torch.dtype) -> None:
    return None


def _any_size(rows: int, cols: int, dtype: torch.dtype) -> None:
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
    kernel: str = "cusparselt"
    """Whose products they are, for the report."""
    shapes: tuple[tuple[int, int], ...] = ((128, 192),)
    """Of the weights that `probe` tries: of each way to pack one."""
    check: Callable[[int, int, torch.dtype], None] = _any_size
    """Raises RuntimeError if kernels of the current device would read more of a packed [rows, cols] than there is."""


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


def _packers_of(module: str) -> Callable[[str, torch.dtype], Callable[..., Any] | None]:
    """Those that a module of this folder has under the names of the operators."""

    def packer(op: str, stored: torch.dtype) -> Callable[..., Any] | None:
        if stored == torch.float64:
            return None
        # By its name, as compiled code does: it needs Triton, which comes with torch for GPUs only.
        return getattr(importlib.import_module(f".{module}", __package__), op)  # type: ignore[no-any-return]

    return packer


def _by_library(masked: Tensor) -> Tensor:
    from . import compressor

    return compressor.pack(masked)


def _check_size(rows: int, cols: int, dtype: torch.dtype) -> None:
    from . import compressor

    compressor.check_size(rows, cols, dtype)


def _for_cutlass(masked: Tensor) -> Tensor:
    from . import cutlass

    return cutlass.pack(masked)


def _by_cutlass(form: Form, dense: Tensor, packed: Tensor, n: int, bias: Tensor | None, tuned: bool) -> Tensor:
    from . import cutlass

    return cutlass.product(form, dense, packed, n, bias, tuned)


SM90 = Backend(
    name="sm90",
    dtypes=(*KERNEL_DTYPES, FLOAT8),
    pack=torch_cslt.compress,
    multiply=_by_binding,
    packer=_triton_packer,
    compiled="sparse_pass.kernels.compiled",
    is_measured=True,
    check=_check_size,
)
"""Hopper's layout, by kernels of ours and cuSPARSELt with cached plans. The library packs the same bytes."""

SM80 = Backend(
    name="sm80",
    pack=_by_library,
    multiply=_by_binding,
    packer=_packers_of("sm80"),
    compiled="sparse_pass.kernels.sm80",
    is_measured=True,
    shapes=((256, 384), (128, 192)),
    check=_check_size,
)
"""The layout of cuSPARSELt on SM8x (A100, RTX 30, RTX 40): whole tiles by kernels of ours, others by the library."""

CUTLASS = Backend(
    name="cutlass",
    pack=_for_cutlass,
    multiply=_by_cutlass,
    packer=_packers_of("cutlass"),
    kernel="cutlass",
)
"""torch's own kernels for SM8x, which need no cuSPARSELt; D is copied where it is stored transposed."""

LIBRARY = Backend(
    name="library",
    pack=_by_library,
    multiply=_by_binding,
    packer=_packers_of("library_packed"),
    compiled="sparse_pass.kernels.library_packed",
    is_measured=True,
    check=_check_size,
)
"""Whatever layout cuSPARSELt has on the device, as on SM100 and SM120: masked by kernels of ours, packed by the library
with cached descriptors, and multiplied with cached plans."""

COMPRESS = Backend(name="compress", pack=torch_cslt.compress, multiply=torch_cslt.product)
"""Whatever layout cuSPARSELt has on the device, packed and multiplied by torch's own calls."""

BACKENDS = (SM90, SM80, CUTLASS, LIBRARY, COMPRESS)
