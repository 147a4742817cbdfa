"""`GradientSparsity` in compiled models: exact against an eager reference that is given the same seeds."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from graph_printer import capture, device, printed
from networks import Up
from support import TOLERANCE, errors, fresh_compile, invariants_checked, mask_by_hand, relative_error, run
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import sparse_pass as sp
from sparse_pass.config import gradient_scheme, input_scheme
from sparse_pass.fqn import parse_config
from sparse_pass.graph.parameters import Names
from sparse_pass.graph_pass import _insist as insist
from sparse_pass.one_graph import rewrite_graph
from sparse_pass.ops.reference import gradients as reference_gradients
from sparse_pass.ops.reference import weights as packing
from sparse_pass.plan.limits import Limits

WEIGHT = sp.GradientSparsity()
INPUT = sp.GradientSparsity(grad_weight="dense", grad_input="mvue")
BOTH = sp.GradientSparsity(grad_input="mvue")
ACT = sp.ActivationSparsity()
SCHEMES = pytest.mark.parametrize("scheme", [WEIGHT, INPUT, BOTH], ids=str)
BF16 = torch.bfloat16


def kernels(scheme: Any) -> Any:
    """The same with the reference kernels."""
    parts = tuple(replace(part, backend="cusparselt") for part in (scheme if isinstance(scheme, tuple) else (scheme,)))
    return parts if isinstance(scheme, tuple) else parts[0]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_compile():
        yield


# The reference

Drawn = list[tuple[Tensor, Tensor]]
"""What was estimated, with its seed."""


@contextmanager
def recorded() -> Iterator[Drawn]:
    drawn: Drawn = []
    estimate = reference_gradients._estimate

    def record(grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        drawn.append((grad.clone(), seed.clone()))
        return estimate(grad, seed)

    with mock.patch.object(reference_gradients, "_estimate", record):
        yield drawn


def estimate_of(matrix: Tensor, drawn: Drawn) -> Tensor:
    """By the seed that was drawn for it, of what was seen then: a last bit that differs may draw another element."""
    rows, cols = matrix.shape
    for at, (seen, seed) in enumerate(drawn):
        if seen.shape[0] == rows and seen.shape[1] >= cols:  # columns of zeros up to whole tiles may follow
            same = seen[:, :cols]
            if relative_error(same, matrix) < TOLERANCE[matrix.dtype]:
                del drawn[at]
                return reference_gradients.mvue24(same, seed)
    raise AssertionError(f"nothing was drawn for {list(matrix.shape)}")


class Product(torch.autograd.Function):
    """x [M, K] times w^T by the table of docs/schemes.md."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, scheme: Any, drawn: Drawn) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.scheme, ctx.drawn, on_input = scheme, drawn, input_scheme(scheme)
        return (x if on_input is None else torch.where(mask_by_hand(x, on_input.mask), x, 0)) @ w.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, w) = grads, ctx.saved_tensors
        said, on_input = gradient_scheme(ctx.scheme), input_scheme(ctx.scheme)
        mask = None if on_input is None else mask_by_hand(x, on_input.mask)
        grad_input = (estimate_of(grad.T, ctx.drawn).T if said.grad_input == "mvue" else grad) @ w
        if on_input is not None and on_input.grad_input == "masked":
            grad_input = torch.where(mask, grad_input, 0)
        if said.grad_weight == "mvue":
            grad_weight = estimate_of(grad, ctx.drawn).T @ x
        else:
            grad_weight = grad.T @ (x if mask is None else torch.where(mask, x, 0))
        return grad_input, grad_weight, None, None


class Reference(nn.Module):
    """A linear, of weight [N, K] or as Conv1D has it, as the scheme says."""

    def __init__(self, linear: nn.Module, scheme: Any, drawn: Drawn) -> None:
        super().__init__()
        self.weight, self.bias, self.scheme, self.drawn = linear.weight, linear.bias, scheme, drawn
        self.turned = not isinstance(linear, nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        weight = self.weight.T if self.turned else self.weight
        y = Product.apply(x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype), self.scheme, self.drawn)
        return (y if self.bias is None else y + self.bias.to(dtype)).view(*x.shape[:-1], -1)


