"""Time the library's algorithms and the dense matmul on a real shape, and what the operands cost to make.

Triton is imported where it is needed: it comes with torch for GPUs only.

The ids of cuSPARSELt's algorithms mean other kernels in another version, and the best one differs by shape,
so nothing is assumed: each is timed, and the winner must agree with algorithm 0 and with itself.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..vocabulary import FLOAT8
from . import progress, timings
from .cusparselt import Plan
from .cusparselt_library import version
from .problem import Problem, algorithms
from .timings import Timing

log = logging.getLogger(__name__)

# Relative difference in the Frobenius norm. Another order of additions gives 1e-3 in bfloat16.
_TOLERANCE = 5e-3
_CALLS = 4
_SAMPLES = 5
# S(W) of [4096, 1024], 6 us on an H200, was once measured at 18 from samples of 30 us.
_SAMPLE_MS = 0.5
# Training runs at the clock that a load allows, which the GPU finds after some milliseconds of it.
_WARMUP_MS = 20.0
_MEASURING = threading.Lock()


def timing_of(problem: Problem, *, measure: bool) -> Timing | None:
    """What is known of a problem, measured now if it is not and ``measure`` is set; None if it is not known.

    RuntimeError inside a CUDA graph capture, where nothing can be measured.
    """
    file = timings.path(problem.device)
    name = timings.key(problem)
    found = timings.known(file).get(name)
    candidates = algorithms(version(), problem.dtype, problem.form, problem.capability)
    if found is not None and found.algorithm not in candidates:
        found = None  # of an older version of this file, or edited: an id that is not tried here may do anything
    if found is not None or not measure:
        return found
    return _measured(file, name, problem.device, str(problem), lambda: _race(problem, candidates), candidates)


Operand = Literal["S(W)", "MVUE(dY)", "MVUE(dY^T)", "S(X)"]


class Packers(NamedTuple):
    """How the device packs, see `backends.Backend`."""

    layout: str
    of: Callable[[str, torch.dtype], Callable[..., Any] | None]


def preparation_of(
    packers: Packers,
    operand: Operand,
    device: int,
    shape: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    mask: str = "",
) -> Timing:
    """What a structured operand costs, packed and as a dense one with zeros; measured now if it is not known.

    shape: of what it is made from, W [N, K], dY [M, N] or X [M, K]; of dY^T it is that of dY. dtypes: its own, and that
    of the GEMMs. RuntimeError if the device has no such packer.
    """
    file = timings.path(device)
    stored, dtype = dtypes
    about = f"{timings.name(stored)} to {timings.name(dtype)} {shape[0]}x{shape[1]}"
    name = " ".join(part for part in (operand, packers.layout, mask, about) if part)
    found = timings.known(file).get(name)
    if found is not None:
        return found

    def packer(op: str) -> Callable[..., Any]:
        if (found := packers.of(op, stored)) is None:
            raise RuntimeError(f"the layout {packers.layout!r} has no packer {op} of {stored}")
        return found

    def race() -> Timing:
        from . import mvue, sparsify

        if dtype == FLOAT8:
            return _float8_preparation(operand, shape, stored, mask)
        random = torch.Generator("cuda").manual_seed(0)
        dense = torch.randn(*shape, device="cuda", dtype=stored, generator=random)
        zero, seed = dense.new_zeros(()), torch.zeros(1, device="cuda", dtype=torch.int64)
        if operand in ("MVUE(dY)", "MVUE(dY^T)"):
            read = dense if operand == "MVUE(dY)" else dense.T
            pack = packer("sparsify_mvue")
            return Timing(0, _time(lambda: pack(read, seed)), _time(lambda: mvue.mvue24(read, seed)))
        if operand == "S(X)":
            pack = packer("sparsify_input")
            packed_us = _time(lambda: pack(dense, None, mask, "none"))
        else:
            pack = packer("sparsify")
            packed_us = _time(lambda: pack(dense, mask, dtype))
        tiles = dense[: shape[0] // 4 * 4]  # all of W
        return Timing(0, packed_us, _time(lambda: torch.where(sparsify.mask24(tiles, mask), tiles, zero).to(dtype)))

    return _measured(file, name, device, f"{operand} of {list(shape)}", race, (0,))


def _float8_preparation(operand: Operand, shape: tuple[int, int], stored: torch.dtype, mask: str) -> Timing:
    """The scale is left out: both ways read it."""
    from . import mvue, mvue_float8, sparsify, sparsify_float8

    random = torch.Generator("cuda").manual_seed(0)
    dense = torch.randn(*shape, device="cuda", dtype=stored, generator=random)
    zero, seed = dense.new_zeros(()), torch.zeros(1, device="cuda", dtype=torch.int64)
    one = torch.ones((), device="cuda")
    if operand == "S(W)":
        packed_us = _time(lambda: sparsify_float8.sparsify_float8(dense, one, mask))

        def kept() -> tuple[Tensor, Tensor]:
            values = torch.where(sparsify.mask24(dense, mask), dense, zero).to(FLOAT8)
            return values, values.T.contiguous()

        return Timing(0, packed_us, _time(kept))
    return Timing(
        0,
        _time(lambda: mvue_float8.sparsify_mvue_float8(dense, seed, one)),
        _time(lambda: mvue.mvue24(dense, seed).to(FLOAT8).to(stored)),
    )


def _measured(
    file: Path, name: str, device: int, about: str, race: Callable[[], Timing], candidates: tuple[int, ...]
) -> Timing:
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ or torch.cuda.get_allocator_backend() == "pluggable":
        # A capture that fails leaves torch's random numbers and its allocator as if it still went on.
        raise RuntimeError(
            "kernels are timed in CUDA graphs, which want torch's own caching allocator: unset "
            "PYTORCH_NO_CUDA_MEMORY_CACHING, use no pluggable allocator, or pass tune='off'"
        )
    with _MEASURING, timings.one_process_at_a_time(file):
        found = timings.known(file).get(name)
        if found is None or found.algorithm not in candidates:
            # Perhaps while a graph is compiled, under fake tensors and autocast: it must leave no trace there.
            with (
                progress.shown(about, str(file.parent)),
                _disable_current_modes(),
                torch.no_grad(),
                torch.autocast("cuda", enabled=False),
                torch.cuda.device(device),
            ):
                found = race()
            timings.remember(file, name, found)
    log.info("%s: %.0f us sparse, %.0f us dense, algorithm %d", about, found.sparse_us, found.dense_us, found.algorithm)
    return found


def dense_matmul(problem: Problem, kept: Tensor, dense: Tensor, bias: Tensor | None) -> Callable[[], Tensor]:
    """What a dense layer calls for the same GEMM. kept: A with its zeros."""
    if problem.dtype == FLOAT8:
        if problem.form != "linear":  # an estimate that is not packed is multiplied in 16 bits
            estimate, input_t = kept.to(problem.output_dtype), dense.to(problem.output_dtype)
            return lambda: estimate @ input_t.T
        one = torch.ones((), device="cuda")
        return lambda: torch._scaled_mm(dense, kept.T, one, one, out_dtype=problem.output_dtype, use_fast_accum=True)
    if problem.form == "linear":
        return lambda: torch.nn.functional.linear(dense, kept, bias)
    if problem.form == "input":
        return lambda: torch.nn.functional.linear(kept, dense)
    if problem.form == "grad_input":
        return lambda: kept @ dense
    if problem.form == "grad_weight_t":
        return lambda: kept @ dense.T
    turned = kept.T.contiguous()  # dY or S(X) as a dense layer has it
    if problem.form == "grad_weight":
        return lambda: turned.T @ dense
    return lambda: dense.T @ turned


def _race(problem: Problem, candidates: tuple[int, ...]) -> Timing:
    from . import sparsify

    dtype = problem.dtype
    random = torch.Generator("cuda").manual_seed(0)  # the user's random state stays as it is

    def normal(*shape: int) -> Tensor:
        made = torch.randn(*shape, device="cuda", dtype=problem.output_dtype, generator=random)
        return made.to(dtype)

    kept, dense = normal(problem.n, problem.k).to(problem.output_dtype), normal(*problem.dense_shape)
    bias = normal(problem.n) if problem.bias else None
    packed = _packed(kept, dtype)
    kept = kept.masked_fill_(~sparsify.mask24(kept, "optimal"), 0).to(dtype)
    dense_us = _time(dense_matmul(problem, kept, dense, bias))
    del kept

    first = Plan(problem, 0, bias)
    expected = first(dense, packed, bias)
    plans = {0: first}
    for algorithm in candidates:
        if algorithm in plans or algorithm >= first.algorithms:
            continue
        try:
            plans[algorithm] = Plan(problem, algorithm, bias)
            plans[algorithm](dense, packed, bias)
        except RuntimeError as error:
            plans.pop(algorithm, None)
            log.debug("%s", error)  # ids are not promised for every shape
    output = torch.empty_like(expected)
    times = {
        number: _time(lambda plan=plan: plan(dense, packed, bias, output))  # type: ignore[misc]
        for number, plan in plans.items()
    }
    for algorithm in sorted(times, key=times.__getitem__):
        plan = plans[algorithm]
        # What is in the output's memory before must not matter.
        plan(dense, packed, bias, output.fill_(float("nan")))
        difference = (output.float() - expected.float()).norm() / expected.float().norm()
        if bool(difference < _TOLERANCE) and torch.equal(output, plan(dense, packed, bias)):
            return Timing(algorithm, times[algorithm], dense_us)
        log.warning("%s disagrees with algorithm 0 or with itself: not used", plan)
    return Timing(0, times[0], dense_us)


def _packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """In the layout of SM90. In another one these bytes are another 2:4 matrix, and its product takes as long."""
    from . import sparsify, sparsify_float8

    if dtype == FLOAT8:
        return sparsify_float8.sparsify_float8(weight, weight.new_ones((), dtype=torch.float32), "optimal")[0]
    return sparsify.sparsify(weight, "optimal", dtype)[0]


def _time(launch: Callable[[], object]) -> float:
    """Median GPU time of one launch in microseconds, by replay of a CUDA graph: no host time in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Without a stream it takes one of the device that was current at the first capture of the process.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for _ in range(_CALLS):
            launch()
    graph.replay()  # the first one is uploaded
    once = max(_milliseconds(graph, 1), 1e-3)
    # Of one replay by itself the launch is a part.
    once = max(_milliseconds(graph, math.ceil(_WARMUP_MS / once)), 1e-3)
    samples = [_milliseconds(graph, math.ceil(_SAMPLE_MS / once)) for _ in range(_SAMPLES)]
    return median(samples) * 1000 / _CALLS


def _milliseconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end) / replays)
