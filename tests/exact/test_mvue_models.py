"""`grad_weight="mvue"` in compiled models: exact against an eager reference that is given the same seeds."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from graph_printer import HOPPER, capture, device, printed
from networks import Apply, Conv1D, OwnLinear, Up
from support import TOLERANCE, decay_of, errors, fresh_compile, invariants_checked, relative_error, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_pass as sp
from sparse_pass.fqn import parse_config
from sparse_pass.one_graph import rewrite_graph
from sparse_pass.ops.reference import gradients as reference_gradients
from sparse_pass.plan.limits import Limits

MVUE = sp.WeightSparsity(grad_weight="mvue")
KERNELS = sp.WeightSparsity(grad_weight="mvue", backend="cusparselt")
INNERS = pytest.mark.parametrize("inner", ["aot_eager", "inductor"])

Drawn = dict[tuple[int, int], list[tuple[Tensor, Tensor]]]
"""What grad_output was given to the operators and with which seed, in the order of the backward, by its shape."""


# The reference


class Product(torch.autograd.Function):
    """input [M, K] times kept.T, where the gradient of weight is that of a 2:4 grad_output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept: Tensor, drawn: Drawn) -> Tensor:
        ctx.save_for_backward(x, kept)
        ctx.drawn = drawn
        return x @ kept.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kept = ctx.saved_tensors
        seen, seed = ctx.drawn[tuple(grad.shape)].pop(0)
        assert relative_error(seen, grad) < TOLERANCE[grad.dtype]
        # Of what was seen: a last bit that differs may draw another element.
        return grad @ kept, reference_gradients.mvue24(seen, seed).T @ x, None, None


