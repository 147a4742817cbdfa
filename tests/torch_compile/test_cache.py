"""Compile caches: equal configs hit them, changed ones do not, and a warm start reports as much as a cold one."""

from __future__ import annotations

import gc
import json
import logging
import shutil
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import python_environment
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache
from torch.utils.checkpoint import checkpoint

import sparse_pass as sp
from sparse_pass import graph_pass, inductor, one_graph

SPARSE = sp.WeightSparsity(backend="cusparselt")
MISSPELT = {"0": SPARSE, "zero": SPARSE}


@pytest.fixture(autouse=True)
def _caches_on(fresh_compiler: None) -> Iterator[None]:
    with fresh_cache(), inductor_config.patch(fx_graph_cache=True), functorch_config.patch(enable_autograd_cache=True):
        yield


@dataclass
class Calls:
    """How often the pass was called, and how often only to report a graph that a cache held."""

    rewrites: int = 0
    retraces: int = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    original, report_graph = graph_pass.rewrite_graph, inductor.report_graph

    def counted_rewrite(*args: Any, **kwargs: Any) -> Any:
        calls.rewrites += 1
        return original(*args, **kwargs)

    def counted_report(*args: Any, **kwargs: Any) -> None:
        calls.retraces += 1
        report_graph(*args, **kwargs)

    monkeypatch.setattr(graph_pass, "rewrite_graph", counted_rewrite)
    monkeypatch.setattr(inductor, "report_graph", counted_report)
    return calls


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)).to(torch.bfloat16)


def batch(rows: int = 8) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, 64, dtype=torch.bfloat16)


def via_backend(module: nn.Module, config: Mapping[str, Any], **options: Any) -> tuple[Any, Callable[[], sp.Report]]:
    made = sp.sparse_backend(config, **options)
    return torch.compile(module, backend=made), lambda: made.report


def via_options(module: nn.Module, config: Mapping[str, Any]) -> tuple[Any, Callable[[], sp.Report]]:
    made = sp.inductor_options(config)
    return torch.compile(module, options=made), lambda: made["joint_custom_pre_pass"].report


WAYS = {"backend": via_backend, "options": via_options}


@dataclass(frozen=True)
class Seen:
    """What one start showed: cache hits and misses, the report, our warnings, and the numbers."""

    hits: int
    misses: int
    report: sp.Report
    warned: tuple[str, ...]
    results: tuple[Tensor, ...]


