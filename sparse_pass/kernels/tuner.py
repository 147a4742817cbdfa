"""Time the library's algorithms and the dense matmul on a real shape, and choose.

The ids of cuSPARSELt's algorithms mean other kernels in another version, and the best one differs by shape,
so nothing is assumed: each is timed, and the winner must agree with algorithm 0 and with itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import cusparselt, sparsify, timings
from .cusparselt import Plan, Problem
from .cusparselt_library import version
from .timings import Timing

log = logging.getLogger(__name__)

# Relative difference in the Frobenius norm. Another order of additions gives 1e-3 in bfloat16.
_TOLERANCE = 5e-3
# The algorithms to try, by the first two numbers of the library's version: those that were fastest for some shape on
# an H200. All 21 of 0.8.0 gave right results alone, in CUDA graphs too, but trying all of them in one process once
# ended in an illegal instruction. An id that nobody tried may do anything, so other versions keep algorithm 0.
CANDIDATES = {(0, 8): (0, 4, 10, 12, 17, 18, 20)}
_SAMPLES = 5
_CALLS = 4
_MEASURING = threading.Lock()


def _candidates() -> tuple[int, ...]:
    return CANDIDATES.get(version()[:2], (0,))


def timing_of(problem: Problem, *, measure: bool) -> Timing | None:
    """What is known of a problem, measured now if it is not and ``measure`` is set; None if it is not known.

    RuntimeError inside a CUDA graph capture, where nothing can be measured.
    """
    file = timings.path(problem.device)
    name = timings.key(*problem[1:])
    found = timings.known(file).get(name)
    if found is not None and found.algorithm not in _candidates():
        found = None  # of an older version of this file, or edited: an id that is not tried here may do anything
    if found is not None or not measure:
        return found
    return _measured(file, name, problem.device, str(problem), lambda: _race(problem))


def preparation_of(device: int, shape: tuple[int, int], stored: torch.dtype, dtype: torch.dtype, mask: str) -> Timing:
    """What S(W) costs, packed both ways and as a dense masked weight; measured now if it is not known.

    shape: [N, K]. stored: dtype of W. dtype: of the GEMMs.
    """
    file = timings.path(device)
    name = f"S(W) {mask} {str(stored).removeprefix('torch.')} to {timings.key(dtype, 0, *shape, False)}"
    found = timings.known(file).get(name)
    if found is not None:
        return found

    def race() -> Timing:
        random = torch.Generator("cuda").manual_seed(0)
        weight = torch.randn(*shape, device="cuda", dtype=stored, generator=random)
        zero = weight.new_zeros(())
        packed_us = _time(lambda: sparsify.sparsify(weight, mask, dtype))
        masked_us = _time(lambda: torch.where(sparsify.mask24(weight, mask), weight, zero).to(dtype))
        return Timing(0, packed_us, masked_us)

    return _measured(file, name, device, f"the mask of a weight {list(shape)}", race)


def _measured(file: Path, name: str, device: int, about: str, race: Callable[[], Timing]) -> Timing:
    with _MEASURING, timings.one_process_at_a_time(file):
        found = timings.known(file).get(name)
        if found is None or found.algorithm not in _candidates():
            # A warning, as it takes a moment that the user did not ask for; once per GPU, library version and shape.
            log.warning("sparse_pass measures the 2:4 kernels for %s (tune='off' does not)", about)
            # Perhaps while a graph is compiled, under fake tensors and autocast: it must leave no trace there.
            with (
                _disable_current_modes(),
                torch.no_grad(),
                torch.autocast("cuda", enabled=False),
                torch.cuda.device(device),
            ):
                found = race()
            timings.remember(file, name, found)
    log.info("%s: %.0f us sparse, %.0f us dense, algorithm %d", about, found.sparse_us, found.dense_us, found.algorithm)
    return found


def _race(problem: Problem) -> Timing:
    _, dtype, m, n, k, has_bias = problem
    random = torch.Generator("cuda").manual_seed(0)  # the user's random state stays as it is

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype, generator=random)

    weight, input = normal(n, k), normal(m, k)
    bias = normal(n) if has_bias else None
    packed = sparsify.sparsify(weight, "optimal", dtype)[0]
    kept = weight.masked_fill_(~sparsify.mask24(weight, "optimal"), 0)
    dense_us = _time(lambda: torch.nn.functional.linear(input, kept, bias))

    first = Plan(problem, 0, bias)
    expected = first(input, packed, bias)
    plans = {0: first}
    for algorithm in _candidates():
        if algorithm in plans or algorithm >= first.algorithms:
            continue
        try:
            plans[algorithm] = Plan(problem, algorithm, bias)
            plans[algorithm](input, packed, bias)
        except RuntimeError as error:
            plans.pop(algorithm, None)
            log.debug("%s", error)  # ids are not promised for every shape
    times = {number: _time(lambda plan=plan: plan(input, packed, bias)) for number, plan in plans.items()}  # type: ignore[misc]
    for algorithm in sorted(times, key=times.__getitem__):
        plan = plans[algorithm]
        output = plan(input, packed, bias)
        difference = (output.float() - expected.float()).norm() / expected.float().norm()
        if bool(difference < _TOLERANCE) and torch.equal(output, plan(input, packed, bias)):
            return Timing(algorithm, times[algorithm], dense_us)
        log.warning("%s disagrees with algorithm 0 or with itself: not used", plan)
    return Timing(0, times[0], dense_us)


def _time(launch: Callable[[], object]) -> float:
    """Median GPU time of one launch in microseconds, by replay of a CUDA graph: no host time in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_CALLS):
            launch()
    samples: list[float] = []
    graph.replay()
    for _ in range(_SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1000 / _CALLS)
    return float(median(samples))


_CHOSEN: dict[Problem, Plan] = {}


def linear(
    input: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, output: Tensor | None = None
) -> Tensor:
    """`cusparselt.linear` by the fastest algorithm, which is measured at the first call where it is not known.

    A number of rows that was never measured takes the algorithm of the next one in a coarse grid, so that dynamic
    shapes measure a few times and not in every step.
    """
    m, k = input.shape
    # Equal to a Problem, and made in a third of the time.
    plan = _CHOSEN.get((input.get_device(), input.dtype, m, out_features, k, bias is not None))  # type: ignore[call-overload]
    if plan is None:
        plan = _choose(cusparselt.problem_of(input, bias, out_features), bias)
    return plan(input, packed, bias, output)  # type: ignore[no-any-return]


def _choose(problem: Problem, bias: Tensor | None) -> Plan:
    capturing = torch.cuda.is_current_stream_capturing()
    timing = timing_of(problem, measure=False)
    if timing is None:
        try:
            timing = timing_of(problem._replace(m=_grid(problem.m)), measure=not capturing)
        except RuntimeError as error:
            log.warning("%s could not be measured (%s): the default algorithm is used", problem, error)
    try:
        plan = cusparselt.plan_for(problem, None if timing is None else timing.algorithm, bias)
    except RuntimeError as error:
        if timing is None:
            raise
        # Chosen for another number of rows: ids are not promised for every shape.
        log.warning("%s: the default algorithm is used", error)
        plan = cusparselt.plan_for(problem, None, bias)
    if not capturing:
        cusparselt.remember(_CHOSEN, problem, plan)
    return plan


def _grid(rows: int) -> int:
    """The next of 64, 96, 128, 192, 256, ...: powers of two and one between each two."""
    power = max(64, 1 << (rows - 1).bit_length())
    return power * 3 // 4 if rows <= power * 3 // 4 and power > 64 else power
