"""Half a scheme is never computed: where output is masked, the backward of the same call reads the masked weight too.

The reference is the model with pruned weights, whose gradient goes straight through the mask: `pruned` runs the very
same modules with S(W) in the place of W.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_printer import capture
from networks import OwnLinear
from support import (
    TOLERANCE,
    Result,
    errors,
    fresh_compile,
    invariants_checked,
    mask_by_hand,
    relative_error,
    run,
)
from torch import Tensor, nn

import sparse_pass as sp
from sparse_pass.fqn import parse_config
from sparse_pass.graph.parameters import Names
from sparse_pass.one_graph import rewrite_graph

W24 = sp.WeightSparsity()
MASKED = sp.WeightSparsity(grad_weight="masked")
MASKED_AND_DECAY = sp.WeightSparsity(grad_weight="masked", decay=0.5)
COMPUTES = "the GEMM reads what the graph computes from the weight"


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def pruned(model: nn.Module, *names: str, scheme: sp.WeightSparsity = W24) -> nn.Module:
    """A copy of the model that holds S(W) in the place of the weights of the named modules."""
    copied = copy.deepcopy(model)
    for name in names:
        weight = copied.get_submodule(name).weight
        weight.data = torch.where(sp.mask24(weight.detach(), scheme.mask), weight.detach(), 0)
    return copied


def both(
    model: nn.Module, names: tuple[str, ...], *inputs: Any, scheme: Any = W24, **options: Any
) -> tuple[Result, Result, sp.Report]:
    """The compiled model with the scheme, the pruned model, and the report."""
    reference = pruned(model, *names)
    backend = sp.sparse_backend(dict.fromkeys(names, scheme), model=model, inner="aot_eager", **options)
    with invariants_checked():
        actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), inputs)
    expected = run(reference, dict(reference.named_parameters()), inputs)
    return actual, expected, backend.report


def assert_equal(actual: Result, expected: Result) -> None:
    found = errors(actual, expected)
    assert max(found.values()) == 0, found


# Weights that forward and backward compute anew


def quantized(w: Tensor) -> Tensor:
    scale = w.abs().amax() / 127
    return (w / scale).round() * scale


class Quantizing(torch.autograd.Function):
    """Quantizes in the forward, and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ quantized(w).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ quantized(w), grad.t() @ x


class OnlyBackward(Quantizing):
    """Quantizes for grad_input alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()


class OnlyForward(Quantizing):
    """A straight-through backward: grad_input reads the weight as it is."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


class QLinear(nn.Linear):
    """A linear by a function of its weight."""

    def __init__(self, n: int, k: int, function: Callable[[Tensor, Tensor], Tensor] | type) -> None:
        super().__init__(k, n, bias=False)
        self.function = function
        self.is_class = isinstance(function, type)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight)

    def call(self, x: Tensor, w: Tensor) -> Tensor:
        """Dynamo of torch 2.11 traces an autograd.Function where it sees the class."""
        return self.function.apply(x, w) if self.is_class else self.function(x, w)


def fake_quantized(x: Tensor, w: Tensor) -> Tensor:
    """Per tensor, and straight-through by hand."""
    return F.linear(x, w + (quantized(w) - w).detach())


def clamped(x: Tensor, w: Tensor) -> Tensor:
    """The backward of each op reads the weight: clamp, tanh, and a scale that has a gradient."""
    return F.linear(x, (w.clamp(-0.08, 0.08) / w.abs().amax(1, keepdim=True)).tanh() * w)


def grouped(x: Tensor, w: Tensor) -> Tensor:
    """Per group of eight columns."""
    groups = w.view(w.shape[0], -1, 8)
    scale = groups.detach().abs().amax(-1, keepdim=True) / 7
    rounded = groups + ((groups / scale).round().clamp(-8, 7) * scale - groups).detach()
    return F.linear(x, rounded.view(w.shape))


def by_torch(x: Tensor, w: Tensor) -> Tensor:
    """torch's own fake quantization, per channel."""
    scale = w.detach().abs().amax(1).float() / 127
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return F.linear(x, torch.fake_quantize_per_channel_affine(w.float(), scale, zero, 0, -128, 127).to(w.dtype))