def start(
    compiled: Callable[..., Any],
    report: Callable[[], sp.Report],
    *inputs: Tensor,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    module: nn.Module | None = None,
) -> Seen:
    """What a new process would see: nothing compiled in memory, the caches as they are on disk."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(2)
    results: list[Tensor] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x in inputs:
            with context():
                output = compiled(x)
            results.append(output.detach())
            if output.requires_grad:
                output.float().square().sum().backward()
        final = report()
    for parameter in module.parameters() if module else ():
        if parameter.grad is not None:
            results.append(parameter.grad)
            parameter.grad = None
    found = counters["aot_autograd"]
    return Seen(
        hits=found["autograd_cache_hit"],
        misses=found["autograd_cache_miss"],
        report=final,
        warned=tuple(str(w.message) for w in caught if "sparse_pass" in str(w.message)),
        results=tuple(results),
    )


def check_same(warm: Seen, cold: Seen) -> None:
    assert warm.report == cold.report
    assert warm.warned == cold.warned
    assert len(warm.results) == len(cold.results)
    for now, then in zip(warm.results, cold.results, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("way", [pytest.param(via_backend, id="backend"), pytest.param(via_options, id="options")])
def test_hit(way: Callable[..., Any], calls: Calls) -> None:
    """On a hit Inductor does not call the pass. The report is that of the cold start, its warning included."""
    module = model()
    cold = start(*way(module, MISSPELT), batch(), module=module)
    assert (cold.misses, cold.hits) == (1, 0)
    assert (calls.rewrites, calls.retraces) == (1, 0)
    assert [site.fqn for site in cold.report.sites] == ["0"]
    assert cold.report.unmatched == ("zero",)
    assert len(cold.warned) == 1

    warm = start(*way(module, MISSPELT), batch(), module=module)
    assert (warm.misses, warm.hits) == (0, 1)
    assert (calls.rewrites, calls.retraces) == (2, 1)
    check_same(warm, cold)


def test_ways_share_no_entry_by_accident() -> None:
    """Whoever hits whose entry: the numbers are those of the config."""
    module = model()
    dense = start(torch.compile(module), sp.Report, batch())
    for way in WAYS.values():
        seen = start(*way(module, {"0": SPARSE}), batch())
        assert seen.report.sites
        assert not torch.equal(seen.results[0], dense.results[0])
    assert torch.equal(start(torch.compile(module), sp.Report, batch()).results[0], dense.results[0])


def via_backend_with_model(module: nn.Module, config: Mapping[str, Any]) -> tuple[Any, Callable[[], sp.Report]]:
    return via_backend(module, config, model=module)


@pytest.mark.parametrize(
    "way",
    [pytest.param(via_backend_with_model, id="backend_model"), pytest.param(via_options, id="options")],
)
def test_report_is_made_late(way: Callable[..., Any], calls: Calls) -> None:
    """Where no warning can be due, a warm start does not wait for the report; reading it twice adds nothing."""
    module = model()
    compiled, cold_report = way(module, {"0": SPARSE})
    start(compiled, sp.Report, batch())
    compiled, warm_report = way(module, {"0": SPARSE})
    assert start(compiled, sp.Report, batch()).hits == 1
    assert (calls.rewrites, calls.retraces) == (1, 0)
    assert warm_report() == cold_report() == warm_report()
    assert (calls.rewrites, calls.retraces) == (2, 1)


@pytest.mark.parametrize(
    "way",
    [pytest.param(via_backend_with_model, id="backend_model"), pytest.param(via_options, id="options")],
)
def test_a_warm_start_is_logged_as_a_cold_one(
    way: Callable[..., Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines, and artifacts for tlparse, without anybody reading the report."""
    artifacts: list[str] = []
    recorded = lambda kind, metadata_fn, payload_fn, **_: artifacts.append(payload_fn())  # noqa: E731
    monkeypatch.setattr(one_graph, "trace_structured", recorded)
    module, told = model(), []
    for hits in (0, 1):
        compiled, _ = way(module, {"0": SPARSE})
        with caplog.at_level(logging.INFO, logger="sparse_pass"):
            assert start(compiled, sp.Report, batch()).hits == hits
        told.append([record.getMessage() for record in caplog.records if record.name.startswith("sparse_pass")])
        caplog.clear()
    assert told[0] == told[1] == ["0: sparse"]
    assert len(artifacts) == 2
    assert artifacts[0] == artifacts[1]


def test_report_that_is_never_read_keeps_no_parameters() -> None:
    """What waits to be traced again holds the graph, not the model."""
    for _ in range(2):
        module = model()
        options = sp.inductor_options({"0": SPARSE})
        start(torch.compile(module, options=options), sp.Report, batch())
    weight = weakref.ref(module[0].weight)
    del module
    torch._dynamo.reset()
    gc.collect()
    assert weight() is None
    assert [site.fqn for site in options["joint_custom_pre_pass"].report.sites] == ["0"]


# What else a warm start must tell


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        torch._dynamo.graph_break()
        return self.down(x)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.Dropout(0.5), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.mlp, x, use_reentrant=False)