def reference_of(model: nn.Module, config: dict[str, Any], drawn: Drawn) -> nn.Module:
    reference = copy.deepcopy(model)
    for name, scheme in config.items():
        owner, _, leaf = name.rpartition(".")
        setattr(reference.get_submodule(owner), leaf, Reference(reference.get_submodule(name), scheme, drawn))
    return reference


def check(
    model: nn.Module,
    config: dict[str, Any],
    *batches: Tensor,
    inner: str = "aot_eager",
    dynamic: bool | str = False,
    context: Callable[[], Any] = nullcontext,
    dtype: torch.dtype = torch.float32,
) -> sp.Report:
    """Compile, train a step per batch, compare it all with the reference, and the reference with a dense model."""
    backend = sp.sparse_backend(config, model=model, inner=inner)
    with invariants_checked():
        compiled = torch.compile(model, backend=backend, dynamic=None if dynamic == "batch" else dynamic)
        for x in batches:
            parameters, mark = dict(model.named_parameters()), dynamic == "batch"
            with recorded() as drawn:
                actual = run(compiled, parameters, [x], context=context, mark_dynamic=mark)
            seeds = [int(seed) for _, seed in drawn]
            asked = [gradient_scheme(scheme) for scheme in config.values()]
            assert (
                len(set(seeds)) == len(seeds) == sum([one.grad_weight, one.grad_input].count("mvue") for one in asked)
            )
            reference = reference_of(model, config, drawn)
            expected = run(reference, dict(reference.named_parameters()), [x], context=context)
            assert not drawn, "the reference needed fewer"
            found = errors(actual, expected)
            assert max(found.values()) < TOLERANCE[dtype], found
            dense = errors(run(model, parameters, [x], context=context), expected)
            if not any(isinstance(scheme, tuple) for scheme in config.values()):
                assert dense["output 0"] < TOLERANCE[dtype], "the output is not the dense one"
            for name, one in zip(config, asked, strict=True):
                if one.grad_weight == "mvue":
                    assert dense[f"gradient of {name}.weight"] > 5 * TOLERANCE[dtype]
            if any(one.grad_input == "mvue" for one in asked):
                assert dense["gradient of input 0"] > 5 * TOLERANCE[dtype]
    return backend.report


class Mlp(nn.Module):
    def __init__(self, k: int = 16, hidden: int = 32, checkpointed: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(k, hidden), nn.Linear(hidden, k, bias=False)
        self.checkpointed = checkpointed

    def body(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x))).sin()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)


