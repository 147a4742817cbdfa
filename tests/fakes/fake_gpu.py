"""A GPU for machines without one: its kernels are the references, and its tensors those of the CPU."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparse_pass import kernels
from sparse_pass.kernels import cusparselt
from sparse_pass.ops import definitions
from sparse_pass.ops.reference import float8 as reference_float8
from sparse_pass.ops.reference import gradients as reference_gradients
from sparse_pass.ops.reference import inputs as reference_inputs
from sparse_pass.ops.reference import weights as reference

OWN = -1
"""The number of the device, as a CPU tensor says."""
KERNELS: dict[str, dict[str, Callable[..., Any]]] = {
    "sparsify": {
        "mask24": reference.mask24,
        "sparsify": reference.sparsify,
        "sparsify_one": reference.sparsify_one,
        "sparsify_input": reference_inputs.sparsify_input,
    },
    "sparsify_float8": {"sparsify_float8": reference_float8.sparsify},
    "mvue_float8": {"sparsify_mvue_float8": reference_float8.sparsify_mvue},
    "mvue": {
        "mvue24": reference_gradients.mvue24,
        "mvue24_sum": lambda grad, seed: (reference_gradients.mvue24(grad, seed), reference_gradients.sums(grad)),
        "sparsify_mvue": reference_gradients.sparsify_mvue,
        "sparsify_mvue_sum": reference_gradients.sparsify_mvue_sum,
    },
}


def install_kernels(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Put references in the place of the Triton kernels, and of the calls of torch; returns how often each is called.

    They take what the kernels take, and only on the current device.
    """
    called: Counter[str] = Counter()

    def on_the_device(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            assert torch.cuda.current_device() == OWN
            called[name] += 1
            return function(*args, **kwargs)

        return call

    for module, functions in KERNELS.items():
        fake = ModuleType(f"sparse_pass.kernels.{module}")
        vars(fake).update({name: on_the_device(name, function) for name, function in functions.items()})
        monkeypatch.setattr(kernels, module, fake, raising=False)
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    for name in PACKERS:  # made of the kernels when they are imported, which may have been others
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr(name, raising=False)
    for name, function in TORCH.items():
        monkeypatch.setattr(torch, name, on_the_device(name, function), raising=False)
    return called


def _compress(masked: Tensor) -> Tensor:
    assert masked.is_contiguous()
    assert (masked.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all()
    return reference.pack(masked, reference_inputs.input_mask24(masked, "rowwise")).view(masked.shape[0], -1)


def _sparse_mm(
    packed: Tensor, dense: Tensor, *, bias: Tensor | None = None, transpose_result: bool = False
) -> Tensor:  # fmt: skip
    assert dense.is_contiguous() or dense.T.is_contiguous()
    assert dense.shape[1] % 8 == 0
    assert all(one is None or one.data_ptr() % 16 == 0 for one in (packed, dense, bias))
    product = reference.unpack(packed.reshape(-1), packed.shape[0], dense.shape[0]).double() @ dense.double()
    product = (product if bias is None else product + bias.double()[:, None]).to(dense.dtype)
    return product.T.contiguous() if transpose_result else product


def _cutlass_addmm(bias: Tensor | None, values: Tensor, metadata: Tensor, dense: Tensor) -> Tensor:
    if torch.cuda.get_device_capability(0)[0] != 8:
        raise RuntimeError("sparse_semi_structured_mad_op : Supported only on GPUs with compute capability 8.x")
    assert 1 in dense.stride()
    assert dense.shape[1] % 8 == 0
    assert all(one is None or one.data_ptr() % 16 == 0 for one in (values, metadata, dense, bias))
    rows, cols = len(values), 2 * values.shape[1]
    packed = torch.cat([values.flatten(), metadata.flatten().view(values.dtype)])
    product = reference.unpack(packed, rows, cols, "cutlass").double() @ dense.double()
    return (product if bias is None else product + bias.double()[:, None]).to(dense.dtype)


TORCH: dict[str, Callable[..., Any]] = {
    "_cslt_compress": _compress,
    "_cslt_sparse_mm": _sparse_mm,
    "_sparse_semi_structured_mm": lambda values, metadata, dense: _cutlass_addmm(None, values, metadata, dense),
    "_sparse_semi_structured_addmm": _cutlass_addmm,
}
PACKERS = [f"sparse_pass.kernels.{name}" for name in ("compiled", "sm80", "cutlass", "library_packed")]


class Devices:
    """Which device is current: number 3, and the tensors' own only where it is entered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 3
        empty = cusparselt._empty_strided_cuda

        def empty_there(*layout: Any) -> Tensor:
            assert self.current == OWN
            return empty(*layout)

        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self._entered)
        monkeypatch.setattr(cusparselt, "_empty_strided_cuda", empty_there)

    @contextmanager
    def _entered(self, device: torch.device | int) -> Iterator[None]:
        before, self.current = self.current, OWN if isinstance(device, torch.device) else device
        yield
        self.current = before


class CudaIsTheCpu(TorchFunctionMode):
    """Whoever asks for ``device="cuda"`` gets a tensor of the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@contextmanager
def cuda_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    with CudaIsTheCpu():
        yield


@contextmanager
def device_operators() -> Iterator[None]:
    """The operators do with tensors of the CPU what they would do with those of the device."""
    here = torch.library.Library("sparse_pass", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("sparse_pass::"):
            op = name.partition("::")[2]
            here.impl(op, getattr(definitions, op.upper()).cuda, "CPU", allow_override=True)
    yield
    here._destroy()


class Clock:
    """Streams, events and graphs whose replays take ``milliseconds``, one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, milliseconds: list[float]) -> None:
        self.now = 0.0
        self.mode = ""
        self.capturing = False
        self.waits = 0
        self.stream = stream = SimpleNamespace(wait_stream=self._wait)

        @contextmanager
        def capture(graph: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
            self.captured_on, self.mode, self.capturing = stream, capture_error_mode, True
            yield
            self.capturing = False

        @contextmanager
        def entered(stream: Any) -> Iterator[None]:
            yield

        def replay() -> None:
            self.now += milliseconds.pop(0)

        for name, fake in {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": entered,
            "CUDAGraph": lambda: SimpleNamespace(replay=replay),
            "graph": capture,
            "Event": lambda enable_timing: _Event(self),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def _wait(self, other: Any) -> None:
        self.waits += 1


class _Event:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def record(self) -> None:
        self.at = self._clock.now

    def synchronize(self) -> None:
        self.done = True

    def elapsed_time(self, end: _Event) -> float:
        assert end.done
        return end.at - self.at