class Reference(nn.Module):
    """A linear, of weight [N, K] or as Conv1D has it, as the scheme says."""

    def __init__(self, linear: nn.Module, scheme: sp.WeightSparsity, drawn: Drawn) -> None:
        super().__init__()
        self.weight, self.bias, self.scheme, self.drawn = linear.weight, linear.bias, scheme, drawn
        self.turned = not isinstance(linear, nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        weight = self.weight
        kept = torch.where(sp.mask24(weight, self.scheme.mask), weight, 0).detach().to(dtype)
        weight, kept = (w.T if self.turned else w for w in (weight.to(dtype), kept))
        y = Product.apply(x.reshape(-1, x.shape[-1]).to(dtype), weight, kept, self.drawn)
        y = y if self.bias is None else y + self.bias.to(dtype)
        return y.view(*x.shape[:-1], -1)


def reference_of(model: nn.Module, config: dict[str, sp.WeightSparsity], drawn: Drawn) -> nn.Module:
    reference = copy.deepcopy(model)
    decayed = set()
    for name, scheme in config.items():
        owner, _, leaf = name.rpartition(".")
        linear = reference.get_submodule(name)
        setattr(reference.get_submodule(owner), leaf, Reference(linear, scheme, drawn))
        weight = linear.weight
        if scheme.decay and id(weight) not in decayed:
            decayed.add(id(weight))
            weight.register_hook(lambda gradient, w=weight, s=scheme: gradient + decay_of(w, s))
    return reference


@contextmanager
def recorded() -> Iterator[Drawn]:
    """What the operators are given."""
    drawn: Drawn = defaultdict(list)
    estimate = reference_gradients._estimate

    def record(grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        drawn[tuple(grad.shape)].append((grad.clone(), seed.clone()))
        return estimate(grad, seed)

    with mock.patch.object(reference_gradients, "_estimate", record):
        yield drawn


def seeds_of(drawn: Drawn) -> list[int]:
    return [int(seed) for shape in drawn.values() for _, seed in shape]


def check(
    model: nn.Module,
    config: dict[str, sp.WeightSparsity],
    *batches: Tensor,
    inner: str = "aot_eager",
    kernel: str = "masked_dense",
    dynamic: bool | str = False,
    context: Callable[[], Any] = nullcontext,
    dtype: torch.dtype = torch.float32,
) -> sp.Report:
    """Compile, train a step per batch, and compare it all with the reference.

    Args:
        kernel: of every grad_weight.
    """
    backend = sp.sparse_backend(config, model=model, inner=inner)
    with fresh_compile(), invariants_checked():
        compiled = torch.compile(model, backend=backend, dynamic=None if dynamic == "batch" else dynamic)
        for x in batches:
            with recorded() as drawn:
                actual = run(
                    compiled, dict(model.named_parameters()), [x], context=context, mark_dynamic=dynamic == "batch"
                )
            seeds = seeds_of(drawn)
            assert len(seeds) == len(set(seeds)) == len(config)
            again = copy.deepcopy(drawn)
            reference = reference_of(model, config, drawn)
            expected = run(reference, dict(reference.named_parameters()), [x], context=context)
            assert not any(drawn.values()), "the reference needed fewer"
            found = errors(actual, expected)
            assert max(found.values()) < TOLERANCE[dtype], found
            with mock.patch.object(reference_gradients, "mvue24", lambda grad, seed: grad):
                drawn.update(again)
                dense = run(reference, dict(reference.named_parameters()), [x], context=context)
            changed = errors(dense, expected)
            for name in config:
                assert changed[f"gradient of {name}.weight"] > 5 * TOLERANCE[dtype], "the gradient is the dense one"
    assert {site.grad_weight for site in backend.report.sites} == {kernel}, str(backend.report)
    return backend.report


class Mlp(nn.Module):
    def __init__(self, k: int = 16, hidden: int = 32, checkpointed: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(k, hidden), nn.Linear(hidden, k, bias=False)
        self.checkpointed, self.dropout = checkpointed, dropout

    def body(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(torch.tanh(self.up(x)), self.dropout)).sin()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


BOTH = {"up": MVUE, "down": MVUE}


SHAPES = [(24, 16), (2, 7, 16), (3, 2, 2, 16), (5, 16)]


@pytest.mark.parametrize(
    ("shape", "inner"), [*((shape, "aot_eager") for shape in SHAPES), *((shape, "inductor") for shape in SHAPES[:2])]
)
def test_mlp(shape: tuple[int, ...], inner: str) -> None:
    check(Mlp(), BOTH, leaf(*shape), inner=inner)


@INNERS
def test_dynamic_batch(inner: str) -> None:
    check(Mlp(), BOTH, leaf(6, 16), leaf(130, 16), leaf(9, 16), inner=inner, dynamic="batch")


@INNERS
def test_checkpointed(inner: str) -> None:
    """The forward runs again in the backward; the seeds are drawn once."""
    check(Mlp(checkpointed=True), BOTH, leaf(24, 16), leaf(24, 16), inner=inner)


@INNERS
def test_autocast(inner: str) -> None:
    report = check(
        Mlp(64, 128), {"up": KERNELS, "down": KERNELS}, leaf(6, 64), leaf(70, 64), inner=inner, kernel="reference",
        dynamic="batch", context=lambda: torch.autocast("cpu", torch.bfloat16), dtype=torch.bfloat16,
    )  # fmt: skip
    assert {site.status for site in report.sites} == {"sparse"}


@pytest.mark.parametrize(
    ("dtype", "inner"),
    [(torch.float16, "aot_eager"), (torch.bfloat16, "aot_eager"), (torch.float16, "inductor")],
    ids=str,
)
def test_kernels(dtype: torch.dtype, inner: str) -> None:
    x = leaf(2, 35, 64, dtype=dtype)
    check(
        Mlp(64, 128, checkpointed=True).to(dtype), {"up": KERNELS, "down": KERNELS}, x, inner=inner,
        kernel="reference", dtype=dtype,
    )  # fmt: skip


@INNERS
@pytest.mark.parametrize("kernel", ["masked_dense", "reference"])
def test_conv1d(kernel: str, inner: str) -> None:
    model = nn.Sequential(nn.Tanh(), Conv1D(64, 128), nn.Tanh(), Conv1D(128, 64)).bfloat16()
    scheme = KERNELS if kernel == "reference" else MVUE
    x = leaf(2, 35, 64, dtype=torch.bfloat16)
    check(model, {"1": scheme, "3": scheme}, x, inner=inner, kernel=kernel, dtype=torch.bfloat16)


@pytest.mark.parametrize("scheme", [MVUE, KERNELS], ids=str)
def test_tied(scheme: sp.WeightSparsity) -> None:
    """Each call has its GEMM, and its seed."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64, bias=False)).bfloat16()
    model[2].weight = model[0].weight
    kernel = "reference" if scheme is KERNELS else "masked_dense"
    backend = sp.sparse_backend({"*": scheme}, model=model, inner="aot_eager")
    x = leaf(40, 64, dtype=torch.bfloat16)
    with recorded() as drawn, invariants_checked():
        actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x])
    assert len(set(seeds_of(drawn))) == 2
    reference = reference_of(model, {"0": scheme, "2": scheme}, drawn)
    expected = run(reference, dict(reference.named_parameters()), [x])
    found = errors(actual, expected)
    assert max(found.values()) < TOLERANCE[torch.bfloat16], found
    assert [site.grad_weight for site in backend.report.sites] == [kernel] * 2


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_with_decay(inner: str) -> None:
    scheme = sp.WeightSparsity(grad_weight="mvue", decay=0.3, mask="greedy")
    check(Mlp(), {"up": scheme, "down": MVUE}, leaf(24, 16), inner=inner)


def test_grad_output_that_another_linear_reads_too() -> None:
    """Of what reads it afterwards only the gradient of the bias comes from the kernel."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(64, 128), nn.Linear(64, 128)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x.sin()) + self.other(x.cos())

    x = leaf(70, 64, dtype=torch.bfloat16)
    check(Sum().bfloat16(), {"other": KERNELS}, x, kernel="reference", dtype=torch.bfloat16)


def test_grad_output_that_is_summed_over_features_too() -> None:
    class Broadcast(Up):
        def forward(self, x: Tensor) -> Tensor:
            column = x[:, :1].expand(-1, 128)
            return super().forward(x) + column

    x = leaf(70, 64, dtype=torch.bfloat16)
    check(Broadcast().bfloat16(), {"up": KERNELS}, x, kernel="reference", dtype=torch.bfloat16)


def test_bias_that_is_added_by_itself() -> None:
    """Its gradient is summed before grad_output is packed."""

    class Added(Up):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(128))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.bias

    x = leaf(70, 64, dtype=torch.bfloat16)
    check(Added().bfloat16(), {"up": KERNELS}, x, kernel="reference", dtype=torch.bfloat16)


def test_frozen_weight() -> None:
    """There is no grad_weight, and nothing is drawn for it."""
    model = Mlp()
    model.up.weight.requires_grad_(False)
    backend = sp.sparse_backend(BOTH, model=model, inner="aot_eager")
    with recorded() as drawn:
        run(torch.compile(model, backend=backend), dict(model.named_parameters()), [leaf(24, 16)])
    assert {shape: len(calls) for shape, calls in drawn.items()} == {(24, 16): 1}
    assert [site.grad_weight for site in backend.report.sites] == [None, "masked_dense"]
    assert "grad_weight" not in backend.report.sites[0].reason


def test_no_gradient_at_all() -> None:
    backend = sp.sparse_backend(BOTH, inner="aot_eager")
    with torch.no_grad(), recorded() as drawn:
        torch.compile(Mlp(), backend=backend)(leaf(24, 16))
    assert not drawn
    assert {site.grad_weight for site in backend.report.sites} == {None}


@pytest.mark.parametrize("rows", [1, 2])
@INNERS
def test_up_to_two_rows_are_exact(rows: int, inner: str) -> None:
    """No more than two of four are there. Of one row Inductor makes a product, which has no sparse form."""
    model, x = Mlp(), leaf(rows, 16)
    found = []
    for scheme in (MVUE, sp.WeightSparsity()):
        torch._dynamo.reset()
        call = torch.compile(model, backend=sp.sparse_backend({"*": scheme}, model=model, inner=inner))
        found.append(run(call, dict(model.named_parameters()), [x]))
    assert max(errors(*found).values()) < TOLERANCE[torch.float32]


# Random numbers


def gradients(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    call(x).sum().backward()
    found = [model.get_submodule(name).weight.grad for name in ("up", "down")]
    model.zero_grad()
    return found


SETTINGS = {
    "default": nullcontext,
    "fallback_random": lambda: torch._inductor.config.patch(fallback_random=True),
    "run with a saved state": lambda: torch._functorch.config.patch(graphsafe_rng_functionalization=False),
    "recompute": lambda: torch._functorch.config.patch(aggressive_recomputation=True),
}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(
    ("inner", "setting"),
    # Random numbers of Inductor are its own, as its loops draw them.
    [
        *(pytest.param("inductor", one, marks=pytest.mark.loops) for one in SETTINGS),
        *(("aot_eager", one) for one in SETTINGS if one != "fallback_random"),
    ],
)
def test_new_in_every_step_and_reproduced_by_the_seed(inner: str, setting: str, checkpointed: bool) -> None:
    """Beside dropout, and for two layers of one shape: neither Inductor nor a partitioner makes one seed of two."""
    model = Mlp(16, 16, checkpointed, dropout=0.2)
    x = torch.randn(24, 16)
    with SETTINGS[setting](), recorded() as drawn:
        call = torch.compile(model, backend=sp.sparse_backend(BOTH, model=model, inner=inner))
        torch.manual_seed(1)
        first, second = gradients(call, model, x), gradients(call, model, x)
        torch.manual_seed(1)
        again = gradients(call, model, x)
    seeds = seeds_of(drawn)
    assert len(seeds) == 6
    assert seeds[:2] == seeds[4:]
    assert len(set(seeds)) == 4
    assert max(seeds) > 2**32  # both key words
    for one, two, three in zip(first, second, again, strict=True):
        assert torch.equal(one, three)
        assert relative_error(two, one) > 0.1


@INNERS
def test_drawn_in_the_backward(inner: str) -> None:
    """A forward draws nothing, such as that of a validation; each backward draws anew."""
    model, x = Mlp(), torch.randn(24, 16)
    with torch._functorch.config.patch(donated_buffer=False), recorded() as drawn:
        call = torch.compile(model, backend=sp.sparse_backend(BOTH, model=model, inner=inner))
        call(x)
        state = torch.get_rng_state()
        loss = call(x).sum()
        assert torch.equal(torch.get_rng_state(), state)
        loss.backward(retain_graph=True)
        loss.backward()
    assert len(set(seeds_of(drawn))) == 4


def test_expectation_is_the_dense_gradient() -> None:
    """Over 600 steps of the same batch, of the last layer, whose grad_output has no randomness of its own."""
    model, x, draws = Mlp(), torch.randn(10, 16), 600
    dense, call = (
        torch.compile(model, backend=sp.sparse_backend({"*": scheme}, model=model, inner="aot_eager"))
        for scheme in (sp.WeightSparsity(), MVUE)
    )
    exact = gradients(dense, model, x)
    torch._dynamo.reset()
    steps = [gradients(call, model, x) for _ in range(draws)]
    drawn = [torch.stack(one) for one in zip(*steps, strict=True)]
    for mean, expected, spread in zip((d.mean(0) for d in drawn), exact, (d.std(0) for d in drawn), strict=True):
        assert ((mean - expected).abs() <= 5 * spread / draws**0.5 + 1e-6).all()
        assert relative_error(mean, expected) < 0.1
    assert all(relative_error(d[0], expected) > 0.2 for d, expected in zip(drawn, exact, strict=True))


def test_explain_leaves_the_random_state() -> None:
    model, x = Mlp(), torch.randn(24, 16)
    state = torch.get_rng_state()
    report = sp.explain(model, BOTH)(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert {site.grad_weight for site in report.sites} == {"masked_dense"}


# What cannot have one


WAYS = {
    "x @ w.T": (lambda x, w: x @ w.T, (12, 8), (11, 8), ""),
    "x @ w": (lambda x, w: x @ w, (8, 12), (3, 11, 8), ""),
    "w @ x": (lambda x, w: w @ x, (12, 8), (8, 11), ""),
    "w.T @ x": (lambda x, w: w.T @ x, (8, 12), (8, 11), ""),
    "slice": (lambda x, w: F.linear(x, w[:4]), (12, 8), (11, 8), ""),
    "cast": (lambda x, w: F.linear(x.double(), w.double()).float(), (12, 8), (11, 8), ""),
    "addmm, scaled": (lambda x, w: torch.addmm(x[:, :1], x, w.T, beta=0.5, alpha=2), (12, 8), (11, 8), ""),
    "bmm": (
        lambda x, w: torch.bmm(x, w.T.expand(2, 8, 12)), (12, 8), (2, 11, 8),
        "grad_weight: the graph has it as aten.bmm.default, not as one matmul",
    ),
    "mv": (lambda x, w: torch.mv(w, x), (12, 8), (8,), "grad_weight: the graph has it as aten.mul.Tensor"),
    "own function": (
        lambda x, w: OwnLinear.apply(x, w), (12, 8), (11, 8), "grad_weight: not found in the graph; left as captured"
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_way(way: str) -> None:
    """Where grad_weight is one matmul, in whatever orientation, its numbers change; else the report says why not."""
    multiply, shape, size, reason = WAYS[way]
    model, x = Apply(multiply, *shape), leaf(*size)
    found = []
    for scheme in (MVUE, sp.WeightSparsity()):
        torch._dynamo.reset()
        backend = sp.sparse_backend({"w": scheme}, model=model, inner="aot_eager")
        with invariants_checked(), recorded() as drawn:
            found.append(run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x]))
        if scheme is MVUE:
            (site,) = backend.report.sites
            assert site.grad_weight == ("dense" if reason else "masked_dense")
            assert reason in site.reason
            assert len(seeds_of(drawn)) == (0 if reason else 1)
    difference = errors(*found)
    assert (difference.pop("gradient of w") > 0.1) == (not reason)
    assert max(difference.values()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][-1]])
def test_strict_refuses(way: str) -> None:
    multiply, shape, size, reason = WAYS[way]
    model = Apply(multiply, *shape)
    backend = sp.sparse_backend({"w": MVUE}, model=model, inner="aot_eager", strict=True)
    with pytest.raises(Exception, match=rf"'w'.*changes grad_weight, but {reason}"):
        torch.compile(model, backend=backend)(leaf(*size))


@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][-1]])
def test_strict_asks_for_no_gradient_that_stays_dense(way: str) -> None:
    multiply, shape, size, _ = WAYS[way]
    model = Apply(multiply, *shape)
    backend = sp.sparse_backend({"w": sp.WeightSparsity()}, model=model, inner="aot_eager", strict=True)
    torch.compile(model, backend=backend)(leaf(*size))
    assert [site.status for site in backend.report.sites] == ["masked_dense"]