class Conv1D(nn.Module):
    """As transformers has it in GPT-2."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(k, n) / 4), nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def of_both(scheme: Any) -> dict[str, Any]:
    return {"up": scheme, "down": scheme}


@SCHEMES
@pytest.mark.parametrize("shape", [(24, 16), (2, 7, 16), (5, 16)], ids=str)
def test_mlp(scheme: Any, shape: tuple[int, ...]) -> None:
    report = check(Mlp(), of_both(scheme), leaf(*shape))
    expected = [{"mvue": "masked_dense"}.get(kind, kind) for kind in (scheme.grad_input, scheme.grad_weight)]
    for site in report.sites:
        assert (site.status, site.output, [site.grad_input, site.grad_weight]) == ("masked_dense", "dense", expected)
        assert "no 2:4 kernels on cpu" in site.reason


@SCHEMES
def test_kernels(scheme: Any) -> None:
    """Rows that are no multiple of anything, with activation checkpointing: the forward runs again, seeds do not."""
    model, x = Mlp(64, 128, checkpointed=True).bfloat16(), leaf(5, 7, 64, dtype=BF16)
    report = check(model, of_both(kernels(scheme)), x, x, dtype=BF16)
    expected = [{"mvue": "reference"}.get(kind, kind) for kind in (scheme.grad_input, scheme.grad_weight)]
    for site in report.sites:
        assert (site.status, site.output, [site.grad_input, site.grad_weight]) == ("sparse", "dense", expected)
        assert site.reason == ""


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_dynamic_batch_under_autocast(inner: str) -> None:
    report = check(
        Mlp(64, 128), of_both(kernels(BOTH)), leaf(6, 64), leaf(70, 64), inner=inner, dynamic="batch",
        context=lambda: torch.autocast("cpu", BF16), dtype=BF16,
    )  # fmt: skip
    assert {(site.grad_input, site.grad_weight) for site in report.sites} == {("reference", "reference")}


@pytest.mark.parametrize("scheme", [BOTH, kernels(BOTH)], ids=str)
def test_conv1d(scheme: Any) -> None:
    """The weight is stored [K, N]."""
    model = nn.Sequential(nn.Tanh(), Conv1D(64, 128), nn.Tanh(), Conv1D(128, 64)).bfloat16()
    check(model, {"1": scheme, "3": scheme}, leaf(2, 35, 64, dtype=BF16), dtype=BF16)


@pytest.mark.parametrize("gradients", [WEIGHT, INPUT, BOTH], ids=str)
@pytest.mark.parametrize("masked", ["dense", "masked"])
def test_with_2_4_inputs(gradients: Any, masked: Any) -> None:
    """output and grad_weight read S(X), but for a grad_weight of an estimate, which reads X."""
    act = sp.ActivationSparsity(grad_input=masked)
    for scheme, dtype in (((act, gradients), torch.float32), (kernels((gradients, act)), BF16)):
        torch._dynamo.reset()
        model, x = Mlp(64, 128).to(dtype), leaf(10, 64, dtype=dtype)
        report = check(model, of_both(scheme), x, dtype=dtype)
        kernel = "masked_dense" if dtype == torch.float32 else "reference"
        expected = (kernel, kernel if gradients.grad_input == "mvue" else "dense", kernel)
        assert {(site.output, site.grad_input, site.grad_weight) for site in report.sites} == {expected}


class By(nn.Module):
    def __init__(self, multiply: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.multiply, self.w = multiply, nn.Parameter(torch.randn(*shape) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x.cos(), self.w).sin()


class ThereAndBack(torch.autograd.Function):
    """A linear whose backward multiplies by the weight three times, once over K."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grads[0] @ w @ w.T @ w, grads[0].T @ x


