"""Packing by cuSPARSELt itself, in whatever layout it has on the device, by descriptors that are built once a shape.

torch's own `_cslt_compress` builds its descriptor anew in each call, and trusts that what the library writes is no
larger than what torch has allocated.
"""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

# As Inductor's code calls it: half the host time of torch.empty.
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]

from ..vocabulary import packed_numel
from . import cusparselt
from .cusparselt_library import ALIGNMENT, call, check, function, new_struct
from .memory import empty_packed
from .recent import remember

_IS_A = 1


class Compressor:
    """Packs matrices [rows, cols] of one dtype on one device. Threads and streams may share it."""

    def __init__(self, device: int, dtype: torch.dtype, rows: int, cols: int) -> None:
        """RuntimeError if the library refuses the shape, or packs it larger than operators expect."""
        self.device, self.dtype, self.rows, self.cols = device, dtype, rows, cols
        self._handle = cusparselt._handle(device)[1]
        self._compress = function("SpMMACompress2")
        self._current_stream = torch._C._cuda_getCurrentRawStream
        memory, self._descriptor = new_struct()
        to_destroy: list[tuple[str, int]] = []
        # Not at exit, when the CUDA context may be gone.
        weakref.finalize(self, cusparselt._destroy, to_destroy, memory).atexit = False
        sizes = (ctypes.c_size_t * 2)()
        at = ctypes.addressof(sizes)
        described = (rows, cols, cols, ALIGNMENT, cusparselt._CUDA_TYPE[dtype], cusparselt._ORDER_ROW)
        with torch.cuda.device(device):
            call(
                "StructuredDescriptorInit",
                self,
                self._handle,
                self._descriptor,
                *described,
                cusparselt._SPARSITY_50_PERCENT,
            )
            to_destroy.append(("MatDescriptorDestroy", self._descriptor))
            call("SpMMACompressedSize2", self, self._handle, self._descriptor, at, at + ctypes.sizeof(ctypes.c_size_t))
        self._buffer_bytes = sizes[1]
        room = packed_numel(rows, cols, dtype) * dtype.itemsize
        if sizes[0] > room:
            raise RuntimeError(f"cuSPARSELt packs {self} into {sizes[0]} bytes, more than the {room} that are expected")

    def __call__(self, matrix: Tensor) -> Tensor:
        """Pack a contiguous matrix whose groups of four have at most two that are not zero; 1-D, `packed_numel`."""
        packed = empty_packed(self.rows, self.cols, self.dtype).view(self.dtype)
        buffer, buffer_address = None, None
        if self._buffer_bytes:
            # Of torch's allocator, on the current stream: freed on return, and reused only by what comes after.
            buffer = _empty_strided_cuda((self._buffer_bytes,), (1,), torch.uint8)
            buffer_address = buffer.data_ptr()
        status = self._compress(
            self._handle,
            self._descriptor,
            _IS_A,
            cusparselt._OP_NON_TRANSPOSE,
            matrix.data_ptr(),
            packed.data_ptr(),
            buffer_address,
            self._current_stream(self.device),
        )
        if status:
            check(status, "SpMMACompress2", self)
        return packed

    def __str__(self) -> str:
        return f"[{self.rows}, {self.cols}] {str(self.dtype).removeprefix('torch.')} on cuda:{self.device}"


_COMPRESSORS: dict[tuple[int, torch.dtype, int, int], Compressor] = {}


def compressor(device: int, dtype: torch.dtype, rows: int, cols: int) -> Compressor:
    """That of a device, dtype and shape, built if need be."""
    key = device, dtype, rows, cols
    found = _COMPRESSORS.get(key)
    if found is None:
        found = Compressor(*key)
        remember(_COMPRESSORS, key, found)
    return found


def pack(masked: Tensor) -> Tensor:
    """Pack a masked matrix [R, C] of the current device, float16 or bfloat16, any strides."""
    matrix = cusparselt.realigned(masked.contiguous())
    return compressor(matrix.get_device(), matrix.dtype, *matrix.shape)(matrix)


def check_size(rows: int, cols: int, dtype: torch.dtype) -> None:
    """RuntimeError if the library wants more memory for a packed [rows, cols] on the current device than operators give
    it: it has another layout then, and its kernels would read what is behind."""
    compressor(torch.cuda.current_device(), dtype, rows, cols)
