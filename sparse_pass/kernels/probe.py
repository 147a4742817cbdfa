"""Which sparse kernels are right on a device: asked once per device and dtype, by multiplying a small matrix."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..vocabulary import FLOAT8, FLOAT8_CAPABILITY, MIN_CAPABILITY, packed_numel
from . import backends
from .backends import Backend

# Relative error in the Frobenius norm. Rounding the output to bfloat16 gives 2e-3; a wrong layout gives 1.1.
_TOLERANCE = 1e-2

LAYOUT_VARIABLE = "SPARSE_PASS_LAYOUT"
"""For tests: the name of the one backend that is tried, of `backends.BACKENDS`."""

_REASONS: dict[tuple[int, torch.dtype], tuple[str, ...]] = {}


def availability(device: torch.device, dtype: torch.dtype) -> str:
    """Return "" if 2:4 matmuls of `dtype` work on `device`, and else the reason why not. Never raises.

    Cheap after the first call for a device and dtype, and always for one that cannot work.
    """
    try:
        found = backend(device, dtype)
    except Exception as error:  # the border: a pass that asks wants a reason for its report, whatever went wrong
        return f"{type(error).__name__}: {error}"
    return found if isinstance(found, str) else ""


def backend(device: torch.device, dtype: torch.dtype) -> Backend | str:
    """Return the first backend that is right on the device, or why none is.

    RuntimeError inside a CUDA graph capture if the answer is not known yet.
    """
    if device.type != "cuda":
        return f"no 2:4 kernels on {device.type}"
    return _backend(_index(device), dtype)


def reasons(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Return why the backends before the one of `backend` were not taken, one line each; all of them if there is none.

    Never raises, as `availability`.
    """
    why = availability(device, dtype)
    if device.type != "cuda":
        return (why,)
    return _REASONS.get((_index(device), dtype), (why,) if why else ())


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _backend(device: int, dtype: torch.dtype) -> Backend | str:
    if torch.version.hip:
        return "no 2:4 kernels for ROCm"
    candidates = [one for one in backends.BACKENDS if dtype in one.dtypes]
    forced = os.environ.get(LAYOUT_VARIABLE)
    if forced:
        known = ", ".join(one.name for one in candidates)
        candidates = [one for one in candidates if one.name == forced]
        if not candidates:
            return f"{LAYOUT_VARIABLE}={forced!r} names no layout of {dtype}: expected one of {known}"
    if not candidates:
        return f"no 2:4 kernels for {dtype}, only for float16, bfloat16 and float8_e4m3fn"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"SM {capability[0]}.{capability[1]} has no 2:4 tensor cores; they begin with SM 8.0"
    if dtype == FLOAT8 and capability < FLOAT8_CAPABILITY:
        return f"SM {capability[0]}.{capability[1]} has no float8 tensor cores; they begin with SM 8.9"
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"the 2:4 kernels of cuda:{device} must be tried before a CUDA graph capture: run the model once first"
        )
    found, why = _first_right(candidates, device, dtype)
    _REASONS[device, dtype] = tuple(why)
    if found is None:
        return f"2:4 kernels do not work on cuda:{device} with {dtype} ({'; '.join(why)})"
    return found


def _first_right(candidates: list[Backend], device: int, dtype: torch.dtype) -> tuple[Backend | None, list[str]]:
    """The first one whose results are right, and why those before it are not."""
    why = []
    for one in candidates:
        try:
            error = _error_of(one, device, dtype)
        except Exception as failure:
            # A missing Triton, library or architecture: the next one is tried, and the reason goes to the report.
            why.append(f"{one.name}: {type(failure).__name__}: {failure}".splitlines()[0])
            continue
        if error < _TOLERANCE:
            return one, why
        why.append(f"{one.name}: wrong results, relative error {error:.1e}")
    return None, why


def _linear(of: Backend, weight: Tensor, transposed: bool, input: Tensor, bias: Tensor | None) -> Tensor:
    """weight: bfloat16 if the product is one of float8."""
    if input.dtype == FLOAT8 and (pack := of.packer("sparsify_float8", weight.dtype)) is not None:
        packed = pack(weight, weight.new_ones((), dtype=torch.float32), "optimal")[int(transposed)]
    elif input.dtype != FLOAT8 and (pack := of.packer("sparsify", weight.dtype)) is not None:
        packed = pack(weight, "optimal", weight.dtype)[int(transposed)]
    else:
        packed = of.pack((weight.T if transposed else weight).to(input.dtype))
    if packed.numel() != packed_numel(weight.shape[0], weight.shape[1], input.dtype):
        raise RuntimeError(f"{list(weight.shape)} is packed into {packed.numel()} elements")
    return of.multiply("linear", input, packed, weight.shape[int(transposed)], bias, False)


def _error_of(of: Backend, device: int, dtype: torch.dtype) -> float:
    """The worst relative error for its shapes, in both directions, without a bias and with two, the second on the plan
    of the first."""
    # This runs while a graph is compiled, under fake tensors and perhaps autocast, and must leave no trace: no random
    # numbers, no gradients.
    with (
        _disable_current_modes(),
        torch.no_grad(),
        torch.autocast("cuda", enabled=False),
        torch.cuda.device(device),
    ):
        return max(_error_of_shape(of, n, k, dtype, turned) for n, k in of.shapes for turned in (False, True))


def _error_of_shape(of: Backend, n: int, k: int, dtype: torch.dtype, transposed: bool) -> float:
    of.check(*((k, n) if transposed else (n, k)), dtype)
    weight = _integers(n, k, 5) * _two_of_four(n, k)
    input = _integers(64, n if transposed else k, 3)
    dense = input @ (weight if transposed else weight.T)
    biases = [] if dtype == FLOAT8 else [_integers(1, dense.shape[1], step)[0] for step in (7, 11)]
    # Both at once: the second in the memory of the first would be right by the first one's address, too.
    placed = [bias.to(device="cuda", dtype=dtype) for bias in biases]
    worst, stored = 0.0, torch.bfloat16 if dtype == FLOAT8 else dtype
    for bias, there in ((None, None), *zip(biases, placed, strict=True)):
        expected = dense if bias is None else dense + bias
        placed_weight = weight.to(device="cuda", dtype=stored)
        output = _linear(of, placed_weight, transposed, input.to(device="cuda", dtype=dtype), there)
        error = (output.double().cpu() - expected).norm() / expected.norm()
        worst = max(worst, float(error) if error == error else float("inf"))
    return worst


def _integers(rows: int, cols: int, step: int) -> Tensor:
    """Odd integers from -7 to 7 in an irregular order, exact in any dtype; float64 on the CPU."""
    place = torch.arange(rows * cols, dtype=torch.float64)
    return (((place + step) ** 2 * 0.37).floor() % 8 * 2 - 7).view(rows, cols)


def _two_of_four(rows: int, cols: int) -> Tensor:
    """A mask that keeps two of four along rows and columns, not the same in neighbouring tiles."""
    row, col = torch.arange(rows)[:, None], torch.arange(cols)[None, :]
    return (row + col + row // 4 * 3 + col // 4 * (row // 4 % 3)) % 4 < 2
