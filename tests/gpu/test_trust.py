"""What test_training.py and test_faults.py try on CPUs, with the kernels, the allocator and the library of a GPU."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from replaced_weights import REPLACED
from support import TOLERANCE, Result, errors, in_threads, python_environment, relative_error, run, ste_reference, twins
from torch import Tensor, nn

import sparse_pass as sp
from sparse_pass.backend import SparseBackend
from sparse_pass.config import Scheme
from sparse_pass.kernels import backends, cusparselt, cusparselt_library, measure, probe, timings, tuner
from sparse_pass.kernels.problem import Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DIM, ROWS = 256, 192
MANY = 65536  # of which one activation is more than what torch's allocator has left over
W24 = sp.WeightSparsity()
CONFIG = {"up": W24, "down": W24}
BFLOAT16 = TOLERANCE[torch.bfloat16]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def network() -> Net:
    return Net().to("cuda", torch.bfloat16)


def batch(rows: int = ROWS, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, DIM, device="cuda", dtype=dtype, requires_grad=True)


def backend_of(model: nn.Module, tune: str = "off", inner: str = "inductor") -> SparseBackend:
    return sp.sparse_backend(CONFIG, model=model, inner=inner, tune=tune)


def results(
    call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, config: Mapping[str, sp.WeightSparsity] = CONFIG
) -> tuple[Result, Result]:
    """Outputs and gradients, and those of the reference of the model as it is now."""
    reference = ste_reference(model, config)
    return run(call, dict(model.named_parameters()), [x]), run(reference, twins(model, reference), [x])


def check(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> None:
    actual, expected = results(call, model, x)
    found = errors(actual, expected)
    assert max(found.values()) < TOLERANCE.get(x.dtype, BFLOAT16), found
    dense = errors(run(model, dict(model.named_parameters()), [x]), expected)
    assert dense["output 0"] > 5 * BFLOAT16, "dense is as right: nothing was tested"


def assert_kernels(backend: SparseBackend, kernel: str = "cusparselt") -> None:
    sites = backend.report.sites
    assert sites
    assert {site.output for site in sites} == {kernel}, str(backend.report)


# Guards


@pytest.mark.parametrize("how", REPLACED)
def test_replaced_weights(how: str) -> None:
    model, other, x = network(), network(), batch()
    # What Inductor of torch 2.11 compiled stops at other strides of a parameter, also without this backend.
    backend = backend_of(model, inner="aot_eager" if how == "strides" else "inductor")
    call = torch.compile(model, backend=backend)
    check(call, model, x)
    old = call(x).detach()
    REPLACED[how](model, other)
    check(call, model, x)
    assert relative_error(call(x), old) > 0.1
    assert_kernels(backend)


def test_tied_and_untied() -> None:
    model, x = nn.Sequential(*(nn.Linear(DIM, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))), batch()
    config = {"0": W24, "1": W24}
    backend = sp.sparse_backend(config, model=model, tune="off")
    call = torch.compile(model, backend=backend)
    for tied in (False, True, False):
        weight = torch.randn(DIM, DIM, device="cuda", dtype=torch.bfloat16) / DIM**0.5
        model[1].weight = model[0].weight if tied else nn.Parameter(weight)
        found = errors(*results(call, model, x, config))
        assert max(found.values()) < BFLOAT16, found
    assert_kernels(backend)


def test_requires_grad_toggled() -> None:
    model, x = network(), batch()
    backend = backend_of(model)
    call = torch.compile(model, backend=backend)
    for frozen in (False, True, False):
        model.up.weight.requires_grad_(not frozen)
        check(call, model, x)
    assert_kernels(backend)


def test_moved_to_another_dtype() -> None:
    """float32 has no 2:4 kernels; the way back does."""
    model = network()
    backend = backend_of(model)
    call = torch.compile(model, backend=backend)
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16):
        model.to(dtype)
        check(call, model, batch(dtype=dtype))
        found.append(len(backend.report.sites))
    kernels = [site.output for site in backend.report.sites]
    assert found == [2, 4, 6, 6], str(backend.report)
    assert kernels == ["cusparselt"] * 4 + ["masked_dense"] * 2


def test_no_grad_and_inference_in_turns() -> None:
    model, x = network(), batch()
    backend = backend_of(model)
    call = torch.compile(model, backend=backend)
    reference = ste_reference(model, CONFIG)
    for mode in (torch.enable_grad, torch.inference_mode, torch.no_grad) * 2:
        with mode():
            assert relative_error(call(x), reference(x)) < BFLOAT16
    check(call, model, x)
    assert_kernels(backend)


def per_sample(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Gradients of a loss by the input, made inside of the compiled function."""
    return torch.func.grad(lambda x: model(x).float().square().sum())