class Anew(torch.autograd.Function):
    """A linear and a sine, whose backward computes the product once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return (x @ w.T).sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w = ctx.saved_tensors
        grad = grads[0] * (x @ w.T).cos()
        return grad @ w, grad.T @ x


WAYS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], str]] = {
    "x @ w": (lambda x, w: x @ w, (8, 12), (3, 11, 8), ""),
    "w @ x": (lambda x, w: w @ x, (12, 8), (8, 11), ""),
    "w.T @ x": (lambda x, w: w.T @ x, (8, 12), (8, 11), ""),
    "square": (lambda x, w: x @ w, (8, 8), (8, 8), ""),
    "slice": (lambda x, w: F.linear(x, w[:6]), (12, 8), (11, 8), ""),
    "cast": (lambda x, w: F.linear(x.double(), w.double()).float(), (12, 8), (11, 8), ""),
    "odd sizes": (lambda x, w: x @ w.T, (13, 7), (11, 7), ""),
    "output anew": (lambda x, w: Anew.apply(x, w), (12, 8), (11, 8), ""),
    "bmm": (lambda x, w: torch.bmm(x, w.T.expand(2, 8, 12)), (12, 8), (2, 11, 8), r"aten\.bmm\.default"),
    "mv": (lambda x, w: torch.mv(w, x), (12, 8), (8,), r"aten\.(mv\.default|mul\.Tensor)"),
    "there and back": (lambda x, w: ThereAndBack.apply(x, w), (8, 8), (11, 8), r"aten\.mm\.default"),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write_grad_input(way: str) -> None:
    """Where it is one matmul, in whatever orientation, it is estimated; else it stays dense, and strict refuses."""
    multiply, shape, size, target = WAYS[way]
    model, x = By(multiply, *shape), leaf(*size)
    backend = sp.sparse_backend({"w": INPUT}, model=model, inner="aot_eager")
    with invariants_checked(), recorded() as drawn:
        actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x])
    (site,) = backend.report.sites
    estimated = not target or way == "there and back"
    assert len(drawn) == (2 if way == "there and back" else estimated)
    changed = errors(actual, run(model, dict(model.named_parameters()), [x]))
    assert (changed.pop("gradient of input 0") > 0.1) == estimated
    assert max(changed.values()) < TOLERANCE[torch.float32]  # the output, and grad_weight
    if not target:
        assert site.reason == "grad_input: no 2:4 kernels on cpu"
        return
    reason = f"grad_input: the graph has it as {target}, not as one matmul of grad_output and weight; left dense"
    assert re.search(reason, site.reason)
    assert site.grad_input == ("masked_dense" if estimated else "dense")
    torch._dynamo.reset()
    strict = sp.sparse_backend({"w": INPUT}, model=model, inner="aot_eager", strict=True)
    with pytest.raises(Exception, match=f"'w': grad24.* changes grad_input, but {reason}"):
        torch.compile(model, backend=strict)(x)


@pytest.mark.parametrize("way", [way for way in WAYS if not WAYS[way][-1]])
def test_expected_grad_input_of_every_way(way: str) -> None:
    """The mean over many seeds is the dense gradient: what is kept is two of four along N, and not along M."""
    multiply, shape, size, _ = WAYS[way]
    model, x = By(multiply, *shape), leaf(*size)
    compiled = torch.compile(model, backend=sp.sparse_backend({"w": INPUT}, model=model, inner="aot_eager"))
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    with recorded() as drawn:
        draws = torch.stack([torch.autograd.grad(compiled(x).sum(), x)[0] for _ in range(60)])
    spread = draws.std(0)
    assert ((draws.mean(0) - expected).abs() <= 6 * spread / 60**0.5 + 1e-5).all()
    seen, _ = drawn[0]
    m = x.numel() // size[0] if way in ("w @ x", "w.T @ x") else x.numel() // size[-1]
    assert seen.shape == (multiply(x, model.w).numel() // m, m)


def test_tied_weight() -> None:
    """Each call has its own seeds."""
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16, bias=False))
    model[2].weight = model[0].weight
    backend = sp.sparse_backend({"*": BOTH}, model=model, inner="aot_eager")
    x = leaf(12, 16)
    with recorded() as drawn, invariants_checked():
        actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x])
    assert len({int(seed) for _, seed in drawn}) == 4
    reference = reference_of(model, {"0": BOTH, "2": BOTH}, drawn)
    found = errors(actual, run(reference, dict(reference.named_parameters()), [x]))
    assert max(found.values()) < TOLERANCE[torch.float32], found


def test_backward_that_may_belong_to_any_call() -> None:
    """With one scheme for all calls each GEMM is estimated; with two none is, and the reason says so."""
    model = By(lambda x, w: (x @ w).sin() @ w, 64, 64)
    for other in (INPUT, None):
        graph = capture(model, [leaf(8, 64)], {"w": None}).before.graph
        for node in graph.nodes:
            if node.meta.get("partitioner_tag") == "is_backward":
                node.meta.pop("seq_nr", None)
        names = Names(by_input={1: ("w",)})
        chosen = [parse_config({"w": scheme})[0] for scheme in (INPUT, other)]
        with mock.patch("sparse_pass.plan.decide.choose", side_effect=chosen):
            report = rewrite_graph(graph, parse_config({"w": INPUT}), names)
        last = report.sites[-1]
        assert last.grad_input == ("masked_dense" if other else None)
        assert printed(graph).count("mvue24(") == (2 if other else 0)
        assert ("may belong to any of its calls; left dense" in last.reason) == (other is None)


def test_linear_fused_with_its_loss() -> None:
    """Its gradient of the input is computed in the forward, with the gradient of the weight."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            y = x @ w.T
            ctx.save_for_backward(y.cos() @ w, y.cos().T @ x)
            return y.sin().sum()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            grad_x, grad_w = ctx.saved_tensors
            return grad_x * grads[0], grad_w * grads[0]

    model, x = By(lambda x, w: Fused.apply(x, w), 12, 8), leaf(11, 8)
    backend = sp.sparse_backend({"w": INPUT}, model=model, inner="aot_eager")
    with recorded() as drawn:
        actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x])
    ((seen, seed),) = drawn
    expected = run(model, dict(model.named_parameters()), [x])
    inner = reference_gradients.mvue24(seen, seed).T @ model.w
    cotangent = torch.randn((), generator=torch.Generator().manual_seed(0))
    outside = cotangent * model.multiply(x.cos(), model.w).cos()
    expected.gradients["input 0"] = -(inner * outside * x.sin()).detach()
    assert max(errors(actual, expected).values()) < TOLERANCE[torch.float32]


