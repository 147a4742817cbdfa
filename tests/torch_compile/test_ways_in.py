"""The ways to hand the pass to torch.compile: same graph, and everything else that was configured keeps working."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from graph_printer import capture, printed
from support import TOLERANCE, errors, in_threads, run
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import sparse_pass as sp

# The op nodes leave Inductor no C++ to compile, so a test takes a second and not ten.
SPARSE = sp.WeightSparsity(backend="cusparselt")
CONFIG = {"0": SPARSE}
TAKES_LISTS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def model(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.Linear(width, 64)).to(torch.bfloat16)


def batch() -> Tensor:
    return torch.randn(8, 64, dtype=torch.bfloat16)


def train(compiled: Callable[[Tensor], Tensor], x: Tensor | None = None) -> None:
    compiled(batch() if x is None else x).float().sum().backward()


@contextmanager
def rewritten_graphs() -> Iterator[list[str]]:
    """The graphs that any SparsePass leaves behind, printed."""
    graphs: list[str] = []
    call = sp.SparsePass.__call__

    def recording(self: sp.SparsePass, graph: Graph) -> None:
        call(self, graph)
        graphs.append(printed(graph))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sp.SparsePass, "__call__", recording)
        yield graphs


class Recorder(CustomGraphPass):
    """A user's own pass: notes which graph it saw, and the Inductor config of that moment."""

    def __init__(self) -> None:
        self.graphs: list[str] = []
        self.configs: list[dict[str, Any]] = []

    def __call__(self, graph: Graph) -> None:
        self.graphs.append(printed(graph))
        self.configs.append(inductor_config.get_config_copy())

    def uuid(self) -> str:
        return "recorder"


# Same graph


def via_backend(module: nn.Module) -> sp.Report:
    backend = sp.sparse_backend(CONFIG)
    train(torch.compile(module, backend=backend))
    return backend.report


def via_backend_with_model(module: nn.Module) -> sp.Report:
    backend = sp.sparse_backend(CONFIG, model=module)
    train(torch.compile(module, backend=backend))
    return backend.report


def via_options(module: nn.Module) -> sp.Report:
    options = sp.inductor_options(CONFIG)
    train(torch.compile(module, options=options))
    return options["joint_custom_pre_pass"].report


def via_global_config(module: nn.Module) -> sp.Report:
    options = sp.inductor_options(CONFIG)
    with inductor_config.patch(options):
        train(torch.compile(module))
    return options["joint_custom_pre_pass"].report


def via_pass(module: nn.Module) -> sp.Report:
    sparse_pass = sp.SparsePass(CONFIG)
    train(torch.compile(module, options={"joint_custom_pre_pass": sparse_pass}))
    return sparse_pass.report