def dequantizing(x: Tensor, w: Tensor) -> Tensor:
    """The scale, computed once more, comes after the matmul."""
    scale = w.detach().abs().amax() / 127
    return F.linear(x, (w / scale).round() + (w - w.detach())) * (w.detach().abs().amax() / 127)


RECOMPUTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "quantizing function": Quantizing,
    "quantized in the backward only": OnlyBackward,
    "quantized in the forward only": OnlyForward,
    "fake quantized": fake_quantized,
    "clamped and scaled": clamped,
    "grouped": grouped,
    "by torch": by_torch,
    "from the left": lambda x, w: (quantized(w) @ x.t()).t(),
    "transposed first": lambda x, w: x @ quantized(w.t()),
    "scaled after the matmul": dequantizing,
}


@pytest.mark.parametrize("way", RECOMPUTED)
def test_the_weight_is_masked_at_its_root(way: str) -> None:
    """Output and gradients are those of the model with pruned weights, bit for bit, and there is one row."""
    model = nn.Sequential(nn.Tanh(), QLinear(32, 64, RECOMPUTED[way]), nn.Tanh()).double()
    actual, expected, report = both(model, ("1",), leaf(8, 64))
    assert_equal(actual, expected)
    (site,) = report.sites
    assert (site.fqn, site.status, site.shape) == ("1", "masked_dense", (8, 32, 64))
    assert (site.output, site.grad_input, site.grad_weight) == ("masked_dense", "masked_dense", "dense")
    assert COMPUTES in site.reason
    assert max(errors(actual, run(model, dict(model.named_parameters()), [leaf(8, 64)])).values()) > 0.1


def test_a_scale_that_is_computed_once_more() -> None:
    """After the matmul, from the largest weight, which the mask drops: it is that of the pruned weight."""
    model = nn.Sequential(nn.Tanh(), QLinear(8, 8, dequantizing)).double()
    with torch.no_grad():
        model[1].weight.mul_(0.1)
        model[1].weight[:4, :4] = torch.tensor([[9.0, 8, 8, 8], [8, 1, 1, 1], [8, 1, 1, 1], [8, 1, 1, 1]])
    assert pruned(model, "1")[1].weight.max() == 8
    assert_equal(*both(model, ("1",), leaf(5, 8))[:2])


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_weight_quantized_for_two_calls(inner: Any, dynamic: bool) -> None:
    """Once for both, and once for each."""

    class Twice(nn.Module):
        def __init__(self, once: bool) -> None:
            super().__init__()
            self.fc, self.once = QLinear(16, 16, fake_quantized), once

        def forward(self, x: Tensor) -> Tensor:
            if self.once:
                w = quantized(self.fc.weight)
                return F.linear(F.linear(x.sin(), w).tanh(), w)
            return self.fc(self.fc(x.sin()).tanh())

    for once in (True, False):
        model, x = Twice(once), leaf(5, 16, dtype=torch.float32)
        reference = pruned(model, "fc")
        backend = sp.sparse_backend({"fc": W24}, model=model, inner=inner)
        with invariants_checked():
            compiled = torch.compile(model, backend=backend, dynamic=dynamic)
            actual = run(compiled, dict(model.named_parameters()), [x])
        expected = run(reference, dict(reference.named_parameters()), [x])
        assert max(errors(actual, expected).values()) < 1e-5
        assert [(site.fqn, site.output, site.grad_input) for site in backend.report.sites] == [
            ("fc", "masked_dense", "masked_dense")
        ] * 2


class Straight(torch.autograd.Function):
    """S(W), with the gradient of W."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return torch.where(sp.mask24(w), w, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Regularized(nn.Module):
    """What else reads the weight reads it as it is: a norm before and after, its rows, a linear by another function."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = QLinear(16, 16, function)
        self.straight = False

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        before = self.fc.weight.norm()
        weight = Straight.apply(self.fc.weight) if self.straight else self.fc.weight
        y = self.fc.call(x.sin() + F.embedding(index, self.fc.weight), weight)
        return y.sum() + before + self.fc.weight.abs().sum() + (self.fc.weight**2).sum()