# Random numbers


def test_one_code_path_with_2_4_weights() -> None:
    """Of weights that are 2:4 already `WeightSparsity(grad_weight="mvue")` computes the same, bit by bit."""
    model, x = Mlp(64, 128).bfloat16(), leaf(70, 64, dtype=BF16)
    sp.prune_(model, {"*": sp.WeightSparsity()})
    found = []
    for scheme in (WEIGHT, sp.WeightSparsity(grad_weight="mvue")):
        torch._dynamo.reset()
        torch.manual_seed(3)
        backend = sp.sparse_backend({"*": kernels(scheme)}, model=model, inner="aot_eager")
        found.append(run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x]))
    difference = errors(*found)
    assert difference["gradient of down.weight"] == 0  # of up grad_output has passed other kernels
    assert max(difference.values()) < TOLERANCE[BF16]


def test_masked_dense_is_what_the_kernels_compute() -> None:
    model, x = Mlp(64, 128).bfloat16(), leaf(70, 64, dtype=BF16)
    found = []
    for backend in ("cusparselt", "masked_dense"):
        torch._dynamo.reset()
        scheme = replace(BOTH, backend=backend)
        call = torch.compile(model, backend=sp.sparse_backend({"down": scheme}, model=model, inner="aot_eager"))
        torch.manual_seed(5)
        found.append(run(call, dict(model.named_parameters()), [x]))
    assert max(errors(*found).values()) < TOLERANCE[BF16]


def test_expectation_is_the_dense_gradient() -> None:
    """Of all gradients, also of the layer below, which the noise of grad_input has passed; over 300 steps."""
    model, x, draws = Mlp(), leaf(10, 16), 300
    tensors = [x, model.up.weight, model.up.bias, model.down.weight]
    exact = torch.autograd.grad(model(x).sum(), tensors)
    call = torch.compile(model, backend=sp.sparse_backend({"*": BOTH}, model=model, inner="aot_eager"))
    steps = [torch.autograd.grad(call(x).sum(), tensors) for _ in range(draws)]
    for drawn, expected in zip(map(torch.stack, zip(*steps, strict=True)), exact, strict=True):
        assert ((drawn.mean(0) - expected).abs() <= 5 * drawn.std(0) / draws**0.5 + 1e-6).all()
        assert relative_error(drawn.mean(0), expected) < 0.1
        assert relative_error(drawn[0], expected) > 0.2


def test_drawn_in_the_backward_and_reproduced_by_the_seed() -> None:
    model, x = Mlp(), torch.randn(24, 16)
    call = torch.compile(model, backend=sp.sparse_backend(of_both(BOTH), model=model, inner="aot_eager"))

    def step() -> Tensor:
        state = torch.get_rng_state()
        loss = call(x).sum()
        assert torch.equal(torch.get_rng_state(), state)
        loss.backward()
        gradient, model.up.weight.grad = model.up.weight.grad, None
        assert gradient is not None
        return gradient

    torch.manual_seed(1)
    first, second = step(), step()
    torch.manual_seed(1)
    assert torch.equal(step(), first)
    assert relative_error(second, first) > 0.1


