"""Compiled code calls the kernels themselves; where they need more than a call, the ops. On a CPU: the reference."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from fake_cusparselt import FakeCusparselt
from fake_gpu import install_kernels
from support import errors, fresh_compile, run, ste_reference, twins
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch._inductor.virtualized import V

import sparse_pass as sp
from sparse_pass.kernels import backends
from sparse_pass.ops import lowering

KERNELS = sp.WeightSparsity(backend="cusparselt")
MVUE = replace(KERNELS, grad_weight="mvue")
ACT = sp.ActivationSparsity(backend="cusparselt")
BFLOAT16 = 2e-2


class Mlp(nn.Module):
    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 128, bias=False)
        self.down = nn.Linear(128, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.sin(self.up(x)))


class Gated(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        return self.down(torch.nn.functional.silu(h) * h.flip(-1))


BOTH = {"up": KERNELS, "down": KERNELS}
DIRECT = {"sparsify": 2, "linear_into": 4}
Calls = tuple[dict[str, int], dict[str, int]]


def calls(
    model: nn.Module,
    x: torch.Tensor,
    config: Mapping[str, Any] = BOTH,
    tolerance: float = BFLOAT16,
    called: str = r"sparse_pass\.ops\.reference\.compiled\.(\w+)\(",
    **how: Any,
) -> Calls:
    """Train one step right. What forward and backward code call directly, and what by the op, with how often.

    called: matches direct calls.
    """
    parameters = dict(model.named_parameters())
    # The random numbers of eager torch.
    with fresh_compile(), torch._inductor.config.patch(fallback_random=True):
        torch.manual_seed(1)
        compiled = torch.compile(model, backend=sp.sparse_backend(config), **how)
        actual, code = run_and_get_code(lambda: run(compiled, parameters, [x]))
    if config is BOTH:
        reference = ste_reference(model, config)
        expected = run(reference, twins(model, reference), [x])
    else:
        dense = {name: replace(scheme, backend="masked_dense") for name, scheme in config.items()}
        torch.manual_seed(1)
        expected = run(torch.compile(model, backend=sp.sparse_backend(dense, inner="aot_eager")), parameters, [x])
    found = errors(actual, expected)
    assert max(found.values()) < tolerance, found
    text = "\n".join(code)
    by_op = r"ops\.sparse_pass\.(\w+)\.default\("
    return dict(Counter(re.findall(called, text))), dict(Counter(re.findall(by_op, text)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Mlp().bfloat16()


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.loops
@pytest.mark.parametrize("shape", [(16, 64), (2, 8, 64)], ids=str)
def test_direct_calls(model: nn.Module, shape: tuple[int, ...]) -> None:
    assert calls(model, leaf(*shape)) == (DIRECT, {})


@pytest.mark.parametrize("loops", [False, pytest.param(True, marks=pytest.mark.loops)], ids=["ATen", "loops"])
def test_inductor_writes_loops_where_a_test_asks_for_them(model: nn.Module, loops: bool) -> None:
    """The tests themselves: without loops the kernels are called as directly, and ATen for all around them."""
    with fresh_compile(), torch.no_grad():
        compiled = torch.compile(model, backend=sp.sparse_backend(BOTH))
        _, (code,) = run_and_get_code(lambda: compiled(torch.randn(16, 64, dtype=torch.bfloat16)))
    assert code.count("linear_into(") == 2
    loops |= "SPARSE_PASS_LOOPS" in os.environ
    assert ("ops.aten.sin.default(" in code, "cpp_pybinding(" in code) == (not loops, loops)


def test_rows_that_must_be_padded(model: nn.Module) -> None:
    assert calls(model, leaf(12, 64)) == (DIRECT, {})
    assert calls(model, leaf(1, 64)) == (DIRECT, {})


class Heads(nn.Module):
    """Three linears of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 128) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) * self.k(x) + self.v(x)


@pytest.mark.loops
def test_rows_are_padded_once_for_all_readers() -> None:
    model = Heads().bfloat16()
    config = dict.fromkeys("qkv", KERNELS)
    with fresh_compile(), torch.no_grad():
        compiled = torch.compile(model, backend=sp.sparse_backend(config))
        _, (code,) = run_and_get_code(lambda: compiled(torch.randn(13, 64, dtype=torch.bfloat16)))
    assert code.count("linear_into(") == 3
    assert code.count("empty_strided_cpu((16, 64)") == 1


def test_rows_of_unknown_number_go_through_the_op(model: nn.Module) -> None:
    assert calls(model, leaf(16, 64), dynamic=True) == ({"sparsify": 2}, {"linear": 4})


def test_rows_known_to_be_a_multiple(model: nn.Module) -> None:
    """A dynamic batch of sequences of 8: M = 8 * s0."""
    x = leaf(3, 8, 64)
    torch._dynamo.mark_dynamic(x, 0)
    assert calls(model, x) == (DIRECT, {})


@pytest.mark.loops
def test_operands_in_any_strides(model: nn.Module) -> None:
    """The kernels want their rows contiguous; a transposed weight is read as it lies."""
    model.up.weight = nn.Parameter(model.up.weight.detach().t().contiguous().t())
    assert calls(model, leaf(16, 128).detach()[:, ::2].requires_grad_()) == (DIRECT, {})


INPUT_AND_GRADIENT = {"up": ACT, "down": MVUE}
INPUT_CALLS = {"sparsify_input": 1, "input_linear_into": 1, "input_grad_weight_into": 1}
GRADIENT_CALLS = {"sparsify": 1, "linear_into": 2, "grad_weight_into": 1}