@pytest.mark.parametrize("way", ["quantizing function", "fake quantized", "clamped and scaled", "grouped"])
def test_other_readers_of_the_weight_stay_dense(way: str) -> None:
    model, index = Regularized(RECOMPUTED[way]).double(), torch.randint(16, (16,))
    backend = sp.sparse_backend({"fc": W24}, model=model, inner="aot_eager")
    x, parameters = leaf(16, 16), {"weight": model.fc.weight}
    with invariants_checked():
        actual = run(torch.compile(model, backend=backend), parameters, [x, index])
    model.straight = True
    expected = run(model, parameters, [x, index])
    assert max(errors(actual, expected).values()) < 1e-14
    (site,) = backend.report.sites
    assert (site.status, site.grad_input) == ("masked_dense", "masked_dense")


@pytest.mark.parametrize(
    ("way", "scheme"),
    [
        *((way, MASKED_AND_DECAY) for way in RECOMPUTED),
        ("quantizing function", MASKED),
        ("fake quantized", sp.WeightSparsity(decay=0.5)),
    ],
    ids=str,
)
def test_gradients_of_a_weight_masked_at_its_root(way: str, scheme: sp.WeightSparsity) -> None:
    """Masked where the graph returns it, and decay added there."""
    model = nn.Sequential(nn.Tanh(), QLinear(32, 64, RECOMPUTED[way])).double()
    actual, expected, report = both(model, ("1",), leaf(8, 64), scheme=scheme)
    weight, gradient = model[1].weight.detach(), expected.gradients["1.weight"]
    assert gradient is not None
    mask = sp.mask24(weight)
    if scheme.grad_weight == "masked":
        gradient = torch.where(mask, gradient, 0)
    expected.gradients["1.weight"] = gradient + torch.where(mask, 0, weight) * scheme.decay
    assert_equal(actual, expected)
    assert [site.status for site in report.sites] == ["masked_dense"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("scheme", [sp.WeightSparsity(grad_weight="masked"), sp.WeightSparsity(decay=0.1)], ids=str)
def test_a_gradient_with_other_parts_is_not_masked_in_silence(scheme: sp.WeightSparsity, strict: bool) -> None:
    model, index = Regularized(fake_quantized).double(), torch.randint(16, (16,))
    backend = sp.sparse_backend({"*": scheme}, model=model, inner="aot_eager", strict=strict)
    with pytest.raises(Exception, match=r"'fc'.* changes grad_weight, but grad_weight: .*left as captured"):
        torch.compile(model, backend=backend)(leaf(16, 16), index)


def test_mvue_of_a_weight_masked_at_its_root() -> None:
    """The matmul of grad_weight is found by its number; the graph computes the gradient of the weight from it."""
    model = nn.Sequential(nn.Tanh(), QLinear(64, 64, fake_quantized))
    actual, expected, report = both(
        model, ("1",), leaf(32, 64, dtype=torch.float32), scheme=sp.WeightSparsity(grad_weight="mvue")
    )
    found = errors(actual, expected)
    assert found["output 0"] == found["gradient of input 0"] == 0
    assert 0.05 < found["gradient of 1.weight"] < 3
    assert [site.grad_weight for site in report.sites] == ["masked_dense"]


@pytest.mark.parametrize("way", ["fake quantized", "grouped"])
def test_inputs_of_a_quantized_weight(way: str) -> None:
    """The scheme of the input leaves the weight as it is."""
    model, x = nn.Sequential(nn.Tanh(), QLinear(16, 16, RECOMPUTED[way])).double(), leaf(8, 16)
    actual, _, report = both(model, ("1",), x, scheme=sp.ActivationSparsity())
    hidden = model[0](x)
    masked = hidden + (torch.where(mask_by_hand(hidden, "optimal"), hidden, 0) - hidden).detach()
    output = model[1](masked)
    assert relative_error(actual.outputs[0], output) < 1e-14
    assert [(site.status, site.grad_input, site.grad_weight) for site in report.sites] == [
        ("masked_dense", "dense", "masked_dense")
    ]


def test_a_quantized_weight_and_its_input_are_not_both_masked() -> None:
    model = nn.Sequential(nn.Tanh(), QLinear(16, 16, fake_quantized))
    backend = sp.sparse_backend({"*": (W24, sp.ActivationSparsity())}, model=model, inner="aot_eager")
    output = torch.compile(model, backend=backend)(x := leaf(8, 16, dtype=torch.float32))
    assert torch.equal(output, model(x))
    (site,) = backend.report.sites
    assert site.status == "skipped"
    assert site.reason.startswith("the graph computes something from the weight, for output and for grad_input")


def test_a_quantized_weight_by_two_names() -> None:
    """One call is to be masked and the other is not: then neither is, as they may share what is computed."""
    model = nn.Sequential(QLinear(16, 16, fake_quantized), nn.Tanh(), QLinear(16, 16, fake_quantized))
    model[2].weight = model[0].weight
    x = leaf(8, 16, dtype=torch.float32)
    backend = sp.sparse_backend({"0": None, "re:2": W24}, model=model, inner="aot_eager")
    assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    (site,) = backend.report.sites
    assert (site.fqn, site.status) == ("2", "skipped")
    assert "the config treats its calls differently" in site.reason


# torchao


def float8(model: nn.Module) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(model, config=Float8LinearConfig(emulate=True))


def int4_groups(model: nn.Module) -> nn.Module:
    return _qat(model, torch.int4, group_size=32)


def int8_channels(model: nn.Module) -> nn.Module:
    return _qat(model, torch.int8, granularity="per_channel")


def _qat(model: nn.Module, dtype: torch.dtype, **how: Any) -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    quantize_(model, QATConfig(weight_config=IntxFakeQuantizeConfig(dtype, **how), step="prepare"))
    return model


@pytest.mark.parametrize("convert", [float8, int4_groups, int8_channels], ids=lambda f: f.__name__)
def test_torchao(convert: Callable[[nn.Module], nn.Module]) -> None:
    """As pruning first and converting then."""
    pytest.importorskip("torchao")
    dense = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32, bias=False))
    first = copy.deepcopy(dense)
    sp.prune_(first, {"*": W24})
    model, reference = convert(dense), convert(first)
    backend = sp.sparse_backend({"*": W24}, model=model, inner="aot_eager")
    x = leaf(16, 64, dtype=torch.float32)
    with invariants_checked():
        actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x])
    assert_equal(actual, run(reference, dict(reference.named_parameters()), [x]))
    rows = [(site.fqn, site.status, site.output, site.grad_input, site.grad_weight) for site in backend.report.sites]
    masked = ("masked_dense",) * 3
    assert rows == [("0", *masked, "dense"), ("2", *masked, "dense")]