# Graphs


@pytest.mark.parametrize(
    ("model", "dtype", "kernel", "reason"),
    [
        (Mlp(48, 64), BF16, "reference", ""),
        (Mlp(72, 64), BF16, "masked_dense", "N and K are 64 and 72: a 2:4 gradient needs multiples of 64 and 16"),
        (Mlp(64, 48), BF16, "masked_dense", "N and K are 48 and 64: a 2:4 gradient needs multiples of 64 and 16"),
        (Mlp(64, 64), torch.float32, "masked_dense", "float32 has no 2:4 kernels"),
    ],
)
def test_what_the_kernels_do_not_take(model: nn.Module, dtype: torch.dtype, kernel: str, reason: str) -> None:
    x = leaf(24, model.up.in_features, dtype=dtype)
    (site,) = capture(model.to(dtype), [x], {"up": kernels(BOTH)}).report.sites
    assert (site.output, site.grad_input, site.grad_weight) == ("dense", kernel, kernel)
    assert site.status == ("sparse" if kernel == "reference" else "masked_dense")
    assert site.reason.startswith(f"grad_input: {reason}" if reason else "")
    assert f"grad_weight: {reason}" in site.reason or not reason


@pytest.mark.parametrize(
    ("limits", "scheme", "reason"),
    [
        (Limits(device="cuda", capability=(9, 0)), INPUT, ""),
        (Limits(device="cuda", capability=(7, 5)), INPUT, "grad_input: SM75 has no sparse tensor cores"),
        (Limits(device="cuda", capability=(9, 0), unavailable="no library"), INPUT, "grad_input: no library"),
        (Limits(device="cpu"), INPUT, "grad_input: no 2:4 kernels on cpu"),
        (Limits(device="cpu"), replace(INPUT, backend="masked_dense"), "grad_input: backend='masked_dense' was asked"),
    ],
)
def test_reasons(limits: Limits, scheme: Any, reason: str) -> None:
    """What is computed does not depend on the device."""
    captured = capture(Up(bias=True).bfloat16(), [leaf(8, 64, dtype=BF16)], {"up": scheme}, limits=device(limits))
    captured.check_invariants()
    (site,) = captured.report.sites
    assert (site.output, site.grad_input) == ("dense", "masked_dense" if reason else "cusparselt")
    assert site.reason.startswith(reason)
    assert ("sparse_pass.mvue24(" in captured.text) == bool(reason)


def test_weight_of_dynamic_sizes() -> None:
    """Sizes are not looked at: the kernels want to know them, the dense estimate does not."""

    def multiply(x: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(x) @ w.T

    w, x = leaf(64, 64, dtype=BF16), leaf(8, 64, dtype=BF16)
    graph = capture(multiply, [x, w], {"w": None}, dynamic=True).before.graph
    (site,) = rewrite_graph(graph, parse_config({"w": kernels(BOTH)}), Names(by_input=_inputs_named(graph, "w"))).sites
    assert (site.status, site.grad_input, site.grad_weight) == ("masked_dense", "masked_dense", "masked_dense")
    assert "a 2:4 gradient needs multiples of 64 and 16" in site.reason


def _inputs_named(graph: torch.fx.Graph, name: str) -> dict[int, tuple[str, ...]]:
    """The last matrix among the inputs is the weight."""
    tensors = [
        index
        for index, node in enumerate(n for n in graph.nodes if n.op == "placeholder" and "tangent" not in str(n.target))
        if isinstance(node.meta.get("val"), Tensor)
    ]
    return {tensors[-1]: (name,)}


# Configs, reports and what else knows schemes


def test_values() -> None:
    assert [str(one) for one in (WEIGHT, BOTH)] == ["grad24", "grad24(grad_input=mvue)"]
    with pytest.raises(ValueError, match=r"GradientSparsity\(grad_input='masked'\): expected one of 'dense', 'mvue'"):
        sp.GradientSparsity(grad_input="masked")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"GradientSparsity\(backend='cuda'\): expected one of"):
        sp.GradientSparsity(backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"grad_input='dense'\): one of them must be 'mvue'; .* map it to None"):
        sp.GradientSparsity(grad_weight="dense")


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ((sp.WeightSparsity(), WEIGHT), r"write WeightSparsity\(grad_weight='mvue'\) instead of the two"),
        ((INPUT, sp.WeightSparsity()), "the 2:4 operand of grad_input is the weight"),
        ((sp.WeightSparsity(), ACT, WEIGHT), "cannot be together"),
        ((WEIGHT, INPUT), "or a tuple of an ActivationSparsity and one of the others"),
        ((WEIGHT,), "or a tuple of an ActivationSparsity and one of the others"),
        ((ACT, WEIGHT, WEIGHT), "or a tuple of an ActivationSparsity and one of the others"),
        (sp.GradientSparsity, r"instantiate it: GradientSparsity\(\)"),
    ],
)
def test_combinations_that_are_refused(scheme: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"config\['fc'\] = .*{message}"):
        sp.SparsePass({"fc": scheme})