@pytest.mark.loops
def test_direct_calls_for_inputs_and_gradients(model: nn.Module) -> None:
    found = calls(model, leaf(2, 32, 64), INPUT_AND_GRADIENT)
    assert found == ({**INPUT_CALLS, **GRADIENT_CALLS, "sparsify_mvue_sum": 1}, {})
    model.down.bias = None  # whose gradient is the sum
    assert calls(model, leaf(2, 32, 64), {"down": MVUE}) == ({**GRADIENT_CALLS, "sparsify_mvue": 1}, {})


def test_direct_calls_for_a_fused_gate() -> None:
    """The kernel rounds once, eager torch the SiLU and the product: masks of near ties differ."""
    model = Gated().bfloat16()
    assert calls(model, leaf(64, 64), {"down": ACT}, tolerance=8e-2) == (INPUT_CALLS, {})


@pytest.mark.parametrize("rows", [72, 5])
def test_rows_of_inputs_and_gradients_that_are_padded(model: nn.Module, rows: int) -> None:
    found = calls(model, leaf(rows, 64), INPUT_AND_GRADIENT)
    assert found == ({**INPUT_CALLS, **GRADIENT_CALLS, "sparsify_mvue_sum": 1}, {})


@pytest.mark.parametrize("rows", [64, 5])
def test_direct_calls_for_gradients_alone(model: nn.Module, rows: int) -> None:
    """The weight is read as it lies; up has no bias, whose gradient would be summed on the way."""
    gradients = sp.GradientSparsity(grad_input="mvue", backend="cusparselt")
    direct = {"sparsify_mvue": 1, "sparsify_mvue_sum": 1, "grad_weight_into": 1, "grad_input_into": 1}
    assert calls(model, leaf(rows, 64), {"down": gradients}) == (direct, {})


def test_rows_of_inputs_and_gradients_of_unknown_number(model: nn.Module) -> None:
    direct, by_op = calls(model, leaf(192, 64), INPUT_AND_GRADIENT, dynamic=True)
    assert direct == {"sparsify": 1}
    made, multiplied = ("sparsify_input", "sparsify_mvue_sum"), ("input_linear", "input_grad_weight", "grad_weight")
    assert by_op == {**dict.fromkeys((*made, *multiplied), 1), "linear": 2}


def test_rows_of_inputs_and_gradients_known_to_be_a_multiple(model: nn.Module) -> None:
    x = leaf(3, 64, 64)
    torch._dynamo.mark_dynamic(x, 0)
    assert calls(model, x, INPUT_AND_GRADIENT)[1] == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the library itself is there")
@pytest.mark.parametrize(
    ("backend", "rows"),
    [(backends.SM90, 64), (backends.SM90, 72), (backends.SM80, 128), (backends.SM80, 72), (backends.LIBRARY, 72)],
    ids=lambda one: getattr(one, "name", one),
)
def test_compiled_code_multiplies_by_the_binding(
    library: FakeCusparselt, tuning_folder: Path, monkeypatch: pytest.MonkeyPatch, backend: backends.Backend, rows: int
) -> None:
    """As on a GPU, with a library and kernels that are faked: what the code calls takes what it is given."""
    made = install_kernels(monkeypatch)
    monkeypatch.setattr(lowering, "_REFERENCES", backend.compiled)
    library.layout = "sm80" if backend is backends.SM80 else "sm90"
    model = Mlp(128 if backend is backends.SM80 else 64).bfloat16()
    direct = rf"{backend.compiled}.(\w+)\(".replace(".", r"\.")
    found, by_op = calls(model, leaf(rows, model.up.in_features), INPUT_AND_GRADIENT, called=direct)
    assert by_op == {}
    assert found.keys() == {*INPUT_CALLS, *GRADIENT_CALLS, "sparsify_mvue_sum"}
    by_library = backend is backends.LIBRARY
    sums = "mvue24_sum" if by_library else "sparsify_mvue_sum"
    assert made == {"sparsify_input": 1, "sparsify": 1, sums: 1}
    assert library.calls["SpMMACompress2"] == (5 if by_library else 0)
    assert library.calls["Matmul"] == 5


def test_code_for_a_gpu() -> None:
    """Of SM90 it finds the kernels, of another layout the ops; a C++ wrapper calls nothing but ops."""
    graph = SimpleNamespace(cpp_wrapper=False)
    cuda, dtype = torch.device("cuda", 0), torch.bfloat16
    with V.set_graph_handler(graph), mock.patch.object(lowering.cuda, "backend_of") as backend_of:
        for backend in backends.BACKENDS:
            backend_of.return_value = backend
            found = lowering._kernel("linear_into", cuda, dtype)
            assert found == (backend.compiled and f"{backend.compiled}.linear_into")
        assert {one.name for one in backends.BACKENDS if one.compiled} == {"sm90", "sm80", "library"}
        assert lowering._kernel("linear_into", torch.device("xpu"), dtype) is None
        assert lowering._kernel("linear_into", torch.device("cpu"), dtype) == f"{lowering._REFERENCES}.linear_into"
        graph.cpp_wrapper = True
        assert lowering._kernel("linear_into", torch.device("cpu"), dtype) is None


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 64, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.w.bfloat16())


def test_one_operand_where_nothing_is_trained(model: nn.Module) -> None:
    x = torch.randn(16, 64, dtype=torch.bfloat16)
    assert calls(model.requires_grad_(False), x) == ({"sparsify_one": 2, "linear_into": 2}, {})


def test_weights_of_float64_are_packed_by_the_op() -> None:
    """No kernel takes them."""
    model = Mixed()
    assert calls(model, leaf(16, 64), {"w": KERNELS}) == ({"linear_into": 2}, {"sparsify": 1})
    found = calls(model.requires_grad_(False), leaf(16, 64).detach(), {"w": KERNELS})
    assert found == ({"linear_into": 1}, {"sparsify_one": 1})
