"""A cuSPARSELt for machines without one: the C functions, which check what they are given and multiply on the CPU."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_pass.kernels import backends, compressor, cusparselt, cusparselt_library, memory
from sparse_pass.ops import cuda
from sparse_pass.ops.reference import weights as reference
from sparse_pass.vocabulary import Layout, packed_numel

ROW = 2
TRANSPOSE = 1
BIAS_POINTER = 8
DTYPES = {2: torch.float16, 14: torch.bfloat16}
SUCCESS, NOT_SUPPORTED, EXECUTION_FAILED = 0, 10, 6


class Function:
    """One that takes attributes, as ctypes' do."""

    def __init__(self, call: Callable[..., int]) -> None:
        self.call = call

    def __call__(self, *arguments: Any) -> Any:
        return self.call(*arguments)


class FakeCusparselt:
    """What `cusparselt_library` loads.

    Functions not written out below succeed. ``statuses`` makes a function return a status instead, by its name
    without ``cusparseLt``; ``refused`` are ids of algorithms for which no plan can be built, ``wrong`` those whose
    products are; ``unsteady`` products differ in their last bits from launch to launch.
    """

    def __init__(self, version: tuple[int, int, int] = (0, 8, 0)) -> None:
        self.version = version
        self.statuses: dict[str, int] = {}
        self.refused: set[int] = set()
        self.wrong: set[int] = set()
        self.unsteady = False
        self.launched: list[int] = []
        """Ids of the algorithms, in order."""
        self.workspace_bytes = 64
        self.layout: Layout = "sm90"
        """Of packed matrices on this device."""
        self.excess_bytes = 0
        """What the library wants beyond the size of `packed_numel`."""
        self.calls: Counter[str] = Counter()
        self.alive: dict[int, SimpleNamespace] = {}
        """What was built and not destroyed, by address."""
        for name in [*cusparselt_library._PROTOTYPES, "GetErrorString"]:
            setattr(self, f"cusparseLt{name}", Function(self._counted(name)))

    def _counted(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            status = self.statuses.get(name, SUCCESS)
            return status or getattr(self, name, lambda *_: SUCCESS)(*arguments)

        return call

    def GetProperty(self, part: int, address: int) -> int:
        ctypes.c_int.from_address(address).value = self.version[part]
        return SUCCESS

    def GetErrorString(self, status: int) -> bytes:
        return {NOT_SUPPORTED: b"CUSPARSE_STATUS_NOT_SUPPORTED"}.get(status, b"CUSPARSE_STATUS_EXECUTION_FAILED")

    def StructuredDescriptorInit(self, handle: int, address: int, *described: int) -> int:
        return self._matrix(address, *described[:-1], sparse=True)

    def DenseDescriptorInit(self, handle: int, address: int, *described: int) -> int:
        return self._matrix(address, *described, sparse=False)

    def _matrix(
        self, address: int, rows: int, cols: int, leading: int, alignment: int, kind: int, order: int, *, sparse: bool
    ) -> int:
        assert address % 16 == 0
        assert address not in self.alive
        self.alive[address] = SimpleNamespace(
            rows=rows, cols=cols, leading=leading, order=order, sparse=sparse, dtype=DTYPES[kind]
        )
        return SUCCESS

    def SpMMACompressedSize2(self, handle: int, address: int, size: int, buffer_size: int) -> int:
        matrix = self.alive[address]
        packed = packed_numel(matrix.rows, matrix.cols) * matrix.dtype.itemsize
        ctypes.c_size_t.from_address(size).value = packed + self.excess_bytes
        ctypes.c_size_t.from_address(buffer_size).value = self.workspace_bytes
        return SUCCESS

    def SpMMACompress2(
        self, handle: int, address: int, is_a: int, op: int, dense: int, packed: int, buffer: int | None, stream: int
    ) -> int:
        matrix = self.alive[address]
        assert (buffer is not None) == (self.workspace_bytes > 0)
        assert (is_a, op, matrix.sparse) == (1, 0, True)
        assert dense % 16 == packed % 16 == 0
        masked = _memory(dense, matrix.rows * matrix.cols, matrix.dtype).view(matrix.rows, matrix.cols)
        assert (masked.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all()
        kept = masked != 0
        _memory(packed, packed_numel(matrix.rows, matrix.cols), matrix.dtype).copy_(self._packed(masked, kept))
        return SUCCESS

    def _packed(self, masked: Tensor, kept: Tensor) -> Tensor:
        return reference.pack(masked, kept, self.layout_of(len(masked)))

    def layout_of(self, rows: int) -> Layout:
        """Of a packed matrix with so many rows: what SM8x makes of half a tile is its own affair."""
        return "cutlass" if self.layout == "sm80" and rows % 128 else self.layout

    def MatmulDescriptorInit(
        self, handle: int, address: int, op_a: int, op_b: int, a: int, b: int, c: int, d: int, compute: int
    ) -> int:
        matrices = [self.alive[one] for one in (a, b, d)]
        assert all(size % 16 == 0 for one in matrices if one.sparse for size in (one.rows, one.cols))
        self._product = SimpleNamespace(ops=(op_a, op_b), matrices=matrices, bias=None)
        self._products = {**getattr(self, "_products", {}), address: self._product}
        return SUCCESS

    def MatmulDescSetAttribute(self, handle: int, address: int, attribute: int, value: int, size: int) -> int:
        if attribute == BIAS_POINTER:
            self._products[address].bias = ctypes.c_void_p.from_address(value).value
        return SUCCESS

    def MatmulAlgSelectionInit(self, handle: int, address: int, product: int, algorithm: int) -> int:
        self.alive[address] = SimpleNamespace(product=self._products[product], algorithm=0)
        return SUCCESS

    def MatmulAlgGetAttribute(self, handle: int, address: int, attribute: int, value: int, size: int) -> int:
        ctypes.c_int.from_address(value).value = 21
        return SUCCESS

    def MatmulAlgSetAttribute(self, handle: int, address: int, attribute: int, value: int, size: int) -> int:
        self.alive[address].algorithm = ctypes.c_int.from_address(value).value
        return SUCCESS

    def MatmulPlanInit(self, handle: int, address: int, product: int, selection: int) -> int:
        chosen = self.alive[selection]
        if chosen.algorithm in self.refused:
            return NOT_SUPPORTED
        self.alive[address] = chosen
        return SUCCESS

    def MatmulGetWorkspace(self, handle: int, plan: int, address: int) -> int:
        ctypes.c_size_t.from_address(address).value = self.workspace_bytes
        return SUCCESS

    def Matmul(
        self, handle: int, plan: int, alpha: int, a: int, b: int, beta: int, c: int, d: int,
        workspace: int | None, streams: int, count: int,
    ) -> int:  # fmt: skip
        assert (workspace is not None) == (self.workspace_bytes > 0)
        product, algorithm = self.alive[plan].product, self.alive[plan].algorithm
        self.launched.append(algorithm)
        left, right, output = (self._at(address, one) for address, one in zip((a, b, d), product.matrices, strict=True))
        left, right = (
            one.T if op == TRANSPOSE else one for one, op in zip((left, right), product.ops, strict=True)
        )  # fmt: skip
        result = left.double() @ right.double()
        if product.bias is not None:
            result += _memory(product.bias, result.shape[0], output.dtype).double()[:, None]
        output.copy_(-result if algorithm in self.wrong else result)
        if self.unsteady:
            output.view(torch.int16).bitwise_xor_(len(self.launched) & 1)
        return SUCCESS

    def _at(self, address: int, matrix: SimpleNamespace) -> Tensor:
        rows, cols = matrix.rows, matrix.cols
        if matrix.sparse:
            packed = _memory(address, packed_numel(rows, cols), matrix.dtype)
            return reference.unpack(packed, rows, cols, self.layout_of(rows))
        whole = _memory(address, rows * cols, matrix.dtype)
        assert matrix.leading == (cols if matrix.order == ROW else rows)
        return whole.view(rows, cols) if matrix.order == ROW else whole.view(cols, rows).T

    def _destroy(self, address: int) -> int:
        del self.alive[address]
        return SUCCESS

    MatDescriptorDestroy = MatmulAlgSelectionDestroy = MatmulPlanDestroy = _destroy


def _memory(address: int, count: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype)


def install(monkeypatch: pytest.MonkeyPatch, library: FakeCusparselt) -> None:
    """Let the binding find ``library``, and CPU tensors pass for those of a device with the SM90 layout."""

    def empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype)

    cusparselt_library._library.cache_clear()
    cusparselt._handle.cache_clear()
    monkeypatch.setattr(cusparselt_library, "_load", lambda: library)
    for module in (cusparselt, compressor, memory):
        monkeypatch.setattr(module, "_empty_strided_cuda", empty)
    monkeypatch.setattr(cusparselt, "_PLANS", {})
    monkeypatch.setattr(compressor, "_COMPRESSORS", {})
    monkeypatch.setattr(cuda, "backend_of", lambda device, dtype: backends.SM90)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # as a CPU tensor says
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
