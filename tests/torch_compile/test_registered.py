"""The backend that torch knows by name, and `inductor_options` with a model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import fresh_compile
from torch import Tensor, nn
from torch._dynamo.backends import registry
from torch._dynamo.exc import BackendCompilerFailed

import sparse_pass as sp
from sparse_pass import registered

ROOT = Path(__file__).parent.parent.parent
W24 = sp.WeightSparsity()


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> Iterator[registered.RegisteredBackend]:
    """A backend of its own under the name, as the entry point would register it."""
    one = registered.RegisteredBackend()
    registry.list_backends()  # what torch finds itself comes first
    monkeypatch.setitem(registry._BACKENDS, "sparse_pass", None)
    monkeypatch.setitem(registry._COMPILER_FNS, "sparse_pass", one)
    monkeypatch.setattr(one, "_tags", (), raising=False)
    with fresh_compile():
        yield one


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(fc1=nn.Linear(16, 32), act=nn.GELU(), fc2=nn.Linear(32, 16)))


def masked(model: nn.Module, x: Tensor, names: set[str]) -> Tensor:
    """The output with masks of these layers, by hand."""
    dense = {name: model.get_submodule(name).get_parameter("weight") for name in names}
    weights = {f"{name}.weight": torch.where(sp.mask24(one), one, 0) for name, one in dense.items()}
    return torch.func.functional_call(model, weights, (x,))  # type: ignore[no-any-return]


def run(compiled: Any, x: Tensor) -> Tensor:
    y: Tensor = compiled(x)
    y.sum().backward()
    return y


def test_options(by_name: registered.RegisteredBackend) -> None:
    """A config in options, of schemes or as plain data; several models, each with a report of its own in the whole."""
    assert "sparse_pass" in torch.compiler.list_backends()
    x, first, second = torch.randn(8, 16), mlp(), mlp()
    options = {"config": {"fc1": W24}, "inner": "aot_eager"}
    y = run(torch.compile(first, backend="sparse_pass", options=options), x)
    torch.testing.assert_close(y, masked(first, x, {"fc1"}))
    options = {"config": {"fc*": {"WeightSparsity": {"mask": "greedy"}}}, "inner": "aot_eager", "strict": True}
    run(torch.compile(second, backend="sparse_pass", options=options), x)
    rows = [(site.fqn, site.scheme) for site in by_name.report.sites]
    greedy = sp.WeightSparsity(mask="greedy")
    assert rows == [("fc1", W24), ("fc1", greedy), ("fc2", greedy)]
    assert (by_name.report.graphs, by_name.report.unmatched) == (2, ())


def test_inductor_gets_the_rest(by_name: registered.RegisteredBackend) -> None:
    x, model = torch.randn(8, 16), mlp()
    options = {"config": {"fc1": W24}, "max_fusion_size": 8}
    y = run(torch.compile(model, backend="sparse_pass", options=options), x)
    torch.testing.assert_close(y, masked(model, x, {"fc1"}))
    with pytest.raises(BackendCompilerFailed, match="'max_fusion' is neither an argument"):
        torch.compile(mlp(), backend="sparse_pass", options={"config": {"fc1": W24}, "max_fusion": 8})(x)
    with pytest.raises(BackendCompilerFailed, match="leave the option 'model' out"):
        torch.compile(mlp(), backend="sparse_pass", options={"config": {"fc1": W24}, "model": model})(x)


class Broken(nn.Module):
    """A graph break inside a part, whose second half has a frame that holds the part alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        torch._dynamo.graph_break()
        return self.down(x)


@pytest.mark.parametrize("parts", [False, True])
def test_environment_and_parts(
    by_name: registered.RegisteredBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, parts: bool
) -> None:
    """As a trainer's flag: the config in a file that a variable names, and names of the whole model.

    Its parts are compiled by themselves: after graph breaks in a loop, or as they are asked to.
    """
    path = tmp_path / "config.json"
    path.write_text(json.dumps(sp.config_to_dict({"blocks.0.down": W24, "blocks.1.up": W24})))
    monkeypatch.setenv("SPARSE_PASS_CONFIG", str(path))
    x, model = torch.randn(8, 16), Broken()
    for block in model.blocks if parts else ():
        block.compile(backend="sparse_pass")
    y = run(model if parts else torch.compile(model, backend="sparse_pass"), x)
    torch.testing.assert_close(y, masked(model, x, {"blocks.0.down", "blocks.1.up"}))
    assert {site.fqn for site in by_name.report.sites} == {"blocks.0.down", "blocks.1.up"}
    assert by_name.report.uncaptured == by_name.report.unmatched == ()
    by_name.reset()


def test_no_config(by_name: registered.RegisteredBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSE_PASS_CONFIG", raising=False)
    assert "no graph was compiled by" in str(by_name.report)
    with pytest.raises(BackendCompilerFailed, match="set the environment variable SPARSE_PASS_CONFIG"):
        torch.compile(mlp(), backend="sparse_pass")(torch.randn(8, 16))


def test_a_misspelt_name(by_name: registered.RegisteredBackend) -> None:
    with pytest.warns(UserWarning, match="'fc3' named no linear"):
        run(
            torch.compile(mlp(), backend="sparse_pass", options={"config": {"fc3": W24}, "inner": "aot_eager"}),
            torch.randn(8, 16),
        )
    assert by_name.report.unmatched == ("fc3",)


def test_the_entry_point(tmp_path: Path) -> None:
    """That of pyproject.toml, where torch looks for it: the name is listed, and is the object of the module."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    line = next(one for one in lines if one.startswith('sparse_pass = "sparse_pass.registered'))
    info = tmp_path / "made_up-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[torch_dynamo_backends]\n" + line.replace('"', "") + "\n")
    program = (
        "import torch, sys; assert 'sparse_pass' in torch.compiler.list_backends()\n"
        "assert 'sparse_pass' not in sys.modules\n"
        "found = torch._dynamo.lookup_backend('sparse_pass')\n"
        "from sparse_pass import registered; assert found is registered.backend; print(found.report)\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert "no graph was compiled by" in done.stdout, done.stderr


def test_inductor_options_with_a_model() -> None:
    """Names are checked at once, and absolute where the parts are compiled one by one."""
    x, model = torch.randn(8, 16), Broken()
    with pytest.raises(ValueError, match=r"'blocks\.0\.dwn' names no linear weight"):
        sp.inductor_options({"blocks.0.dwn": W24}, model=model)
    options = sp.inductor_options({"blocks.1.*": W24}, {"max_fusion_size": 8}, model=model)
    for block in model.blocks:
        block.compile(options=options)
    with fresh_compile():
        y = run(model, x)
    torch.testing.assert_close(y, masked(model, x, {"blocks.1.up", "blocks.1.down"}))
    report = options["joint_custom_pre_pass"].report
    assert {site.fqn for site in report.sites} == {"blocks.1.up", "blocks.1.down"}