# What is not whole is not begun


class Recomputing(torch.autograd.Function):
    """Computes the weight in the forward and again in the backward, of a direction and a length."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(x, g, v)
        return x @ (g * v / v.norm(dim=1, keepdim=True)).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, g, v = ctx.saved_tensors
        return grad @ (g * v / v.norm(dim=1, keepdim=True)), g, v  # gradients of no meaning, of the right shape


class WeightNorm(nn.Linear):
    """Without a weight of its own, as torch.nn.utils.weight_norm leaves it."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__(k, n, bias=False)
        self.weight_g = nn.Parameter(self.weight.detach().norm(dim=1, keepdim=True))
        self.weight_v = nn.Parameter(self.weight.detach().clone())
        del self._parameters["weight"]

    def forward(self, x: Tensor) -> Tensor:
        return Recomputing.apply(x, self.weight_g, self.weight_v)


def test_a_weight_without_a_stored_one_that_the_backward_computes_anew() -> None:
    model, x = nn.Sequential(nn.Tanh(), WeightNorm(16, 8)).double(), leaf(4, 8)
    backend = sp.sparse_backend({"re:1": W24}, model=model, inner="aot_eager")
    actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x])
    assert_equal(actual, run(model, dict(model.named_parameters()), [x]))
    (site,) = backend.report.sites
    assert (site.fqn, site.status, site.output, site.grad_input) == ("1", "skipped", "dense", None)
    assert site.reason == "the backward multiplies by what it computes anew, and not by the weight that output reads"