class Normed(nn.Module):
    """Buffers that the forward updates."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(64, 128), nn.BatchNorm1d(128)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x))


@dataclass(frozen=True, kw_only=True)
class Case:
    module: Callable[[], nn.Module] = model
    config: Mapping[str, Any]
    rows: tuple[int, ...] = (8,)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    dynamic: bool | None = None
    dtype: torch.dtype = torch.bfloat16
    graphs: int = 1
    sites: int = 1


CASES = {
    "no_grad": Case(config={"0": SPARSE}, context=torch.no_grad),
    "autocast": Case(
        config={"0": SPARSE},
        context=lambda: torch.autocast("cpu", torch.bfloat16),
        dtype=torch.float32,
    ),
    "dynamic": Case(config={"*": SPARSE}, dynamic=True, rows=(8, 24), sites=2),
    "automatic_dynamic": Case(config={"1": SPARSE}, rows=(8, 24), graphs=2, sites=2),
    "graph_break": Case(
        module=Broken,
        config={"up": SPARSE, "down": sp.WeightSparsity(grad_weight="masked", backend="cusparselt")},
        graphs=2,
        sites=2,
    ),
    "checkpoint_and_dropout": Case(module=Checkpointed, config={"mlp.*": SPARSE}, sites=2),
    "buffers": Case(module=Normed, config={"up": SPARSE}),
    "skipped": Case(module=lambda: nn.Sequential(nn.Linear(64, 10)), config={"*": SPARSE}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_warm_report(case: Case, calls: Calls) -> None:
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        module = case.module().to(case.dtype)
        made = sp.sparse_backend(case.config)
        compiled = torch.compile(module, backend=made, dynamic=case.dynamic)
        inputs = [batch(rows).to(case.dtype) for rows in case.rows]
        seen.append(start(compiled, lambda made=made: made.report, *inputs, context=case.context, module=module))
    cold, warm = seen
    assert (cold.hits, warm.misses) == (0, 0)
    assert warm.hits == case.graphs
    assert calls.retraces == case.graphs
    assert (cold.report.graphs, len(cold.report.sites)) == (case.graphs, case.sites)
    check_same(warm, cold)


PROGRAM = """
import json, sys, warnings
import torch
from compile_time import no_loops
from torch import nn
from torch._dynamo.utils import counters
import sparse_pass as sp

def seen(compiled, report):
    torch._dynamo.reset()
    counters.clear()
    module.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = compiled(x)
        output.float().sum().backward()
        text = str(report())
    return {
        "hits": counters["aot_autograd"]["autograd_cache_hit"],
        "misses": counters["aot_autograd"]["autograd_cache_miss"],
        "report": text,
        "warned": [str(w.message) for w in caught if "sparse_pass" in str(w.message)],
        "output": output.float().sum().item(),
        "gradient": module[0].weight.grad.float().norm().item(),
    }

torch.manual_seed(0)
module = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)).to(torch.bfloat16)
x = torch.randn(8, 64, dtype=torch.bfloat16)
scheme = sp.WeightSparsity(backend="cusparselt")
config = {"0": scheme, "zero": scheme}
backend = sp.sparse_backend(config)
options = sp.inductor_options(config)
with no_loops():
    print(json.dumps({
        "backend": seen(torch.compile(module, backend=backend), lambda: backend.report),
        "options": seen(torch.compile(module, options=options), lambda: options["joint_custom_pre_pass"].report),
    }))
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a first and a second process with one cache folder saw."""
    cache = str(tmp_path_factory.mktemp("cache"))
    environment = python_environment(TORCHINDUCTOR_CACHE_DIR=cache, OMP_NUM_THREADS="1")
    seen = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        seen.append(json.loads(done.stdout.splitlines()[-1]))
    return seen


@pytest.mark.parametrize("way", ["backend", "options"])
def test_second_process(way: str, processes: list[dict[str, Any]]) -> None:
    """The code that a cache holds imports what it calls, too: nothing is lowered where it is loaded."""
    cold, warm = (dict(process[way]) for process in processes)
    assert (cold.pop("misses"), cold.pop("hits")) == (1, 0)
    assert (warm.pop("misses"), warm.pop("hits")) == (0, 1)
    assert "unmatched: 'zero' named no linear" in cold["report"]
    assert len(cold["warned"]) == 1
    assert warm == cold


# What makes a key

OTHER = {
    "mask": "greedy",
    "grad_weight": "masked",
    "decay": 0.5,
    "scale": 2.0,
    "precision": "float8",
    "backend": "masked_dense",
}
"""For every field of the scheme a value that is not SPARSE's."""