def test_transform_inside() -> None:
    model, x = network(), batch().detach()
    backend = backend_of(model)
    call = torch.compile(per_sample(model), backend=backend, fullgraph=True)
    expected = per_sample(ste_reference(model, CONFIG))(x)
    assert relative_error(call(x), expected) < BFLOAT16
    assert relative_error(per_sample(model)(x), expected) > 0.1
    assert_kernels(backend)


# Streams, threads, CUDA graphs


def test_training_on_a_side_stream() -> None:
    """What ran on another stream would be done before its input is there."""
    model, x = network(), batch()
    backend = backend_of(model)
    call = torch.compile(model, backend=backend)
    check(call, model, x)
    source = torch.randn_like(x)
    expected = results(model, model, source.clone().requires_grad_())[1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(source.detach())
        actual = run(call, dict(model.named_parameters()), [late.requires_grad_()])
    torch.cuda.current_stream().wait_stream(stream)
    found = errors(actual, expected)
    assert max(found.values()) < BFLOAT16, found
    assert_kernels(backend)


def test_threads_run_at_once() -> None:
    """One compiled model, a stream for each thread: each gets what belongs to its own input."""
    model = network()
    backend = backend_of(model)
    call = torch.compile(model, backend=backend)
    inputs = [batch() for _ in range(4)]
    check(call, model, inputs[0])
    reference = ste_reference(model, CONFIG)

    def outcome(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        y = function(x)
        return y.detach(), torch.autograd.grad(y.float().square().sum(), x)[0]

    expected = [outcome(reference, x) for x in inputs]
    torch.cuda.synchronize()
    together = threading.Barrier(len(inputs))
    found: list[float] = []

    def work(number: int) -> None:
        together.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                actual = outcome(call, inputs[number])
                torch.cuda.current_stream().synchronize()
                found.append(max(relative_error(a, e) for a, e in zip(actual, expected[number], strict=True)))

    in_threads(work, range(len(inputs)))
    assert len(found) == 80
    assert max(found) < BFLOAT16
    assert_kernels(backend)


@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "automatic"])
def test_cuda_graphs_of_several_sizes(dynamic: bool | None) -> None:
    """Graphs are recorded and replayed in turns, and the weights move in between."""
    model = network()
    backend = backend_of(model)
    call = torch.compile(model, backend=backend, mode="reduce-overhead", dynamic=dynamic)

    def cloned(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return call(x).clone()

    for turn in range(5):
        for rows in (ROWS, 64, 200):
            check(cloned, model, batch(rows))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02 * (turn + 1))
    assert_kernels(backend)


# The same bits


SCHEMES: dict[str, Scheme] = {
    "weights": sp.WeightSparsity(grad_weight="masked", decay=0.1),
    "inputs": sp.ActivationSparsity(),
    "gradients": sp.WeightSparsity(grad_weight="mvue"),
}


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", SCHEMES)
def test_same_bits_in_deterministic_mode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every call, and compiled anew."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    model, x = network(), batch()
    found = []
    with deterministic():
        for _ in range(2):
            torch._dynamo.reset()
            backend = sp.sparse_backend(dict.fromkeys(CONFIG, SCHEMES[name]), model=model, tune="off")
            call = torch.compile(model, backend=backend)
            for _ in range(3):
                torch.manual_seed(3)
                found.append(run(call, dict(model.named_parameters()), [x]))
            assert_kernels(backend)
    for other in found[1:]:
        assert torch.equal(found[0].outputs[0], other.outputs[0])
        for parameter, gradient in found[0].gradients.items():
            assert torch.equal(gradient, other.gradients[parameter]), parameter


# Faults