def test_names_need_no_multiples_of_four() -> None:
    """There is no mask; in a tuple K is that of the mask of the input."""
    model = nn.Sequential(nn.Linear(13, 7))
    sp.sparse_backend({"0": BOTH}, model=model)
    with pytest.raises(ValueError, match="'0' cannot be sparsified"):
        sp.sparse_backend({"0": (ACT, BOTH)}, model=model)


def test_prune_leaves_the_weight_dense() -> None:
    model = Mlp()
    before = copy.deepcopy(model.state_dict())
    report = sp.prune_(model, {"up": BOTH, "down": (ACT, BOTH)})
    assert {site.fqn: (site.status, site.reason) for site in report.sites} == {
        "up": ("skipped", "the scheme is of gradients only: the weight stays dense"),
        "down": ("skipped", "the scheme is of the input and gradients only: the weight stays dense"),
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
def test_no_gradient_to_change(strict: bool) -> None:
    """A graph of inference, and a frozen weight: the layer computes what the scheme says, and nothing is drawn."""
    model = Mlp()
    model.up.weight.requires_grad_(False)
    backend = sp.sparse_backend({"up": WEIGHT, "down": BOTH}, model=model, inner="aot_eager", strict=strict)
    call = torch.compile(model, backend=backend)
    with recorded() as drawn:
        with torch.no_grad():
            call(torch.randn(4, 16))
        assert not drawn
        call(torch.randn(4, 16)).sum().backward()
    assert len(drawn) == 2
    reason = "the graph computes no gradient that the scheme changes"
    rows = {
        (site.fqn, site.training): (site.status, site.output, site.grad_weight, site.reason)
        for site in backend.report.sites
    }
    nothing = ("masked_dense", "dense", None, reason)
    assert rows["up", False] == rows["down", False] == rows["up", True] == nothing
    assert rows["down", True][:3] == ("masked_dense", "dense", "masked_dense")


def test_require_sparse() -> None:
    """Of a graph without the gradients of the scheme nothing is required."""
    graph = torch.fx.Graph()
    with FakeTensorMode():
        graph.placeholder("weight").meta["val"] = torch.empty(32, 16, device="cuda")
    graph.output(())

    def row(scheme: Any, **gemms: Any) -> sp.Report:
        site = sp.Site(
            fqn="fc", pattern="fc", scheme=scheme, shape=(8, 32, 16), dtype=BF16, reason="because",
            **{"status": "masked_dense", "output": "dense", **gemms},
        )  # fmt: skip
        return sp.Report(sites=(site,), graphs=1)

    insist(row(WEIGHT), graph)
    insist(row(WEIGHT, grad_input="dense"), graph)  # a frozen weight
    refused = [
        row(WEIGHT, grad_weight="dense"),
        row(INPUT, grad_input="masked_dense", grad_weight="dense"),
        row((ACT, WEIGHT), output="masked_dense"),
        row(WEIGHT, status="skipped"),
    ]
    for report in refused:
        with pytest.raises(ValueError, match="require='sparse': no 2:4 kernel for 'fc'"):
            insist(report, graph)


def test_explain() -> None:
    model, x = Mlp(), torch.randn(24, 16)
    state = torch.get_rng_state()
    report = sp.explain(model, {"*": BOTH, "none": WEIGHT})(x)
    assert torch.equal(torch.get_rng_state(), state)
    # Nothing wants a gradient of x.
    assert [(site.grad_input, site.grad_weight) for site in report.sites] == [
        (None, "masked_dense"),
        ("masked_dense", "masked_dense"),
    ]
    assert report.unmatched == ("none",)


def test_every_field_is_part_of_the_key_of_compile_caches() -> None:
    other = {"grad_weight": "dense", "grad_input": "dense", "backend": "masked_dense"}
    assert {*other, "precision"} == {field.name for field in fields(sp.GradientSparsity)}
    schemes = [BOTH, *(replace(BOTH, **{name: value}) for name, value in other.items()), (ACT, BOTH), (BOTH, ACT)]
    schemes.append(replace(BOTH, grad_input="dense", precision="float8"))
    assert len({sp.SparsePass({"fc": scheme}).uuid() for scheme in schemes}) == len(schemes)


# The operators


def test_operators() -> None:
    """Of a transpose, in any strides: what is packed is the dense estimate, and its product is that of a matmul."""
    sparse = torch.ops.sparse_pass
    seed = torch.tensor([2**40 + 7])
    for rows in (1, 13, 64, 70):
        grad, weight = torch.randn(rows, 128).half(), torch.randn(128, 24).half()
        packed, estimate = sparse.sparsify_mvue(grad.T, seed), sparse.mvue24(grad.T, seed)
        whole = rows + -rows % 64
        unpacked = packing.unpack(packed, whole, 128)
        assert torch.equal(unpacked[:rows], estimate.T)
        assert not unpacked[rows:].any()
        kept = estimate.reshape(32, 4, rows).count_nonzero(1)
        assert (kept == 2).all()
        for same in (weight, weight.T.contiguous().T):
            product = sparse.grad_input(packed, same, rows)
            assert product.is_contiguous()
            assert relative_error(product, estimate.T @ weight) < TOLERANCE[torch.float16]
        torch.library.opcheck(sparse.sparsify_mvue.default, (grad.T, seed))
        torch.library.opcheck(sparse.grad_input.default, (packed, weight, rows))
    empty = torch.zeros(0, 128).half()
    assert sparse.sparsify_mvue(empty.T, seed).numel() == 0
    assert sparse.grad_input(sparse.sparsify_mvue(empty.T, seed), weight, 0).shape == (0, 24)
    for arguments, parts in (
        ((packed, weight[:72], 70), ["weight [72, 24]", "rows=70", "sparsify_mvue"]),
        ((packed, weight, 128 + 1), ["rows=129"]),
        ((packed, weight.float(), 70), ["torch.float16", "torch.float32"]),
    ):
        with pytest.raises(ValueError, match="packed") as error:
            sparse.grad_input(*arguments)
        assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [192, 201], ids=["whole tiles", "padded"])
def test_on_a_gpu(rows: int) -> None:
    """By Inductor, as by dense matmuls: the forward is dense, so that both draw the same."""
    model = Mlp(256, 512).to("cuda", BF16)
    x, found = torch.randn(rows, 256, device="cuda", dtype=BF16, requires_grad=True), []
    for scheme in (BOTH, replace(BOTH, backend="masked_dense")):
        torch._dynamo.reset()
        backend = sp.sparse_backend({"down": scheme}, model=model, tune="off")
        torch.manual_seed(1)
        found.append(run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x]))
        (site,) = backend.report.sites
        kernel = "cusparselt" if scheme is BOTH else "masked_dense"
        assert (site.output, site.grad_input, site.grad_weight) == ("dense", kernel, kernel), str(backend.report)
    assert max(errors(*found).values()) < TOLERANCE[BF16]
