"""Half a scheme is never computed: where output is masked, the backward of the same call reads the masked weight too.

The reference is the model with pruned weights, whose gradient goes straight through the mask: `pruned` runs the very
same modules with S(W) in the place of W.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import Result, errors, fresh_compile, invariants_checked, mask_by_hand, relative_error, run
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sparse_pass as sp

W24 = sp.WeightSparsity()
COMPUTES = "the GEMM reads what the graph computes from the weight"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_compile():
        yield


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

    def __init__(self, n: int, k: int, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(k, n, bias=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


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
    "quantizing function": Quantizing.apply,
    "quantized in the backward only": OnlyBackward.apply,
    "quantized in the forward only": OnlyForward.apply,
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
        y = self.fc.function(x.sin() + F.embedding(index, self.fc.weight), weight)
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
    "changed", [{"grad_weight": "masked"}, {"decay": 0.5}, {"grad_weight": "masked", "decay": 0.5}], ids=str
)
@pytest.mark.parametrize("way", RECOMPUTED)
def test_gradients_of_a_weight_masked_at_its_root(way: str, changed: dict[str, Any]) -> None:
    """Masked where the graph returns it, and decay added there."""
    model, scheme = nn.Sequential(nn.Tanh(), QLinear(32, 64, RECOMPUTED[way])).double(), sp.WeightSparsity(**changed)
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
    with pytest.raises(Exception, match="'fc'.* changes grad_weight, but grad_weight: .*left as captured"):
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