def test_that_is_an_error_where_named_exactly() -> None:
    model = nn.Sequential(nn.Tanh(), WeightNorm(16, 8))
    backend = sp.sparse_backend({"1": W24}, model=model, inner="aot_eager")
    with pytest.raises(Exception, match=r"'1' \(named exactly\): the backward multiplies by what it computes anew"):
        torch.compile(model, backend=backend)(leaf(4, 8, dtype=torch.float32))


class Twice(torch.autograd.Function):
    """Two products with one weight: which of its backward matmuls belongs to which, no number tells."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t() + torch.tanh(x) @ w.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w + (grad @ w) * (1 - torch.tanh(x) ** 2), grad.t() @ x + grad.t() @ torch.tanh(x)


@pytest.mark.parametrize(
    "scheme", [W24, sp.WeightSparsity(grad_weight="masked"), sp.WeightSparsity(decay=0.5)], ids=str
)
@pytest.mark.parametrize("shape", [(32, 64), (64, 64)], ids=str)
def test_two_products_in_one_function(shape: tuple[int, int], scheme: sp.WeightSparsity) -> None:
    """Of a square weight the shape does not tell in which layout a gradient is."""
    model = nn.Sequential(nn.Tanh(), QLinear(*shape, Twice)).double()
    actual, expected, report = both(model, ("1",), leaf(8, 64), scheme=scheme)
    weight, gradient = model[1].weight.detach(), expected.gradients["1.weight"]
    mask = sp.mask24(weight)
    assert gradient is not None
    if scheme.grad_weight == "masked":
        gradient = torch.where(mask, gradient, 0)
    expected.gradients["1.weight"] = gradient + torch.where(mask, 0, weight) * scheme.decay
    assert_equal(actual, expected)
    assert {site.status for site in report.sites} == {"masked_dense"}
    assert "masked_dense" in [site.grad_input for site in report.sites]


@pytest.mark.parametrize("shape", [(32, 64), (64, 64)], ids=str)
def test_masked_gradient_of_a_function_that_returns_it_as_the_weight_is_laid_out(shape: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Tanh(), QLinear(*shape, OwnLinear)).double()
    actual, expected, _ = both(model, ("1",), leaf(8, 64), scheme=sp.WeightSparsity(grad_weight="masked"))
    gradient = expected.gradients["1.weight"]
    assert gradient is not None
    expected.gradients["1.weight"] = torch.where(sp.mask24(model[1].weight), gradient, 0)
    assert_equal(actual, expected)


EAGER = (
    "its autograd.Function is not traced by Dynamo: forward is compiled alone and backward runs eagerly, with the"
    " dense weight (TORCH_LOGS=graph_breaks says why)"
)


@pytest.mark.parametrize("scheme", [W24, sp.ActivationSparsity()], ids=str)
def test_a_backward_that_runs_eagerly(scheme: Any) -> None:
    """As the backend says of a parameter: a layer beside it is masked all the same."""
    captured = capture(
        nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8)), [torch.randn(4, 8)], {"re:.*": scheme}
    )
    by_input = {0: ("0.weight",), 2: ("1.weight",)}
    names = Names(by_input=by_input, eager_backward=frozenset({"0.weight"}))
    graph = captured.before.graph
    by_name = {row.fqn: row for row in rewrite_graph(graph, parse_config({"re:.*": scheme}), names).sites}
    assert (by_name["0"].status, by_name["0"].reason, by_name["0"].output) == ("skipped", EAGER, "dense")
    assert (by_name["1"].status, by_name["1"].output) == ("masked_dense", "masked_dense")
    for name, strict in (("0", False), ("re:.*", True)):
        with pytest.raises(ValueError, match=re.escape(EAGER)):
            rewrite_graph(graph, parse_config({name: scheme}), names, strict=strict)


# A linear and its loss in one function, which computes the gradients in its forward


class Fused(torch.autograd.Function):
    """Cross entropy of ``x @ w.t()``, as Liger fuses it: in chunks of tokens, with the gradients on the way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, target: Tensor, chunks: int) -> Tensor:
        loss = x.new_zeros(())
        grad_x, grad_w, grad_b = [], torch.zeros_like(w), None if b is None else torch.zeros_like(b)
        for rows, wanted in zip(x.chunk(chunks), target.chunk(chunks), strict=True):
            logits = rows @ w.t() if b is None else torch.addmm(b, rows, w.t())
            p, onehot = logits.softmax(-1), F.one_hot(wanted, w.shape[0]).to(x.dtype)
            loss = loss - (p.log() * onehot).sum()
            grad_logits = p - onehot
            grad_x.append(grad_logits @ w)
            grad_w = torch.addmm(grad_w, grad_logits.t(), rows) if chunks == 2 else grad_w + grad_logits.t() @ rows
            if grad_b is not None:
                grad_b = grad_b + grad_logits.sum(0)
        ctx.save_for_backward(torch.cat(grad_x), grad_w, grad_b)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_x, grad_w, grad_b = ctx.saved_tensors
        return grad_x * grad, grad_w * grad, None if grad_b is None else grad_b * grad, None, None