def variations() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Config and backend arguments that must not share an entry with `{"0": SPARSE, "re:[0]": SPARSE}`."""
    base = {"0": SPARSE, "re:[01]": SPARSE}
    return {
        **{field: ({**base, "0": replace(SPARSE, **{field: value})}, {}) for field, value in OTHER.items()},
        "none": ({**base, "0": None}, {}),
        "fewer": ({"0": SPARSE}, {}),
        "strict": (base, {"strict": True}),
        "tune": (base, {"tune": "off"}),
    }


def test_every_field_has_another_value() -> None:
    """A field that is added must be added above too, or nobody knows that it is part of the key."""
    assert set(OTHER) == {field.name for field in fields(sp.WeightSparsity)}
    assert all(getattr(SPARSE, name) != value for name, value in OTHER.items())


def test_changed_config_misses() -> None:
    """A field of a scheme and an argument of the backend; that the key has each of them is what `test_uuid` shows."""
    module = model()
    base = {"0": SPARSE, "re:[01]": SPARSE}
    assert start(*via_backend(module, base), batch()).misses == 1
    assert start(*via_backend(module, base), batch()).hits == 1
    for name in ("decay", "none", "strict"):
        config, arguments = variations()[name]
        seen = start(*via_backend(module, config, **arguments), batch())
        assert (seen.misses, seen.hits) == (1, 0), name
    assert start(*via_backend(module, dict(base)), batch()).hits == 1


def test_uuid() -> None:
    """The key itself: equal for equal passes, different for all variations, and for another order of patterns."""
    base = {"0": SPARSE, "re:[01]": SPARSE}
    key = sp.SparsePass(base).uuid()
    assert sp.SparsePass({"0": replace(SPARSE), "re:[01]": replace(SPARSE)}).uuid() == key
    keys = [sp.SparsePass(config, **arguments).uuid() for config, arguments in variations().values()]
    keys.append(sp.SparsePass(dict(reversed(base.items()))).uuid())
    assert len({key, *keys}) == len(keys) + 1


def test_uuid_does_not_change_with_use() -> None:
    module = model()
    sparse_pass = sp.SparsePass({"0": SPARSE, "1": SPARSE})
    key = sparse_pass.uuid()
    start(torch.compile(module, options={"joint_custom_pre_pass": sparse_pass}), sp.Report, batch())
    assert sparse_pass.report.graphs == 1
    assert sparse_pass.uuid() == key


def test_uuid_covers_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edited rewrite does not meet the graphs of the one before."""
    first, same, edited = folders = [tmp_path / name for name in ("first", "same", "edited")]
    shutil.copytree(Path(sp.__file__).parent, first, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(first, same)
    shutil.copytree(first, edited)
    with (edited / "kernels" / "__init__.py").open("a") as file:
        file.write("# an edit\n")
    keys = []
    for folder in folders:
        monkeypatch.setattr(graph_pass, "__file__", str(folder / "graph_pass.py"))
        keys.append(sp.SparsePass({"0": SPARSE}).uuid())
    assert keys[0] == keys[1] != keys[2]


def test_other_names_miss() -> None:
    """The same graph under other names is another case for the config."""
    made = []
    for name in ("a", "b"):
        module = nn.Sequential()
        module.add_module(name, nn.Linear(64, 64))
        seen = start(*via_backend(module.to(torch.bfloat16), {"a": SPARSE, "c": SPARSE}), batch())
        assert seen.misses == 1
        made.append([site.fqn for site in seen.report.sites])
    assert made == [["a"], []]


def test_regions_that_differ() -> None:
    """Blocks share source and captured graph; what the config says of them keeps their entries apart."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        module = nn.Sequential(Block(), Block(), Block()).to(torch.bfloat16)
        made = sp.sparse_backend({"0.fc": None, "*.fc": SPARSE}, model=module)
        for block in module:
            block.compile(backend=made)
        seen.append(start(module, lambda made=made: made.report, batch(), module=module))
    cold, warm = seen
    assert [site.fqn for site in cold.report.sites] == ["1.fc"]
    assert (cold.misses, warm.hits, warm.misses) == (2, 2, 0)
    check_same(warm, cold)