def test_undescribed_outputs() -> None:
    graph = capture(Up(), [torch.randn(8, 64)], {"up": MVUE}).before.graph
    del graph.output_node().meta["desc"]
    before = printed(graph)
    with pytest.raises(ValueError, match=r"'up'.*grad_weight: the graph does not describe its outputs"):
        rewrite_graph(graph, parse_config({"up": MVUE}), strict=True)
    assert printed(graph) == before
    (site,) = rewrite_graph(graph, parse_config({"up": MVUE})).sites
    assert site.reason.endswith("grad_weight: the graph does not describe its outputs; left as captured")
    assert "mvue" not in printed(graph)


@pytest.mark.parametrize(
    ("model", "x", "kernels", "reason"),
    [
        (Mlp(48, 64).bfloat16(), leaf(24, 48, dtype=torch.bfloat16), "masked_dense masked_dense reference", "64"),
        (Mlp(72, 64).bfloat16(), leaf(24, 72, dtype=torch.bfloat16), "masked_dense masked_dense masked_dense", "N and"),
        (Mlp(64, 64), leaf(24, 64), "masked_dense masked_dense masked_dense", "float32 has no 2:4 kernels"),
    ],
)
def test_what_the_kernels_do_not_take(model: nn.Module, x: Tensor, kernels: str, reason: str) -> None:
    """N must be a multiple of 64 and K of 16, in 16 bits; else the same numbers, dense, with the reason."""
    backend = sp.sparse_backend({"up": KERNELS}, model=model, inner="aot_eager")
    run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x])
    (site,) = backend.report.sites
    assert [site.output, site.grad_input, site.grad_weight] == kernels.split()
    assert site.status == ("sparse" if "reference" in kernels else "masked_dense")
    assert reason in site.reason