class Head(nn.Module):
    def __init__(self, n: int, chunks: int, bias: bool) -> None:
        super().__init__()
        self.lm_head, self.chunks = nn.Linear(32, n, bias=bias), chunks

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return Fused.apply(x.tanh(), self.lm_head.weight, self.lm_head.bias, target, self.chunks)


@pytest.mark.parametrize(
    ("n", "chunks", "bias", "scheme"),
    [
        (48, 1, False, W24),
        (48, 4, True, W24),
        (32, 2, True, W24),
        (48, 2, True, MASKED),
        (32, 4, False, MASKED),
        (48, 2, False, MASKED_AND_DECAY),
        (32, 1, True, MASKED_AND_DECAY),
        (32, 4, True, MASKED_AND_DECAY),
    ],
    ids=str,
)
def test_linear_fused_with_its_loss(n: int, chunks: int, bias: bool, scheme: sp.WeightSparsity) -> None:
    """Both matmuls with the weight read S(W): the second is no linear, but the gradient of the first one's input."""
    model, target = Head(n, chunks, bias).double(), torch.arange(8)
    actual, expected, report = both(model, ("lm_head",), leaf(8, 32), target, scheme=scheme, strict=True)
    weight, gradient = model.lm_head.weight.detach(), expected.gradients["lm_head.weight"]
    assert gradient is not None
    mask = sp.mask24(weight)
    if scheme.grad_weight == "masked":
        gradient = torch.where(mask, gradient, 0)
    # The gradient from outside is another number than one.
    expected.gradients["lm_head.weight"] = gradient + torch.where(mask, 0, weight) * scheme.decay
    assert_equal(actual, expected)
    rows = [(site.fqn, site.shape, site.output, site.grad_input, site.grad_weight) for site in report.sites]
    masked = ("masked_dense", "masked_dense")
    assert rows == [("lm_head", (8 // chunks, n, 32), *masked, "dense")] * chunks


def test_mvue_of_a_linear_fused_with_its_loss() -> None:
    """Not found: dense with the reason, and an error under strict."""
    scheme, x, target = sp.WeightSparsity(grad_weight="mvue"), leaf(8, 32), torch.arange(8)
    model = Head(48, 2, False).double()
    actual, expected, report = both(model, ("lm_head",), x, target, scheme=scheme)
    assert_equal(actual, expected)
    assert {site.grad_weight for site in report.sites} == {"dense"}
    assert all("grad_weight: not found in the graph; left as captured" in site.reason for site in report.sites)
    with pytest.raises(Exception, match="grad_weight: not found in the graph"):
        both(model, ("lm_head",), x, target, scheme=scheme, strict=True)


@pytest.mark.parametrize("scheme", [sp.ActivationSparsity(), (W24, sp.ActivationSparsity())], ids=str)
@pytest.mark.parametrize("n", [48, 32])
def test_inputs_of_a_linear_fused_with_its_loss(n: int, scheme: Any) -> None:
    """Neither those nor the gradient of the logits are masked, as grad_weight would not be."""
    model, x, target = Head(n, 2, False).double(), leaf(8, 32), torch.arange(8)
    backend = sp.sparse_backend({"re:.*": scheme}, model=model, inner="aot_eager")
    actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x, target])
    assert_equal(actual, run(model, dict(model.named_parameters()), [x, target]))
    assert {(site.status, site.reason) for site in backend.report.sites} == {
        ("skipped", "grad_weight: not found in the graph; left as captured")
    }
    with pytest.raises(Exception, match=r"'lm_head' \(named exactly\): grad_weight: not found in the graph"):
        both(model, ("lm_head",), x, target, scheme=scheme)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_fused_with_its_loss_in_kernels(dtype: torch.dtype, inner: Any) -> None:
    """S(W)^T is read in the forward, which has to make it then."""
    model = Head(64, 2, False)
    model.lm_head = nn.Linear(64, 64, bias=False)
    model.to(dtype)
    reference = pruned(model, "lm_head")
    scheme = sp.WeightSparsity(backend="cusparselt")
    backend = sp.sparse_backend({"lm_head": scheme}, model=model, inner=inner)
    inputs = [leaf(8, 64, dtype=dtype), torch.arange(8)]
    with invariants_checked():
        actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), inputs)
    expected = run(reference, dict(reference.named_parameters()), inputs)
    assert max(errors(actual, expected).values()) < TOLERANCE[dtype]
    kernel = "reference" if dtype == torch.bfloat16 else "masked_dense"
    assert {(site.output, site.grad_input) for site in backend.report.sites} == {(kernel, kernel)}


