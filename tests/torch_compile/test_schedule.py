"""Schedules: sparse from one step to another; one graph for each config, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from scheduled import CONFIG, FC1, straight_through
from stack import Stack
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import sparse_pass as sp

W24 = sp.WeightSparsity()


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*sparse_pass")
        yield


def backend_for(model: nn.Module, config: Mapping[str, Any] = CONFIG, **options: Any) -> Any:
    return sp.sparse_backend(config, model=model, inner="aot_eager", **options)


def train(
    model: nn.Module,
    forward: Callable[[Tensor, int], Tensor],
    steps: Sequence[int],
    *,
    optimizer: Any = None,
    after: Callable[[], None] = lambda: None,
) -> tuple[list[Tensor], Any]:
    """Losses of these steps of AdamW, on a batch that depends on the number of the step. after: called after each."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in steps:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        loss = (forward(x, step) - x.flip(0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
        losses.append(loss.detach())
    return losses, optimizer


def compiled_whole(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend=backend)


def compiled_in_place(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    model.compile(backend=backend)
    return model


def compiled_by_blocks(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    for block in model.blocks:
        block.compile(backend=backend)
    return model


def ddp(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(DistributedDataParallel(model), backend=backend)


def fsdp2(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    for part in (*model.blocks, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (1,)))
    return torch.compile(model, backend=backend)


# How many graphs there are of a config in which all is dense, and of one in which not all blocks are treated alike.
# Only the input of the first block needs no gradient; FSDP2 breaks the graph at each block.
WAYS = [
    (compiled_whole, (1, 1)),
    (compiled_in_place, (1, 1)),
    (compiled_by_blocks, (2, 3)),
    (ddp, (1, 1)),
    (fsdp2, (2, 3)),
]


@pytest.mark.parametrize(("compiled", "graphs_each"), WAYS, ids=[way.__name__ for way, _ in WAYS])
@pytest.mark.usefixtures("one_process")
def test_a_window(compiled: Callable[..., Any], graphs_each: tuple[int, int]) -> None:
    """Losses are those of training by hand; each graph once more at the first switch, and none on the way back."""
    model = Stack()
    reference = copy.deepcopy(model)
    names = list(model.state_dict())
    backend = backend_for(model, strict=True)
    schedule = sp.Schedule(backend, start=2, stop=4)
    run = compiled(model, backend)
    graphs = []

    def forward(x: Tensor, step: int) -> Tensor:
        assert schedule.count == step
        out = run(x)
        graphs.append(backend.report.graphs)
        return out

    masked = {**dict.fromkeys(FC1, "optimal"), "blocks.1.fc2": "greedy"}
    losses, optimizer = train(model, forward, range(6), after=schedule.step)
    wanted, other = train(
        reference, lambda x, step: straight_through(reference, x, masked if 2 <= step < 4 else {}), range(6)
    )
    torch.testing.assert_close(losses, wanted)
    assert list(model.state_dict()) == names
    assert [len(state) for state in optimizer.state.values()] == [len(state) for state in other.state.values()]
    assert graphs == [graphs_each[0]] * 2 + [sum(graphs_each)] * 4
    report = backend.report
    assert {name for site in report.sites for name in (site.fqn, *site.serves)} == set(masked)
    assert {site.steps for site in report.sites} == {"steps 2 to 3"}
    assert (report.uncaptured, report.unmatched) == ((), ())
    assert any(note.startswith("steps 0 to 1, 4 on: all named linears are dense") for note in report.notes)


def test_windows_by_pattern() -> None:
    """Three configs, of which two come twice; evaluation is of the phase, too."""
    model, x = Stack(), torch.randn(4, 16)
    backend = backend_for(model)
    schedule = sp.Schedule(backend, 1, 5, patterns={"blocks.1.fc2": (2, 4)})
    run = torch.compile(model, backend=backend)
    graphs = []
    for step in range(7):
        masked = dict.fromkeys(FC1, "optimal") if 1 <= step < 5 else {}
        masked |= {"blocks.1.fc2": "greedy"} if 2 <= step < 4 else {}
        torch.testing.assert_close(run(x), straight_through(model, x, masked))
        with torch.no_grad():
            torch.testing.assert_close(run(x), straight_through(model, x, masked))
        assert [key for key, scheme in schedule.config.items() if scheme] == list(CONFIG)[: len(masked) // 2]
        graphs.append(backend.report.graphs)
        schedule.step()
    assert graphs == [2, 4, 6, 6, 6, 6, 6]
    lines = [re.split("  +", line)[:4] for line in str(backend.report).splitlines()]
    assert lines[1] == ["fqn", "graph", "steps", "scheme"]
    assert [line for line in lines if line[0] == "blocks.1.fc2"] == [
        ["blocks.1.fc2", kind, "2 to 3", "w24(mask=greedy)"] for kind in ("training", "inference")
    ]
    assert {site.steps for site in backend.report.sites if site.fqn in FC1} == {"steps 1, 4", "steps 2 to 3"}


def test_limits_of_graphs_are_those_of_each_config() -> None:
    """Six graphs of one code under a limit of three: two sizes in each of three configs."""
    model = Stack()
    backend = backend_for(model, strict=True)
    schedule = sp.Schedule(backend, 1, 3, patterns={"blocks.1.fc2": (2, 3)})
    run = torch.compile(model, backend=backend, dynamic=False)
    sizes = [torch.randn(rows, 16) for rows in (4, 8)]
    with torch._dynamo.config.patch(recompile_limit=3):
        for step in [0, 1, 2, 0, 1, 2]:
            schedule.at(step)
            for x in sizes:
                run(x)
        assert backend.report.graphs == 6
        with pytest.raises(RuntimeError, match="recompile_limit = 3 graphs of one code"):
            run(torch.randn(12, 16))


class TwoHeads(nn.Module):
    """One of its layers is not called, but on request."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.both = nn.Linear(16, 16), nn.Linear(16, 16), False

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(x) + (self.fc2(x) if self.both else 0)


def step_of(model: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
    run(torch.ones(4, 16)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()


def test_what_no_graph_reads_is_told_in_its_own_steps() -> None:
    """A layer that no graph reads is no concern of steps in which it is dense anyway, before or after."""
    model = TwoHeads()
    backend = backend_for(model, {"fc*": W24}, strict=True)
    schedule = sp.Schedule(backend, 1, 3)
    run = torch.compile(model, backend=backend)
    step_of(model, run)
    schedule.step()
    with pytest.raises(RuntimeError, match=r"'fc2': in no graph after the first step"):
        step_of(model, run)
    schedule.at(3)
    step_of(model, run)  # dense again
    schedule.at(2)
    model.both = True
    step_of(model, run)
    assert backend.report.uncaptured == ()


def test_a_sparse_step_that_runs_dense_is_told() -> None:
    """Where Dynamo is told to make no more graphs, the call after a switch runs eagerly, and so dense."""
    model = TwoHeads()
    backend = backend_for(model, {"fc1": W24})
    schedule = sp.Schedule(backend, 1)
    run = torch.compile(model, backend=backend)
    step_of(model, run)
    schedule.step()
    with (
        torch.compiler.set_stance("eager_on_recompile"),
        pytest.warns(UserWarning, match=r"'fc1': in no graph after the first step"),
    ):
        step_of(model, run)


def test_resume() -> None:
    """The second half of a run, from what a checkpoint holds, is that of a run in one piece."""

    def start() -> tuple[nn.Module, sp.Schedule, Callable[[Tensor, int], Tensor]]:
        torch.manual_seed(0)
        model = Stack()
        backend = backend_for(model)
        run = torch.compile(model, backend=backend)
        return model, sp.Schedule(backend, 1, 5), lambda x, _: run(x)

    whole, schedule, forward = start()
    wanted, _ = train(whole, forward, range(7), after=schedule.step)
    model, schedule, forward = start()
    _, optimizer = train(model, forward, range(3), after=schedule.step)
    checkpoint = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    assert checkpoint[2] == {"step": 3}
    model, schedule, forward = start()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for one, state in zip((model, optimizer, schedule), checkpoint, strict=True):
        one.load_state_dict(state)
    losses, _ = train(model, forward, range(3, 7), optimizer=optimizer, after=schedule.step)
    torch.testing.assert_close(losses, wanted[3:])
    assert schedule.count == 7


def test_copies_and_pickles() -> None:
    model = Stack()
    backend = backend_for(model)
    schedule = sp.Schedule(backend, 2, 4, patterns={"blocks.1.fc2": (0, None)})
    schedule.at(3)
    assert copy.deepcopy(schedule) is schedule
    for first, second in (pickle.loads(pickle.dumps(pair)) for pair in ((backend, schedule), (schedule, backend))):
        other = first if isinstance(first, sp.Schedule) else second
        assert (other.count, other.config) == (3, schedule.config)
        other.at(4)
        assert (other.config["blocks.*.fc1"], schedule.config["blocks.*.fc1"]) == (None, W24)
    loaded, own, x = *pickle.loads(pickle.dumps((backend, schedule))), torch.randn(4, 16)
    run = torch.compile(model, backend=loaded)
    for step in (3, 5):
        own.at(step)
        masked = {"blocks.1.fc2": "greedy"} | (dict.fromkeys(FC1, "optimal") if step == 3 else {})
        torch.testing.assert_close(run(x), straight_through(model, x, masked))


REFUSED = [
    pytest.param({"start": -1}, r"'0' is sparse from start=-1", id="negative"),
    pytest.param({"start": 0.5}, r"start=0\.5 .* whole numbers", id="no whole number"),
    pytest.param({"start": True}, r"start=True", id="bool"),
    pytest.param({"start": 5, "stop": 5}, r"start=5 to stop=5: .* stop above start", id="empty"),
    pytest.param({"start": None}, r"start=None", id="no start"),
    pytest.param({"patterns": {"1": (0, 1)}}, r"'1'.* no entry of the config with a scheme; it has '0'", id="no key"),
    pytest.param({"patterns": {"2": (0, 1)}}, r"'2'.* no entry of the config with a scheme", id="dense throughout"),
    pytest.param({"patterns": {"0": 5}}, r"'0' has 5: expected \(start, stop\)", id="no window"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_refused(arguments: dict[str, Any], message: str) -> None:
    backend = sp.sparse_backend({"0": W24, "2": None})
    with pytest.raises(ValueError, match=message):
        sp.Schedule(backend, **arguments)
    assert sp.Schedule(backend).config == {"0": W24, "2": None}  # it is as before


def test_refused_at_other_times() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    backend = sp.sparse_backend({"0": W24}, model=model, inner="aot_eager")
    schedule = sp.Schedule(backend)
    with pytest.raises(ValueError, match="has a schedule"):
        sp.Schedule(backend)
    with pytest.raises(ValueError, match=r"Schedule\.at\(-1\): expected a number of steps"):
        schedule.at(-1)
    late = sp.sparse_backend({"0": W24}, model=model, inner="aot_eager")
    torch.compile(model, backend=late)(torch.ones(4, 8))
    with pytest.raises(ValueError, match="before the first call"):
        sp.Schedule(late)
    with pytest.raises(ValueError, match="expected what sparse_backend"):
        sp.Schedule(model)


def test_warm_caches() -> None:
    """Graphs of two configs that are alike but for the config are two entries of Inductor's caches, and a new process
    reports from them what was compiled, though its schedule has moved on when the report is asked for."""
    torch.manual_seed(0)
    # Matmuls and our operators alone: they leave Inductor no C++ to compile.
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)).to(torch.bfloat16)
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    config = {"*": sp.WeightSparsity(backend="cusparselt")}
    pruned = copy.deepcopy(model)
    sp.prune_(pruned, config)

    def start() -> tuple[list[Tensor], sp.Report, int, int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        backend = sp.sparse_backend(config, model=model)
        schedule = sp.Schedule(backend, 1, 2)
        run, outputs = torch.compile(model, backend=backend), []
        for _ in range(3):
            out = run(x)
            out.sum().backward()  # a graph goes into the cache with its backward
            outputs.append(out.detach())
            schedule.step()
        counters = torch._dynamo.utils.counters["aot_autograd"]
        return outputs, backend.report, counters["autograd_cache_hit"], counters["autograd_cache_miss"]

    with fresh_cache(), inductor_config.patch(fx_graph_cache=True), functorch_config.patch(enable_autograd_cache=True):
        outputs, report, *counts = start()
        assert counts == [0, 2]
        warm, warm_report, *counts = start()
        assert counts == [2, 0]
    torch.testing.assert_close(outputs, [model(x), pruned(x), model(x)])
    torch.testing.assert_close(warm, outputs, rtol=0, atol=0)
    assert warm_report == report
    assert (report.graphs, [site.steps for site in report.sites]) == (2, ["steps 1"] * 2)