WAYS = {
    "backend": via_backend,
    "backend_model": via_backend_with_model,
    "options": via_options,
    "global_config": via_global_config,
    "pass": via_pass,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_same_graph_and_report(way: Callable[[nn.Module], sp.Report]) -> None:
    expected = capture(model(), [batch()], CONFIG)
    assert "sparse_pass.linear" in expected.text
    with rewritten_graphs() as graphs:
        report = way(model())
    assert graphs == [expected.text]
    assert report.sites == expected.report.sites
    assert (report.graphs, report.unmatched) == (1, ())


def test_pass_alone_does_not_see_parameter_names() -> None:
    sparse_pass = sp.SparsePass({"0": SPARSE, "1.weight": SPARSE})
    with pytest.warns(
        UserWarning, match=r"'1\.weight' named no linear .* parameter names are visible to sparse_backend"
    ):
        train(torch.compile(model(), options={"joint_custom_pre_pass": sparse_pass}))
    report = sparse_pass.report
    assert [site.fqn for site in report.sites] == ["0"]
    assert report.unmatched == ("1.weight",)
    (note,) = report.notes
    assert note.startswith("parameter names are not visible to a pass that sees the ATen graph only")


@pytest.mark.parametrize("way", ["backend", "options", "global_config"])
def test_parameter_names_are_seen_otherwise(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CONFIG", {"0.weight": SPARSE})
    report = WAYS[way](model())
    assert [site.pattern for site in report.sites] == ["0.weight"]
    assert report.notes == ()


def test_global_config_is_scoped() -> None:
    """Outside of the patch the model compiles dense again."""
    options = sp.inductor_options(CONFIG)
    with rewritten_graphs() as graphs:
        with inductor_config.patch(options):
            train(torch.compile(model()))
        torch._dynamo.reset()
        train(torch.compile(model()))
    assert len(graphs) == 1
    assert options["joint_custom_pre_pass"].report.graphs == 1


# Passes that were there before


def as_callable(recorder: Recorder) -> Any:
    return lambda graph: recorder(graph)


def as_custom_graph_pass(recorder: Recorder) -> Any:
    return recorder


def as_list(recorder: Recorder) -> Any:
    return [recorder]


FORMS = [
    pytest.param(as_callable, id="callable"),
    pytest.param(as_custom_graph_pass, id="CustomGraphPass"),
    pytest.param(
        as_list,
        id="list",
        marks=pytest.mark.skipif(not TAKES_LISTS, reason="lists of passes came with torch 2.13"),
    ),
]


def compile_with_user_options(user: Mapping[str, Any], module: nn.Module) -> Callable[..., Any]:
    return torch.compile(module, options=sp.inductor_options(CONFIG, user))


def compile_with_user_global(user: Mapping[str, Any], module: nn.Module) -> Callable[..., Any]:
    with inductor_config.patch(dict(user)):
        return torch.compile(module, options=sp.inductor_options(CONFIG))


def compile_with_backend_options(user: Mapping[str, Any], module: nn.Module) -> Callable[..., Any]:
    return torch.compile(module, backend=sp.sparse_backend(CONFIG, **user))


def compile_with_compile_options(user: Mapping[str, Any], module: nn.Module) -> Callable[..., Any]:
    return torch.compile(module, backend=sp.sparse_backend(CONFIG), options=dict(user))


@pytest.mark.parametrize(
    ("compiled", "form"),
    [
        pytest.param(compile_with_user_options, *form.values, id=f"inductor_options-{form.id}", marks=form.marks)
        for form in FORMS
    ]
    + [
        pytest.param(compile_with_user_global, as_custom_graph_pass, id="global_config"),
        pytest.param(compile_with_backend_options, as_callable, id="backend_options"),
        pytest.param(compile_with_compile_options, as_callable, id="compile_options"),
    ],
)
def test_user_passes_still_run(
    compiled: Callable[[Mapping[str, Any], nn.Module], Callable[..., Any]], form: Callable[[Recorder], Any]
) -> None:
    """Before ours: they see the graph as it was captured."""
    before = printed(capture(model(), [batch()], CONFIG).before.graph)
    joint, pre_grad = Recorder(), Recorder()
    user = {"joint_custom_pre_pass": form(joint), "pre_grad_custom_pass": as_callable(pre_grad)}
    given = dict(user)
    with rewritten_graphs() as graphs:
        train(compiled(user, model()))
    assert joint.graphs == [before]
    assert len(pre_grad.graphs) == 1
    assert len(graphs) == 1
    assert graphs != joint.graphs
    assert user == given


@pytest.mark.parametrize("form", FORMS)
def test_user_passes_of_the_global_config_still_run(form: Callable[[Recorder], Any]) -> None:
    joint = Recorder()
    with rewritten_graphs() as graphs, inductor_config.patch(joint_custom_pre_pass=form(joint)):
        train(torch.compile(model(), backend=sp.sparse_backend(CONFIG)))
    assert (len(joint.graphs), len(graphs)) == (1, 1)


def test_two_sparse_passes_share_the_work() -> None:
    """A second pass is chained to the first, and finds what the first left dense."""
    first = sp.inductor_options({"0": SPARSE})
    second = sp.inductor_options({"1": SPARSE}, first)
    train(torch.compile(model(), options=second))
    assert [site.fqn for site in first["joint_custom_pre_pass"].report.sites] == ["0"]
    assert [site.fqn for site in second["joint_custom_pre_pass"].report.sites] == ["1"]


# Modes and options of Inductor


def seen_config(recorder: Recorder) -> dict[str, Any]:
    (config,) = recorder.configs
    return config


def test_mode_reaches_inductor() -> None:
    user = Recorder()
    backend = sp.sparse_backend(CONFIG, joint_custom_pre_pass=user)
    train(torch.compile(model(), backend=backend, mode="reduce-overhead"))
    assert seen_config(user)["triton.cudagraphs"] is True
    assert backend.report.graphs == 1


def test_options_reach_inductor() -> None:
    user = Recorder()
    backend = sp.sparse_backend(CONFIG, joint_custom_pre_pass=user, max_fusion_size=3, realize_reads_threshold=5)
    train(torch.compile(model(), backend=backend, options={"max_fusion_size": 7}))
    config = seen_config(user)
    assert (config["max_fusion_size"], config["realize_reads_threshold"]) == (7, 5)
    assert inductor_config.max_fusion_size not in (3, 7)


def test_inductor_options_keep_options() -> None:
    user = Recorder()
    given = {"joint-custom-pre-pass": user, "max_fusion_size": 3}
    train(torch.compile(model(), options=sp.inductor_options(CONFIG, given)))
    assert seen_config(user)["max_fusion_size"] == 3
    assert given == {"joint-custom-pre-pass": user, "max_fusion_size": 3}


def test_unknown_mode() -> None:
    compiled = torch.compile(model(), backend=sp.sparse_backend(CONFIG), mode="fastest")
    with pytest.raises(BackendCompilerFailed, match="Unrecognized mode=fastest"):
        compiled(batch())


@pytest.mark.parametrize("options", [{"max_fusion_sise": 3}, {"max_fusion_size": "three"}])
def test_bad_option(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(RuntimeError, match=name):
        sp.sparse_backend(CONFIG, **options)
    with pytest.raises(BackendCompilerFailed, match=name):
        torch.compile(model(), backend=sp.sparse_backend(CONFIG), options=options)(batch())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner": "eager"}, "inner='eager': expected one of 'inductor', 'aot_eager'"),
        ({"inner": None}, "inner=None: expected one of"),
        ({"tune": "on"}, "tune='on': expected one of 'auto', 'off'"),
        ({"mode": "max-autotune"}, r"mode= is an argument of torch\.compile: torch\.compile\(model, backend="),
        ({"options": {"max_fusion_size": 3}}, r"options= is an argument of torch\.compile"),
        ({"model": "fc1"}, "model='fc1': expected an nn.Module"),
        ({"inner": "aot_eager", "max_fusion_size": 3}, "inner='aot_eager' takes no mode or Inductor options"),
    ],
)
def test_bad_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sp.sparse_backend(CONFIG, **arguments)


def test_aot_eager_takes_no_mode() -> None:
    compiled = torch.compile(model(), backend=sp.sparse_backend(CONFIG, inner="aot_eager"), mode="reduce-overhead")
    with pytest.raises(BackendCompilerFailed, match="takes no mode or Inductor options, got mode='reduce-overhead'"):
        compiled(batch())


# inner="aot_eager", threads


def test_aot_eager_computes_the_same() -> None:
    module = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    config = {"0": sp.WeightSparsity(), "2": sp.WeightSparsity(grad_weight="masked", decay=0.1)}
    x = torch.randn(6, 16, requires_grad=True)
    results = {}
    for inner in ("inductor", "aot_eager"):
        torch._dynamo.reset()
        backend = sp.sparse_backend(config, model=module, inner=inner)
        results[inner] = run(torch.compile(module, backend=backend), dict(module.named_parameters()), [x])
        assert len(backend.report.sites) == 2
    dense = run(module, dict(module.named_parameters()), [x])
    assert max(errors(results["aot_eager"], results["inductor"]).values()) < TOLERANCE[torch.float32]
    assert errors(results["aot_eager"], dense)["output 0"] > 0.01


@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
@pytest.mark.filterwarnings("ignore:sparse_pass")  # until the last thread is done, the names of one are unmatched
def test_threads_compile_at_once(inner: str) -> None:
    """One backend, a model for each thread: every site bears the names and shapes of its own model."""
    widths = (64, 128, 192, 256)
    modules = {width: nn.Sequential() for width in widths}
    for width, module in modules.items():
        module.add_module(f"w{width}", nn.Linear(64, width, bias=False))
        module.to(torch.bfloat16)
    config = {f"w{width}.weight": SPARSE for width in widths}
    backend = sp.sparse_backend(config, inner=inner)
    together = threading.Barrier(len(widths))
    failures: list[BaseException] = []

    def work(module: nn.Module) -> None:
        try:
            x = batch()
            compiled = torch.compile(module, backend=backend)
            together.wait()
            train(compiled, x)
        except BaseException as error:
            failures.append(error)

    in_threads(work, modules.values())
    assert failures == []
    sites = {site.fqn: site.shape for site in backend.report.sites}
    assert sites == {f"w{width}": (8, width, 64) for width in widths}
    assert backend.report.graphs == len(widths)
    assert backend.report.unmatched == ()


def test_rewrite_of_what_it_cannot_read() -> None:
    """Refused before anything is changed."""
    model, x = nn.Sequential(nn.Linear(8, 12)), torch.randn(4, 8)
    program, config = torch.export.export(model, (x,)), {"0": sp.WeightSparsity()}
    before = printed(program.graph)
    with pytest.raises(TypeError, match=r"got ExportedProgram; .* pass program\.graph_module or program\.module\(\)"):
        sp.rewrite(program, config)
    assert printed(program.graph) == before
    with pytest.raises(TypeError, match=r"takes a torch\.fx\.GraphModule, got Sequential$"):
        sp.rewrite(model, config)
    with pytest.raises(ValueError, match=r"the graph carries no fake tensors .*capture it with torch\.compile"):
        sp.rewrite(torch.fx.symbolic_trace(model), config)