def test_a_tied_decoder_is_no_gradient() -> None:
    """Its output is an output of the graph: a call of its own."""
    model = QLinear(16, 32, lambda x, w: (x.sin() @ w.t()).tanh() @ w).double()
    tied = nn.Sequential(model, nn.Tanh())
    actual, expected, report = both(tied, ("0",), leaf(8, 32))
    assert max(errors(actual, expected).values()) < 1e-15
    assert [(site.shape, site.grad_input) for site in report.sites] == [
        ((8, 16, 32), "masked_dense"),
        ((8, 32, 16), "masked_dense"),
    ]


class Checkpointed(torch.autograd.Function):
    """Computes its output once more in the backward, for the gradient of an activation function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.tanh(x @ w.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        inner = grad * (1 - torch.tanh(x @ w.t()) ** 2)
        return inner @ w, inner.t() @ x


@pytest.mark.parametrize("shape", [(32, 64), (64, 64)], ids=str)
def test_an_output_that_the_backward_computes_anew(shape: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Tanh(), QLinear(*shape, Checkpointed)).double()
    actual, expected, report = both(model, ("1",), leaf(8, 64))
    assert_equal(actual, expected)
    rows = [(site.shape, site.output, site.grad_input, site.grad_weight) for site in report.sites]
    assert rows == [((8, *shape), "masked_dense", "masked_dense", "dense")]
    backend = sp.sparse_backend({"*": sp.ActivationSparsity()}, model=model, inner="aot_eager")
    with fresh_compile():
        torch.compile(model, backend=backend)(leaf(8, 64))
    (site,) = backend.report.sites
    assert (site.status, site.reason) == ("skipped", "the backward computes the output anew, from the dense input")


# Gradients and weights that the report left out


def test_gradient_of_a_subclass_that_is_no_subclass() -> None:
    """torchao's int8 mixed precision: the weight is a subclass of one tensor, and its gradient a plain tensor."""
    quantized_training = pytest.importorskip("torchao.prototype.quantized_training")
    from torchao.quantization import quantize_

    model, x = nn.Sequential(nn.Tanh(), nn.Linear(64, 32, bias=False)), leaf(8, 64, dtype=torch.float32)
    reference, scheme = pruned(model, "1"), sp.WeightSparsity(grad_weight="masked")
    mask = sp.mask24(model[1].weight.detach())
    quantize_(model, quantized_training.int8_mixed_precision_training())
    backend = sp.sparse_backend({"1": scheme}, model=model, inner="aot_eager")
    output = torch.compile(model, backend=backend)(x)
    output.sum().backward()
    (site,) = backend.report.sites
    assert (site.output, site.grad_input, site.grad_weight) == ("masked_dense", "masked_dense", "dense")
    reference(x).sum().backward()
    expected = torch.where(mask, reference[1].weight.grad, 0)
    torch.testing.assert_close(torch.as_tensor(model[1].weight.grad), expected)


