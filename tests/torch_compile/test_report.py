"""The report: as a table, merged over graphs, from `explain`, in logs and in traces."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

import sparse_pass as sp
from sparse_pass import one_graph
from sparse_pass.report import merge

W24 = sp.WeightSparsity()

SPARSE_SITE = sp.Site(
    fqn="mlp.fc1",
    pattern="mlp.*",
    scheme=W24,
    shape=(4416, 4096, 1024),
    dtype=torch.bfloat16,
    status="sparse",
    output="cusparselt",
    grad_input="cusparselt",
    grad_weight="dense",
)
MASKED_SITE = sp.Site(
    fqn="proj",
    pattern="proj",
    scheme=sp.WeightSparsity(mask="greedy"),
    shape=("s0*128", 64, 64),
    dtype=torch.float32,
    status="masked_dense",
    reason="no 2:4 kernels on cpu",
    output="masked_dense",
    grad_weight="dense",
)
SKIPPED_SITE = sp.Site(
    fqn="head",
    pattern="*",
    scheme=W24,
    shape=(8, 10, 64),
    dtype=torch.float32,
    status="skipped",
    reason="the weight is [10, 64]",
    output="dense",
    grad_input="dense",
    grad_weight="dense",
)


def test_printed() -> None:
    report = sp.Report(
        sites=(SPARSE_SITE, MASKED_SITE, SKIPPED_SITE), unmatched=("haed",), notes=("names are hidden",), graphs=2
    )
    assert_expected_inline(
        str(report),
        """\
sparse_pass: 3 named linears in 2 graph(s): 1 masked_dense, 1 skipped, 1 sparse
fqn      scheme            M, N, K           status        output        grad_input  grad_weight  reason
mlp.fc1  w24               4416, 4096, 1024  sparse        cusparselt    cusparselt  dense
proj     w24(mask=greedy)  s0*128, 64, 64    masked_dense  masked_dense  -           dense        no 2:4 kernels on cpu
head     w24               8, 10, 64         skipped       dense         dense       dense        the weight is [10, 64]
unmatched: 'haed' named no linear
note: names are hidden""",
    )


def test_printed_without_sites() -> None:
    assert_expected_inline(
        str(sp.Report(unmatched=("fc3", "fc4"), graphs=1)),
        """\
sparse_pass: 0 named linears in 1 graph(s)
unmatched: 'fc3' named no linear
unmatched: 'fc4' named no linear""",
    )


def test_printed_of_a_model() -> None:
    assert_expected_inline(
        str(sp.explain(Mlp(), {"re:.*": W24, "head": None, "haed": W24})(batch())),
        """\
sparse_pass: 2 named linears in 1 graph(s): 2 masked_dense
fqn   scheme  M, N, K   status        output        grad_input    grad_weight  reason
up    w24     4, 16, 8  masked_dense  masked_dense  -             dense        no 2:4 kernels on cpu
down  w24     4, 8, 16  masked_dense  masked_dense  masked_dense  dense        no 2:4 kernels on cpu
unmatched: 'haed' named no linear
note: 'haed' names no linear that ran; closest names: 'head', 'head.weight'""",
    )


def test_records_are_frozen() -> None:
    for record in (SPARSE_SITE, sp.Report()):
        for field in fields(record):
            with pytest.raises(FrozenInstanceError):
                setattr(record, field.name, None)
    assert sp.Report(sites=(SPARSE_SITE,)) == sp.Report(sites=(replace(SPARSE_SITE),))


def test_fields_are_the_contract() -> None:
    """Outside tests and tables rely on these names."""
    assert {"fqn", "scheme", "shape", "status", "reason", "output", "grad_input", "grad_weight"} <= {
        field.name for field in fields(sp.Site)
    }
    assert {"sites", "unmatched"} <= {field.name for field in fields(sp.Report)}


def test_merge() -> None:
    """A pattern is unmatched if no graph has it; sites stay in order; a note is said once."""
    first = sp.Report(sites=(SPARSE_SITE,), unmatched=("b", "c"), notes=("n", "m"), graphs=1)
    second = sp.Report(sites=(MASKED_SITE, SKIPPED_SITE), unmatched=("a", "c"), notes=("m",), graphs=2)
    assert merge([first, second], ["a", "b", "c"]) == sp.Report(
        sites=(SPARSE_SITE, MASKED_SITE, SKIPPED_SITE), unmatched=("c",), notes=("n", "m"), graphs=3
    )


def test_merge_of_nothing() -> None:
    """Before anything was compiled no pattern has been found; a note says why."""
    report = sp.sparse_backend({"b": W24, "a": W24}).report
    assert (report.sites, report.unmatched, report.graphs) == ((), ("b", "a"), 0)
    assert report.notes[0].startswith("no graph was compiled yet")


# explain


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.drop(self.norm(self.up(x)))))


def batch(rows: int = 4) -> Tensor:
    return torch.randn(rows, 8)


CONFIG = {"up": W24, "d*": sp.WeightSparsity(mask="greedy"), "*": W24}


@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_explain_says_what_the_backend_does(inner: str) -> None:
    model = Mlp()
    explained = sp.explain(model, CONFIG)(batch())
    backend = sp.sparse_backend(CONFIG, model=model, inner=inner)
    torch.compile(model, backend=backend)(batch()).sum().backward()
    assert explained == backend.report
    assert {site.fqn: site.status for site in explained.sites} == {
        "up": "masked_dense",
        "down": "masked_dense",
        "head": "skipped",
    }


def test_explain_leaves_no_trace() -> None:
    model = Mlp()
    model(batch()).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    random = torch.get_rng_state()
    x = batch().requires_grad_()
    random = torch.get_rng_state()
    sp.explain(model, CONFIG)(x)
    assert torch.equal(torch.get_rng_state(), random)
    assert x.grad is None
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


def test_explain_without_gradients() -> None:
    with torch.no_grad():
        report = sp.explain(Mlp(), CONFIG)(batch())
    assert len(report.sites) == 3
    assert {(site.grad_input, site.grad_weight) for site in report.sites} == {(None, None)}
    assert None not in {site.output for site in report.sites}


def test_explain_frozen_weight() -> None:
    model = Mlp()
    model.down.weight.requires_grad_(False)
    (site,) = sp.explain(model, {"down": W24})(batch()).sites
    assert (site.output, site.grad_input, site.grad_weight) == ("masked_dense", "masked_dense", None)


def test_explain_misspelt_name(recwarn: pytest.WarningsRecorder) -> None:
    """No error and no warning: the report itself is what was asked for."""
    report = sp.explain(Mlp(), {"upp": W24, "down": W24, "zzz": W24})(batch())
    assert report.unmatched == ("upp", "zzz")
    assert [site.fqn for site in report.sites] == ["down"]
    near, far = report.notes
    assert near.startswith("'upp' names no linear that ran; closest names: 'up'")
    assert far == "'zzz' names no linear that ran; closest names: none"
    assert [str(w.message) for w in recwarn if "sparse_pass" in str(w.message)] == []


def test_explain_layer_that_does_not_run() -> None:
    class Half(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.up(x)

    report = sp.explain(Half(), {"up": W24, "down": W24})(batch())
    assert report.unmatched == ("down",)
    assert report.uncaptured == ("down",)
    assert report.notes == ()  # the name is right
    assert "uncaptured: 'down' is in no graph so far: it was not called, or Dynamo runs it eagerly" in str(report)


def test_explain_exact_name_of_a_bad_shape() -> None:
    with pytest.raises(ValueError, match=r"'head' \(named exactly\): the weight is \[10, 8\]"):
        sp.explain(Mlp(), {"head": W24})(batch())


def test_explain_again_and_again() -> None:
    """Dynamo's recompile limit is counted by code object, and falls back to eager in silence."""
    limit, model = torch._dynamo.config.recompile_limit, Mlp()
    for _ in range(limit + 2):
        assert [site.fqn for site in sp.explain(model, {"up": W24})(batch()).sites] == ["up"]


