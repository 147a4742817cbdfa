"""Products with a structured operand by cuSPARSELt, with cached plans.

torch's own `_cslt_sparse_mm` builds its plan anew in each call, 365 to 515 us of host time on an H200. Here plans are
cached by everything that they depend on, and a call sets the bias pointer and launches.

Letters and forms are those of `vocabulary.Product`. A row-major matrix that is stored transposed is described to the
library by the op TRANSPOSE if it is B, and as column-major if it is D. Enumerations are those of cusparseLt.h, 0.7 to
0.8.1.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

# As Inductor's code calls it: half the host time of torch.empty.
from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]

from ..vocabulary import PRODUCTS, Form
from .cusparselt_library import ALIGNMENT, call, check, function, new_struct, version
from .memory import reads_past_end, with_room
from .problem import Problem, algorithms
from .recent import remember

_ORDER_COL, _ORDER_ROW = 1, 2
_OP_NON_TRANSPOSE, _OP_TRANSPOSE = 0, 1
_COMPUTE_32F = 2
_SPARSITY_50_PERCENT = 0
_BIAS_POINTER = 8
_ALG_DEFAULT = 0
_CONFIG_ID, _CONFIG_MAX_ID = 0, 1
_CUDA_TYPE = {torch.float16: 2, torch.bfloat16: 14, torch.float8_e4m3fn: 28}

_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)
_ALPHA, _BETA = ctypes.addressof(_ONE), ctypes.addressof(_ZERO)


@functools.cache
def _handle(device: int) -> tuple[Any, int]:
    """One handle a device, never destroyed: its memory and its address."""
    memory, address = new_struct()
    with torch.cuda.device(device):
        call("Init", f"cuda:{device}", address)
    return memory, address


class Plan:
    """One matrix product, ready to launch. Threads and streams may share it."""

    def __init__(self, problem: Problem, algorithm: int, bias: Tensor | None) -> None:
        """Build the plan for `algorithm`, an id below `self.algorithms`. RuntimeError if the library refuses.

        bias: any tensor that could be the bias, or None; each call brings its own.
        """
        self.problem = problem
        self.output_shape, self.output_dtype = problem.output_shape, problem.output_dtype
        self.algorithm = algorithm
        self._reads_past_end = reads_past_end(problem.k)
        self._lock = threading.Lock()
        self._matmul, self._set_attribute = function("Matmul"), function("MatmulDescSetAttribute")
        self._handle = _handle(problem.device)[1]
        # A, B, D, the product, the algorithm, the plan. The plan points at the others: all live as long as it does.
        memory, structs = zip(*(new_struct() for _ in range(6)), strict=True)
        self._descriptor, self._plan = structs[3], structs[5]
        self._current_stream = torch._C._cuda_getCurrentRawStream
        self._stream = ctypes.c_void_p()
        self._stream_address = ctypes.addressof(self._stream)
        self._bias = ctypes.c_void_p(None if bias is None else bias.data_ptr())
        self._bias_address = ctypes.addressof(self._bias)
        to_destroy: list[tuple[str, int]] = []
        # Not at exit, when the CUDA context may be gone.
        weakref.finalize(self, _destroy, to_destroy, memory).atexit = False
        with torch.cuda.device(problem.device):
            self._build(structs, to_destroy)

    def _build(self, structs: tuple[int, ...], to_destroy: list[tuple[str, int]]) -> None:
        _, dtype, m, n, k, bias, form = self.problem
        a, b, d, descriptor, selection, plan = structs
        handle, cuda_type, output_type = self._handle, _CUDA_TYPE[dtype], _CUDA_TYPE[self.output_dtype]
        about = str(self)

        row_major = (ALIGNMENT, cuda_type, _ORDER_ROW)
        call("StructuredDescriptorInit", about, handle, a, n, k, k, *row_major, _SPARSITY_50_PERCENT)
        to_destroy.append(("MatDescriptorDestroy", a))
        rows, cols = self.problem.dense_shape
        call("DenseDescriptorInit", about, handle, b, rows, cols, cols, *row_major)
        to_destroy.append(("MatDescriptorDestroy", b))
        order = _ORDER_COL if PRODUCTS[form].d_transposed else _ORDER_ROW
        call("DenseDescriptorInit", about, handle, d, n, m, self.output_shape[1], ALIGNMENT, output_type, order)
        to_destroy.append(("MatDescriptorDestroy", d))
        operations = (_OP_NON_TRANSPOSE, _OP_TRANSPOSE if PRODUCTS[form].b_transposed else _OP_NON_TRANSPOSE)
        call("MatmulDescriptorInit", about, handle, descriptor, *operations, a, b, d, d, _COMPUTE_32F)
        if bias:  # before the algorithm is chosen, which depends on whether there is one
            call("MatmulDescSetAttribute", about, handle, descriptor, _BIAS_POINTER, self._bias_address, 8)

        call("MatmulAlgSelectionInit", about, handle, selection, descriptor, _ALG_DEFAULT)
        to_destroy.append(("MatmulAlgSelectionDestroy", selection))
        number = ctypes.c_int()
        call("MatmulAlgGetAttribute", about, handle, selection, _CONFIG_MAX_ID, ctypes.addressof(number), 4)
        self.algorithms = number.value
        number.value = self.algorithm
        call("MatmulAlgSetAttribute", about, handle, selection, _CONFIG_ID, ctypes.addressof(number), 4)
        call("MatmulPlanInit", about, handle, plan, descriptor, selection)
        to_destroy.append(("MatmulPlanDestroy", plan))
        size = ctypes.c_size_t()
        call("MatmulGetWorkspace", about, handle, plan, ctypes.addressof(size))
        self.workspace_bytes = size.value

    def __call__(self, dense: Tensor, packed: Tensor, bias: Tensor | None, output: Tensor | None = None) -> Tensor:
        """Launch on the current stream; B, A and bias as in `product`. Returns D, in ``output`` if there is one."""
        problem = self.problem
        if self._reads_past_end:
            packed = with_room(packed)
        if output is None:
            output = _empty_strided_cuda(self.output_shape, (self.output_shape[1], 1), self.output_dtype)
        dense_address, packed_address, output_address = dense.data_ptr(), packed.data_ptr(), output.data_ptr()
        bias_address = None if bias is None else bias.data_ptr()
        if (dense_address | packed_address | output_address | (bias_address or 0)) % ALIGNMENT:
            return self._aligned(dense, packed, bias, output)
        workspace_address = None
        if self.workspace_bytes:
            # Of torch's allocator, on the current stream: freed on return, and reused only by what comes after.
            workspace = _empty_strided_cuda((self.workspace_bytes,), (1,), torch.uint8)
            workspace_address = workspace.data_ptr()
        with self._lock:
            self._stream.value = self._current_stream(problem.device)
            if self._bias.value != bias_address:
                # The plan reads the pointer from its descriptor at each launch; `probe` tries that it does.
                self._bias.value = bias_address
                status = self._set_attribute(self._handle, self._descriptor, _BIAS_POINTER, self._bias_address, 8)
                if status:
                    self._bias.value = None  # the library has the one before: the next call sets it again
                check(status, "MatmulDescSetAttribute", problem)
            status = self._matmul(
                self._handle,
                self._plan,
                _ALPHA,
                packed_address,
                dense_address,
                _BETA,
                output_address,
                output_address,
                workspace_address,
                self._stream_address,
                1,
            )
        if status:
            check(status, "Matmul", self)
        return output

    def _aligned(self, dense: Tensor, packed: Tensor, bias: Tensor | None, output: Tensor) -> Tensor:
        """The same with copies of what starts between two 16-byte steps, as a slice may."""
        dense, packed = realigned(dense), realigned(packed)
        result = self(dense, packed, None if bias is None else realigned(bias))
        return output.copy_(result)

    def __str__(self) -> str:
        return f"{self.problem}, algorithm {self.algorithm}"


def realigned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that starts between two 16-byte steps."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _destroy(to_destroy: list[tuple[str, int]], memory: object) -> None:
    """Undo what was built, last first. memory: of the structs, which has to live until here."""
    for name, address in reversed(to_destroy):
        call(name, "a plan that is no longer used", address)


_PLANS: dict[tuple[Problem, int | None], Plan] = {}


def _new_plan(problem: Problem, algorithm: int | None, bias: Tensor | None) -> Plan:
    if algorithm is not None:
        return Plan(problem, algorithm, bias)
    try:
        return Plan(problem, algorithms(version(), problem.dtype, problem.form, problem.capability)[0], bias)
    except RuntimeError:
        return Plan(problem, 0, bias)  # ids are not promised for every shape; this one is


def product(
    form: Form, dense: Tensor, packed: Tensor, n: int, bias: Tensor | None = None, output: Tensor | None = None
) -> Tensor:
    """Multiply as the form says: packed A [N, K] as `ops.reference.weights.pack`, B, a bias [N] or None -> D.

    All of one dtype, float16 or bfloat16, on the current device, contiguous; M a positive multiple of 8. Of float8 D is
    bfloat16, there is no bias, B and D are transposed, and M is a multiple of 16. Runs on the
    current stream, by the library version's default algorithm. RuntimeError if the library refuses.
    """
    return plan_for(problem_of(form, dense, n, bias), None, bias)(dense, packed, bias, output)


def problem_of(form: Form, dense: Tensor, n: int, bias: Tensor | None = None) -> Problem:
    """The problem that a call of `product` solves."""
    m, k = PRODUCTS[form].dense_shape(*dense.shape)
    return Problem(dense.get_device(), dense.dtype, m, n, k, bias is not None, form)


def plan_for(problem: Problem, algorithm: int | None, bias: Tensor | None) -> Plan:
    """The plan of a problem, built if need be. algorithm: an id of the library, or None for the default."""
    key = problem, algorithm
    plan = _PLANS.get(key)
    if plan is None:
        plan = _new_plan(problem, algorithm, bias)
        remember(_PLANS, key, plan)
    return plan