@pytest.mark.parametrize(
    ("limits", "scheme", "kernel", "reason"),
    [
        (HOPPER, MVUE, "cusparselt", ""),
        (Limits(device="cuda", capability=(7, 5)), MVUE, "masked_dense", "SM75 has no sparse tensor cores"),
        (
            replace(HOPPER, unavailable="no library"), MVUE, "masked_dense", "no library",
        ),
        (Limits(device="cpu"), MVUE, "masked_dense", "no 2:4 kernels on cpu"),
        (Limits(device="cpu"), replace(MVUE, backend="masked_dense"), "masked_dense", "backend='masked_dense' was"),
    ],
)  # fmt: skip
def test_reasons(limits: Limits, scheme: sp.WeightSparsity, kernel: str, reason: str) -> None:
    """What is computed does not depend on the device: without kernels mvue24, with the reason, which is said once."""
    x = leaf(8, 64, dtype=torch.bfloat16)
    captured = capture(Up().bfloat16(), [x], {"up": scheme}, limits=device(limits))
    captured.check_invariants()
    (site,) = captured.report.sites
    assert (site.output, site.grad_weight) == (kernel, kernel)
    assert site.reason.startswith(reason)
    assert (site.reason == "") == (reason == "")
    assert ";" not in site.reason
    assert captured.text.count("sparse_pass.mvue24(") == (kernel == "masked_dense")


def test_masked_dense_is_what_the_kernels_compute() -> None:
    model, x = Mlp(64, 128).bfloat16(), leaf(70, 64, dtype=torch.bfloat16)
    found = []
    for backend in ("cusparselt", "masked_dense"):
        torch._dynamo.reset()
        scheme = sp.WeightSparsity(grad_weight="mvue", backend=backend)
        call = torch.compile(model, backend=sp.sparse_backend({"*": scheme}, model=model, inner="aot_eager"))
        torch.manual_seed(5)
        found.append(run(call, dict(model.named_parameters()), [x]))
    assert max(errors(*found).values()) < TOLERANCE[torch.bfloat16]