def test_explain_another_batch_size() -> None:
    """One call's sizes are no reason to make the next one's dynamic."""
    for rows in (4, 6):
        assert [site.shape for site in sp.explain(Mlp(), {"up": W24})(batch(rows)).sites] == [(rows, 16, 8)]


def test_explain_called_twice() -> None:
    """Each call reports its own graphs."""
    explain = sp.explain(Mlp(), {"up": W24})
    assert explain(batch()) == explain(batch())


def test_explain_graph_break_and_kwargs() -> None:
    class Broken(Mlp):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            x = self.up(x) * scale
            torch._dynamo.graph_break()
            return self.down(x)

    report = sp.explain(Broken(), {"up": W24, "down": W24})(batch(), scale=2.0)
    assert [site.fqn for site in report.sites] == ["up", "down"]
    assert (report.graphs, report.unmatched, report.notes) == (2, (), ())


def compiled_whole(model: nn.Module) -> nn.Module:
    compiled = torch.compile(model, backend="eager")
    compiled(batch())
    return compiled


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    model(batch())
    return model


def compiled_by_parts(model: nn.Module) -> nn.Module:
    for child in model.children():
        child.compile(backend="eager")
    model(batch())
    return model


def compiled_with_the_pass(model: nn.Module) -> nn.Module:
    model.compile(backend=sp.sparse_backend({"up": W24}, model=model, inner="aot_eager"))
    model(batch())
    return model


@pytest.mark.parametrize("compiled", [compiled_whole, compiled_in_place, compiled_by_parts, compiled_with_the_pass])
def test_explain_compiled_model(compiled: Callable[[nn.Module], nn.Module]) -> None:
    expected = sp.explain(Mlp(), CONFIG)(batch())
    model = compiled(Mlp())
    implementations = [module._compiled_call_impl for module in model.modules()]
    report = sp.explain(model, CONFIG)(batch())
    assert report.sites == expected.sites
    assert [module._compiled_call_impl for module in model.modules()] == implementations


# Logs and traces


def test_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sparse_pass"):
        torch.compile(Mlp(), backend=sp.sparse_backend(CONFIG, inner="aot_eager"))(batch())
    lines = [(r.levelname, r.getMessage()) for r in caplog.records if r.name.startswith("sparse_pass")]
    assert [line for line in lines if line[0] != "DEBUG"] == [
        ("INFO", "up: masked_dense (no 2:4 kernels on cpu)"),
        ("INFO", "down: masked_dense (no 2:4 kernels on cpu)"),
        (
            "WARNING",
            "head: skipped (the weight is [10, 8]: 2:4 masks need both dims to be multiples of 4;"
            " pad the layer or leave it dense (map it to None))",
        ),
    ]


def test_trace_artifact(monkeypatch: pytest.MonkeyPatch) -> None:
    """One artifact a graph for TORCH_TRACE and tlparse: the printed report."""
    artifacts: list[tuple[str, dict[str, Any], str]] = []

    def recording(kind: str, metadata_fn: Callable[[], Any], payload_fn: Callable[[], str], **rest: Any) -> None:
        artifacts.append((kind, metadata_fn(), payload_fn()))

    monkeypatch.setattr(one_graph, "trace_structured", recording)
    backend = sp.sparse_backend(CONFIG, inner="aot_eager")
    torch.compile(Mlp(), backend=backend)(batch())
    assert artifacts == [
        ("artifact", {"name": "sparse_pass_report", "encoding": "string"}, str(backend.report)),
    ]