@contextmanager
def no_memory() -> Iterator[None]:
    """Nothing of some MiB can be allocated; less may find room beside what is held."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_out_of_memory_in_a_step() -> None:
    """torch's error, and the next step is right."""
    model, x = network(), batch(MANY)
    backend = backend_of(model)
    call = torch.compile(model, backend=backend)
    check(call, model, x)
    before = copy.deepcopy(model.state_dict())
    with no_memory(), pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        call(x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    check(call, model, x)
    assert_kernels(backend)


def test_out_of_memory_in_a_workspace() -> None:
    x, weight = batch(1024).detach(), torch.randn(1024, DIM, device="cuda", dtype=torch.bfloat16)
    packed = torch.ops.sparse_pass.sparsify(weight, "optimal")[0]
    problem = Problem(x.get_device(), x.dtype, 1024, 1024, DIM, False, "linear")
    plan = cusparselt.Plan(problem, 0, None)
    expected = plan(x, packed, None)
    plan.workspace_bytes = max(plan.workspace_bytes, 64 << 20)  # more than what is cached
    output = torch.zeros_like(expected)
    with no_memory(), pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        plan(x, packed, None, output)
    assert not output.any(), "it was launched"
    assert torch.equal(plan(x, packed, None, output), expected)


def test_out_of_memory_while_measuring(
    tuning_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = measure._measured

    def measured(*args: object) -> object:
        with no_memory():
            return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "_measured", measured)
    model = network()
    backend = backend_of(model, tune="auto")
    check(torch.compile(model, backend=backend), model, batch(MANY))
    assert "could not be measured (CUDA out of memory" in caplog.text
    assert_kernels(backend)
    assert not any(" M=" in file.read_text() for file in tuning_folder.glob("*.json"))


@pytest.fixture
def probed_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the probe finds in a test is of that test alone."""
    monkeypatch.setattr(cusparselt, "_PLANS", {})
    caches = (probe._backend, cusparselt_library._library)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def missing() -> None:
    raise RuntimeError("libcusparseLt.so.0 was not found: install the wheel")


def test_library_missing(probed_again: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own calls are the next way; without them it is masked_dense, with both reasons."""
    monkeypatch.setattr(cusparselt_library, "_load", missing)
    model, x = network(), batch()
    backend = backend_of(model)
    check(torch.compile(model, backend=backend), model, x)
    assert_kernels(backend)
    assert probe.backend(x.device, x.dtype) is backends.COMPRESS

    def refused(*_: object) -> Tensor:
        raise RuntimeError("cuSPARSELt not supported on your machine")

    monkeypatch.setattr(backends, "BACKENDS", (backends.SM90, replace(backends.COMPRESS, pack=refused)))
    probe._backend.cache_clear()
    torch._dynamo.reset()
    backend = backend_of(model)
    check(torch.compile(model, backend=backend), model, x)
    assert_kernels(backend, "masked_dense")
    for site in backend.report.sites:
        assert "libcusparseLt.so.0 was not found" in site.reason
        assert "not supported on your machine" in site.reason


def test_cache_that_cannot_be_used(
    tuning_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """First a corrupt file, then a folder that is none: measured again, warned of, right."""
    caplog.set_level(logging.INFO, "sparse_pass")
    model, x = network(), batch()

    def train() -> None:
        timings._KNOWN.clear()
        timings._log_once.cache_clear()
        tuner._CHOSEN.clear()
        torch._dynamo.reset()
        caplog.clear()
        call = torch.compile(model, backend=backend_of(model, tune="auto"))
        check(call, model, x)

    train()
    (file,) = tuning_folder.glob("*.json")
    whole = file.read_text()
    assert caplog.text.count("timing kernels") == whole.count("algorithm")
    measured = caplog.text.count("timing kernels")

    file.write_text(whole[: len(whole) // 2])
    train()
    assert caplog.text.count("cannot read") == 1
    assert caplog.text.count("timing kernels") == measured
    assert file.read_text().count("algorithm") == measured

    (tuning_folder / "file").write_text("where the folder should be")
    monkeypatch.setenv(timings.DIRECTORY_VARIABLE, str(tuning_folder / "file"))
    timings.path.cache_clear()
    train()
    assert caplog.text.count("cannot write") == 1
    assert caplog.text.count("timing kernels") == measured


TRAIN = """
import logging, torch, sparse_pass as sp
logging.basicConfig(level=logging.WARNING)
logging.getLogger("sparse_pass").setLevel(logging.INFO)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Tanh(), torch.nn.Linear(512, 256))
model.to("cuda", torch.bfloat16)
backend = sp.sparse_backend({"re:.*": sp.WeightSparsity()}, model=model)
x = torch.randn(192, 256, device="cuda", dtype=torch.bfloat16)
torch.compile(model, backend=backend)(x).float().square().mean().backward()
print(sum(float(p.grad.double().norm()) for p in model.parameters()))
"""


def test_processes_measure_at_once(tmp_path: Path) -> None:
    """On one GPU: what one has measured the others read, and all choose the same."""
    environment = python_environment(**{timings.DIRECTORY_VARIABLE: str(tmp_path)})
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, outputs
    assert len({printed for printed, _ in outputs}) == 1
    shapes = [line.split(": ", 3)[-1] for _, log in outputs for line in log.splitlines() if "timing kernels" in line]
    assert shapes
    assert len(shapes) == len(set(shapes)), shapes
    (file,) = tmp_path.glob("*.json")
    assert file.read_text().count("algorithm") == len(shapes)