class Experts(nn.Module):
    """A grouped matmul, a convolution and a table of positions: all of three dims."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.w1 = nn.Parameter(torch.randn(4, 16, 8))
        self.positions = nn.Parameter(torch.randn(1, 16, 8))
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv((x + self.positions)[0].t()).t()
        if self.how == "bmm":
            return torch.bmm(x.reshape(4, 4, 8), self.w1.transpose(-1, -2))
        ends = torch.arange(1, 5, dtype=torch.int32) * 4
        weight = self.w1 * 2 if self.how == "scaled" else self.w1
        return torch._grouped_mm(x.bfloat16(), weight.bfloat16().transpose(-1, -2), offs=ends)


@pytest.mark.parametrize("scheme", [W24, sp.ActivationSparsity()], ids=str)
@pytest.mark.parametrize("how", ["bmm", "grouped", "scaled"])
def test_experts_are_skipped_with_the_reason(how: str, scheme: Any) -> None:
    model, x = Experts(how), leaf(16, 8, dtype=torch.float32)
    reason = "the weight has shape [4, 16, 8]: 2:4 masks are defined for 2-D weights"
    reader = "" if how == "bmm" else "; it is read by aten._grouped_mm.default"
    backend = sp.sparse_backend({"re:.*": scheme}, inner="aot_eager")
    torch.compile(model, backend=backend)(x).float().sum().backward()
    (site,) = backend.report.sites
    assert (site.fqn, site.status, site.reason) == ("w1", "skipped", reason + reader)
    for name, strict in (("w1", False), ("re:.*", True)):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=re.escape(reason + reader)):
            torch.compile(model, backend=sp.sparse_backend({name: scheme}, inner="aot_eager", strict=strict))(x)


@torch.library.custom_op("sparse_pass_tests::grad_input", mutates_args=())
def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    return grad @ weight


@grad_input.register_fake
def _(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], weight.shape[1])


class ByAnotherLibrary(OwnLinear):
    """Its backward multiplies by an op that only its library knows."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad_input(grad, w), grad.t() @ x


class QuantizedByAnotherLibrary(Quantizing):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad_input(grad, quantized(w)), grad.t() @ x


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("function", [ByAnotherLibrary, QuantizedByAnotherLibrary], ids=lambda f: f.__name__)
def test_a_backward_by_an_op_of_another_library(function: Any, calls: int) -> None:
    layers = [QLinear(16, 16, function)] * calls
    model = nn.Sequential(nn.Tanh(), *layers).double()
    actual, expected, report = both(model, ("1", "2")[:calls], leaf(8, 16))
    assert_equal(actual, expected)
    # The backward of both calls has the number of the last.
    assert {site.output for site in report.sites} == {"masked_dense"}
    assert [site.grad_input for site in report.sites] == [None, "masked_dense"][-calls:]


@pytest.mark.parametrize("function", [OwnLinear, Quantizing, ByAnotherLibrary], ids=lambda f: f.__name__)
@pytest.mark.parametrize("named", ["0", "2"])
def test_a_function_called_twice_of_which_one_call_is_named(named: str, function: Any) -> None:
    """The graph does not tell which backward matmul is that of the named call."""
    model = nn.Sequential(QLinear(16, 16, function), nn.Tanh(), QLinear(16, 16, function)).double()
    model[2].weight = model[0].weight
    backend = sp.sparse_backend({f"re:{named}": W24, "*": None}, model=model, inner="aot_eager")
    x = leaf(8, 16)
    actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x])
    assert_equal(actual, run(model, dict(model.named_parameters()), [x]))
    (site,) = backend.report.sites
    assert (site.fqn, site.status) == (named, "skipped")
    assert site.reason.endswith("and the config treats its calls differently: name all of them, with one scheme")
