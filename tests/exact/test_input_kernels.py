"""2:4 inputs by sparse kernels: the operators, the graphs, the numbers, and which activation functions are fused.

On a CPU the kernels are the reference, for which ``backend="cusparselt"`` asks.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_printer import HOPPER, Captured, capture, device
from networks import Apply, Conv1D, Function, FusedMlp, Up, squared_relu
from support import TOLERANCE, compare_inputs, relative_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import sparse_pass as sp
from sparse_pass import vocabulary
from sparse_pass.ops.reference import inputs as reference_inputs
from sparse_pass.ops.reference import weights as reference
from sparse_pass.plan.limits import Limits

ACT = sp.ActivationSparsity(backend="cusparselt")
W24 = sp.WeightSparsity(backend="cusparselt")
MVUE = replace(W24, grad_weight="mvue")
INNERS = pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
sparse = torch.ops.sparse_pass


# Operators


BY_HAND: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "gelu": lambda x: x * (1 + torch.erf(x * 0.5**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "silu_gate": lambda x, gate: x / (1 + torch.exp(-x)) * gate,
}


def padded(matrix: Tensor) -> Tensor:
    return F.pad(matrix, (0, 0, 0, -matrix.shape[0] % 64))


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def arguments(rows: int, activation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    gated = activation in reference_inputs.GATED
    return normal(rows, 128, dtype=dtype), normal(rows, 128, dtype=dtype) if gated else None


@DTYPES
@pytest.mark.parametrize("activation", BY_HAND)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    """Rounded once."""
    assert BY_HAND.keys() == reference_inputs.ACTIVATIONS.keys()
    x, gate = arguments(70, activation, dtype)
    actual = reference_inputs.activate(x, gate, activation)
    expected = BY_HAND[activation](*(one.double() for one in (x, gate) if one is not None))
    assert actual.dtype is dtype
    torch.testing.assert_close(actual.double(), expected, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-7)


@pytest.mark.parametrize("rows", [0, 1, 64, 70])
@pytest.mark.parametrize("activation", BY_HAND)
def test_packed_both_ways(activation: str, rows: int) -> None:
    for mask, dtype in itertools.product(vocabulary.MASKS, (torch.float16, torch.bfloat16)):
        x, gate = arguments(rows, activation, dtype)
        packed, packed_t = sparse.sparsify_input(x, gate, mask, activation)
        assert (packed.dtype, packed_t.dtype) == (dtype, dtype)
        y = reference_inputs.activate(x, gate, activation)
        masked = torch.where(sparse.input_mask24(y, mask), y, 0)
        count = rows + -rows % 64
        assert packed.shape == packed_t.shape == (count * 128 * 9 // 16,)
        if rows:
            assert torch.equal(reference.unpack(packed, count, 128), padded(masked))
            assert torch.equal(reference.unpack(packed_t, 128, count), padded(masked).T)
            kept = sparse.input_mask24(padded(y), mask)
            assert torch.equal(packed, reference.pack(padded(y), kept))
            assert torch.equal(packed_t, reference.pack(padded(y).T, kept.T))


def in_other_strides(matrix: Tensor) -> list[Tensor]:
    wide = matrix.new_zeros(matrix.shape[0], 2 * matrix.shape[1])
    wide[:, ::2] = matrix
    return [matrix.T.contiguous().T, wide[:, ::2], torch.cat([matrix[:1], matrix])[1:]]


@DTYPES
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    x, gate = arguments(70, "silu_gate", dtype)
    grad, weight = normal(70, 48, dtype=dtype), normal(48, 128, dtype=dtype)
    packed = sparse.sparsify_input(x, gate, "optimal", "silu_gate")
    output = sparse.input_linear(packed[0], weight, 70)
    grad_weight = sparse.input_grad_weight(packed[1], grad, 128)
    for same in zip(*map(in_other_strides, (x, gate, weight, grad)), strict=True):
        again = sparse.sparsify_input(*same[:2], "optimal", "silu_gate")
        assert all(torch.equal(a, b) for a, b in zip(again, packed, strict=True))
        torch.testing.assert_close(sparse.input_linear(packed[0], same[2], 70), output)
        torch.testing.assert_close(sparse.input_grad_weight(packed[1], same[3], 128), grad_weight)


@DTYPES
@pytest.mark.parametrize("n", [48, 5])
@pytest.mark.parametrize("rows", [0, 1, 64, 70])
def test_products_are_the_dense_ones(rows: int, n: int, dtype: torch.dtype) -> None:
    x, weight, grad = normal(rows, 128, dtype=dtype), normal(n, 128, dtype=dtype), normal(rows, n, dtype=dtype)
    masked = torch.where(sparse.input_mask24(x, "optimal"), x, 0)
    packed, packed_t = sparse.sparsify_input(x, None, "optimal", "none")
    output, grad_weight = sparse.input_linear(packed, weight, rows), sparse.input_grad_weight(packed_t, grad, 128)
    assert output.is_contiguous()
    assert grad_weight.is_contiguous()
    torch.testing.assert_close(output, masked @ weight.T)
    torch.testing.assert_close(grad_weight, grad.T @ masked)


@DTYPES
@pytest.mark.parametrize("rows", [0, 1, 64, 70])
def test_opcheck(rows: int, dtype: torch.dtype) -> None:
    for activation in ("none", "silu_gate"):
        x, gate = arguments(rows, activation, dtype)
        torch.library.opcheck(sparse.sparsify_input.default, (x, gate, "optimal", activation))
    packed, packed_t = sparse.sparsify_input(x.T.contiguous().T, None, "greedy", "relu")
    torch.library.opcheck(sparse.input_linear.default, (packed, normal(48, 128, dtype=dtype), rows))
    torch.library.opcheck(sparse.input_grad_weight.default, (packed_t, normal(5, rows, dtype=dtype).T, 128))


def test_compiles_with_a_dynamic_batch() -> None:
    def step(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        packed, packed_t = sparse.sparsify_input(x * 2, None, "optimal", "gelu")
        return sparse.input_linear(packed, weight, x.shape[0]) + 1, sparse.input_grad_weight(packed_t, grad, 64)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for rows in (20, 3, 100):
        inputs = normal(rows, 64), normal(48, 64), normal(rows, 48)
        for actual, expected in zip(compiled(*inputs), step(*inputs), strict=True):
            torch.testing.assert_close(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("op", ["sparsify_input", "input_linear", "input_grad_weight"])
def test_backward_through_an_op_is_refused(op: str) -> None:
    x = normal(64, 64).requires_grad_()
    packed = sparse.sparsify_input(x.detach(), None, "optimal", "none")[0]
    given = {
        "sparsify_input": (x, None, "optimal", "none"),
        "input_linear": (packed, x, 64),
        "input_grad_weight": (packed, x, 64),
    }
    result = getattr(sparse, op)(*given[op])
    with pytest.raises(NotImplementedError, match="sparse_backend"):
        (result[0] if op == "sparsify_input" else result).sum().backward()


PACKED = torch.zeros(36 * 64).bfloat16()  # of [64, 64]
X = torch.zeros(64, 64).bfloat16()


@pytest.mark.parametrize(
    ("op", "given", "parts"),
    [
        ("sparsify_input", (X, None, "rowwise", "none"), ["'rowwise'", "both ways", "optimal, greedy"]),
        ("sparsify_input", (X, None, "optimal", "tanh"), ["'tanh'", "none, relu, squared_relu, gelu"]),
        ("sparsify_input", (X, X, "optimal", "relu"), ["'relu'", "no gate"]),
        ("sparsify_input", (X, None, "optimal", "silu_gate"), ["'silu_gate'", "needs a gate"]),
        ("sparsify_input", (X.float(), None, "optimal", "none"), ["input", "torch.float32", "input_mask24"]),
        ("sparsify_input", (X[:, :32], None, "optimal", "none"), ["[64, 32]", "multiple of 64", "input_mask24"]),
        ("sparsify_input", (X[:, :0], None, "optimal", "none"), ["[64, 0]", "multiple of 64"]),
        ("sparsify_input", (X[0], None, "optimal", "none"), ["[64]", "[M, K]"]),
        ("sparsify_input", (X, X[:32], "optimal", "silu_gate"), ["gate", "[32, 64]", "not torch.bfloat16 [64, 64]"]),
        ("sparsify_input", (X, X.half(), "optimal", "silu_gate"), ["gate", "torch.float16", "not torch.bfloat16"]),
        ("input_linear", (PACKED, X, 65), ["[2304]", "[64, 64]", "[65, 64]", "sparsify_input"]),
        ("input_linear", (PACKED, X[0], 64), ["weight [64]", "sparsify_input"]),
        ("input_linear", (PACKED.view(36, 64), X, 64), ["packed [36, 64]", "sparsify_input"]),
        ("input_linear", (PACKED, X[:, :32], 128), ["weight [64, 32]", "sparsify_input"]),
        ("input_linear", (PACKED, X.float(), 64), ["torch.bfloat16", "weight torch.float32", "convert"]),
        ("input_linear", (PACKED.float(), X.float(), 64), ["packed is torch.float32", "convert"]),
        ("input_grad_weight", (PACKED, X[:, 0], 64), ["grad_output [64]", "sparsify_input"]),
        ("input_grad_weight", (PACKED, X, 128), ["[2304]", "[128, 64]", "sparsify_input"]),
        ("input_grad_weight", (PACKED, X.repeat(2, 1), 32), ["[32, 128]", "sparsify_input"]),
        ("input_grad_weight", (PACKED, X.half(), 64), ["torch.bfloat16", "grad_output torch.float16", "convert"]),
    ],
)
def test_errors(op: str, given: tuple[Any, ...], parts: list[str]) -> None:
    """They name the value and the remedy; the same when traced."""
    call, any_of = getattr(sparse, op), "mask=|activation=|input|gate|packed"
    with pytest.raises(ValueError, match=any_of) as error:
        call(*given)
    assert all(part in str(error.value) for part in parts), error.value
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=any_of):
        call(*(mode.from_tensor(one) if isinstance(one, Tensor) else one for one in given))


# Models


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


class Attention(nn.Module):
    """Three linears of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        return self.q(x).sin() * self.k(x).cos() + self.v(x)


def rounded_once(name: str) -> Callable[[nn.Module], nn.Module]:
    """A copy that rounds its function as the kernel does: where ops round between, masks may differ."""

    def copied(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model)
        model.rounded_once = name
        return model

    return copied


def compare(model: nn.Module, config: Mapping[str, Any], *batches: Tensor, **options: Any) -> sp.Report:
    options = {"kernel": "reference", "tolerance": TOLERANCE[torch.bfloat16], **options}
    return compare_inputs(model, config, *batches, **options)


def captured(model: nn.Module, x: Tensor, config: Mapping[str, Any], **device: Any) -> Captured:
    """With Inductor's decompositions."""
    found = capture(model.to(x.dtype), [x], config, **device)
    found.check_invariants()
    return found


# Numbers


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", [(70, 64), (2, 35, 64)], ids=str)
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    (site,) = compare(Up(bias).bfloat16(), {"up": ACT}, leaf(*shape)).sites
    assert (site.status, site.reason) == ("sparse", "")
    assert (site.output, site.grad_input, site.grad_weight, site.fused) == ("reference", "dense", "reference", None)


@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (64, 64), (2, 2, 3, 64)], ids=str)
def test_rows(shape: tuple[int, ...]) -> None:
    compare(Up(bias=True).bfloat16(), {"up": ACT}, leaf(*shape))


@pytest.mark.parametrize("scheme", [ACT, replace(ACT, mask="greedy"), replace(ACT, grad_input="masked")], ids=str)
def test_schemes(scheme: sp.ActivationSparsity) -> None:
    compare(Up(bias=True).half(), {"up": scheme}, leaf(70, 64, dtype=torch.float16))


PAIRS = [
    (W24, ACT),
    (replace(W24, grad_weight="masked", decay=0.3), replace(ACT, grad_input="masked")),
    (MVUE, ACT),
    (replace(MVUE, decay=0.3), replace(ACT, mask="greedy")),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " + ".join(map(str, pair)))
def test_pair(pair: Any) -> None:
    (site,) = compare(Up(bias=True).bfloat16(), {"up": pair}, leaf(2, 35, 64)).sites
    assert (site.status, site.reason) == ("sparse", "")
    assert (site.output, site.grad_input, site.grad_weight) == ("reference", "reference", "reference")


@INNERS
def test_autocast_and_dynamic_batch(inner: str) -> None:
    batches = [leaf(rows, 64, dtype=torch.float32) for rows in (6, 70, 64)]
    compare(
        nn.Sequential(nn.Linear(64, 128)), {"0": ACT}, *batches, inner=inner, dynamic="batch",
        context=lambda: torch.autocast("cpu", torch.bfloat16),
    )  # fmt: skip


def test_dynamic_rank_3() -> None:
    compare(Up(bias=True).bfloat16(), {"up": ACT}, leaf(2, 5, 64), leaf(3, 70, 64), dynamic=True)


@INNERS
def test_fused_with_a_dynamic_batch(inner: str) -> None:
    report = compare(
        FusedMlp(squared_relu).bfloat16(), {"down": ACT}, leaf(6, 64), leaf(70, 64), inner=inner, dynamic="batch"
    )
    assert report.sites[0].fused == "squared_relu"


def test_checkpointed() -> None:
    compare(Up(bias=True, checkpointed=True).bfloat16(), {"up": ACT}, leaf(70, 64))


def test_conv1d() -> None:
    """grad_weight is the transpose of what the kernel gives."""
    model = nn.Sequential(nn.Tanh(), Conv1D(64, 128), nn.Tanh()).bfloat16()
    for scheme in (ACT, (ACT, W24)):
        found = captured(model, leaf(2, 35, 64), {"1": scheme})
        assert "sparse_pass.input_grad_weight(" in found.text
    compare(model, {"1": ACT}, leaf(2, 35, 64))


def test_shared_input() -> None:
    """Packed once."""
    config = dict.fromkeys("qkv", ACT)
    assert captured(Attention(), leaf(70, 64), config).text.count("sparse_pass.sparsify_input(") == 1
    compare(Attention().bfloat16(), config, leaf(2, 35, 64))


def test_shared_weight() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 64, bias=False)).bfloat16()
    model[2].weight = model[0].weight
    compare(model, {"0": ACT, "2": ACT}, leaf(70, 64))


def test_frozen_weight() -> None:
    """There is no grad_weight, and packed_t is not kept."""
    model = Up(bias=True).bfloat16()
    model.up.weight.requires_grad_(False)
    (site,) = compare(model, {"up": ACT}, leaf(70, 64)).sites
    assert (site.output, site.grad_input, site.grad_weight) == ("reference", "dense", None)
    assert "input_grad_weight" not in captured(model, leaf(70, 64), {"up": ACT}).text


def test_input_without_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(64, 128)).bfloat16()
    (site,) = compare(model, {"0": ACT}, torch.randn(70, 64).bfloat16()).sites
    assert (site.output, site.grad_input, site.grad_weight) == ("reference", None, "reference")


def test_mask_of_a_gradient_that_is_not_there() -> None:
    """Nothing of it is left, neither the mask nor what brings it to the memory order of the input."""
    columns = torch.randn(64, 70).bfloat16().t()
    found = captured(nn.Sequential(nn.Linear(64, 128)), columns, {"0": replace(ACT, grad_input="masked")})
    assert "input_mask24" not in found.text


def test_inference() -> None:
    with torch.no_grad():
        (site,) = compare(
            Up(bias=True).bfloat16(), {"up": ACT}, torch.randn(2, 35, 64).bfloat16(), backward=False
        ).sites
    assert (site.output, site.grad_input, site.grad_weight) == ("reference", None, None)


# Fusion


FUSED: dict[str, tuple[str, Function]] = {
    "relu(h).square()": ("squared_relu", squared_relu),
    "relu(h) ** 2": ("squared_relu", lambda h, _: F.relu(h) ** 2),
    "relu(h) * relu(h)": ("squared_relu", lambda h, _: F.relu(h) * F.relu(h)),
    "gelu(h)": ("gelu", lambda h, _: F.gelu(h)),
    "gelu(h), tanh": ("gelu_tanh", lambda h, _: F.gelu(h, approximate="tanh")),
    "silu(h) * gate": ("silu_gate", lambda h, gate: F.silu(h) * gate),
    "gate * silu(h)": ("silu_gate", lambda h, gate: gate * F.silu(h)),
}


@pytest.mark.parametrize("way", FUSED)
def test_fused(way: str) -> None:
    """Also of a tuple, and of the two halves of one linear."""
    name, function = FUSED[way]
    for gate, scheme in [("linear", ACT), ("chunk", (W24, ACT))] if "gate" in way else [("none", (W24, ACT))]:
        model, x = FusedMlp(function, gate).bfloat16(), leaf(2, 35, 64)
        found = captured(model, x, {"down": scheme})
        assert [site.fused for site in found.report.sites] == [name], found.text
        assert found.text.count("sparse_pass.sparsify_input(") == 1
        report = compare(model, {"down": ACT}, x, copied=rounded_once(name))
        assert [site.fused for site in report.sites] == [name]
        assert f"reference of {name}" in str(report)


@pytest.mark.parametrize("way", ["relu(h).square()", "gelu(h)", "gate * silu(h)"])
def test_fused_through_inductor(way: str) -> None:
    name, function = FUSED[way]
    model = FusedMlp(function, "chunk" if "gate" in way else "none").bfloat16()
    report = compare(model, {"down": ACT}, leaf(70, 64), inner="inductor", copied=rounded_once(name))
    assert report.sites[0].fused == name


def test_fused_with_the_features_of_several_rows() -> None:
    """A view between the function and the linear, as of heads."""
    for size in ((-1, 128), (5, -1, 128)):
        model = nn.Sequential(nn.Linear(64, 64), _Apply(lambda h, s=size: F.relu(h).square().view(s)))
        model = nn.Sequential(model, nn.Linear(128, 48, bias=False)).bfloat16()
        for x in (leaf(140, 64), leaf(10, 14, 64)):
            assert compare(model, {"1": ACT}, x).sites[0].fused == "squared_relu"


class _Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_fused_where_nothing_is_trained() -> None:
    """Without a grad_weight nothing else reads the input, and without a backward nothing reads a relu."""
    model, x = FusedMlp(squared_relu).bfloat16(), leaf(70, 64)
    model.down.weight.requires_grad_(False)
    (site,) = captured(model, x, {"down": ACT}).report.sites
    assert (site.fused, site.grad_weight) == ("squared_relu", None)
    with torch.no_grad():
        report = compare(FusedMlp(lambda h, _: F.relu(h)).bfloat16(), {"down": ACT}, x.detach(), backward=False)
        assert report.sites[0].fused == "relu"
        # No gradient, no mask of it that would read the result.
        masked = {"down": replace(ACT, grad_input="masked")}
        assert (
            compare(FusedMlp(squared_relu).bfloat16(), masked, x.detach(), backward=False).sites[0].fused
            == "squared_relu"
        )


class Reading(FusedMlp):
    """The function's result has a second reader."""

    def __init__(self, returned: bool) -> None:
        super().__init__(squared_relu)
        self.returned = returned

    def forward(self, x: Tensor) -> Any:
        y = self.function(self.up(x), x)
        return (self.down(y).sin(), y) if self.returned else self.down(y).sin() * y[:, :1].cos()


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        (Reading(returned=True), ACT),
        (Reading(returned=False), ACT),
        (FusedMlp(lambda h, _: F.relu(h)), ACT),  # whose backward reads its result
        (FusedMlp(lambda h, _: h.sigmoid()), ACT),
        (FusedMlp(lambda h, _: F.silu(h) * 2.0), ACT),
        (FusedMlp(lambda h, gate: F.silu(h) * gate[:1], "linear"), ACT),
        (FusedMlp(lambda h, gate: F.silu(h[:1]) * gate, "linear"), ACT),
        (FusedMlp(lambda h, gate: F.silu(h) * gate[:, :1], "linear"), ACT),
        (FusedMlp(lambda h, _: F.relu(h.float()).square().bfloat16()), ACT),
        (FusedMlp(squared_relu), replace(ACT, grad_input="masked")),
        (FusedMlp(squared_relu), (MVUE, ACT)),  # grad_weight reads it dense
    ],
    ids=[
        "returned", "read", "relu", "sigmoid", "number for a gate", "gate broadcast",
        "source broadcast", "gate of one column", "float32",
        "masked gradient", "mvue",
    ],
)  # fmt: skip
def test_not_fused(model: nn.Module, scheme: Any) -> None:
    """And the numbers are the same."""
    model, x = copy.deepcopy(model).bfloat16(), leaf(70, 64)
    assert [site.fused for site in captured(model, x, {"down": scheme}).report.sites] == [None]
    report = compare(model, {"down": scheme}, x)
    assert [(site.fused, site.output) for site in report.sites] == [(None, "reference")]
    assert "reference of" not in str(report)


def test_not_fused_where_its_result_is_read_and_viewed() -> None:
    (site,) = captured(Reading(returned=True), leaf(2, 35, 64), {"down": ACT}).report.sites
    assert (site.output, site.fused) == ("reference", None)


def test_not_fused_where_two_linears_read_it() -> None:
    class Two(FusedMlp):
        def __init__(self) -> None:
            super().__init__(squared_relu)
            self.other = nn.Linear(128, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.function(self.up(x), x)
            return self.down(y).sin() + self.other(y)

    for config in ({"down": ACT}, {"down": ACT, "other": ACT}):
        found = captured(Two(), leaf(70, 64), config)
        assert [site.fused for site in found.report.sites] == [None] * len(config)
        assert found.text.count("sparse_pass.sparsify_input(") == 1
        compare(Two().bfloat16(), config, leaf(70, 64))


# Reasons


AUTO = sp.ActivationSparsity()


@pytest.mark.parametrize(
    ("scheme", "limits", "reason"),
    [
        (AUTO, HOPPER, ""),
        (ACT, Limits(device="cpu"), ""),
        (AUTO, Limits(device="cpu"), "no 2:4 kernels on cpu"),
        (ACT, Limits(device="mps"), "no 2:4 kernels on mps"),
        (
            AUTO, Limits(device="cuda", capability=(7, 5)),
            "SM75 has no sparse tensor cores: compute capability 8.0 (A100) or newer is needed",
        ),
        (AUTO, replace(HOPPER, unavailable="no library"), "no library"),
        (replace(AUTO, backend="masked_dense"), HOPPER, "backend='masked_dense' was asked for"),
        (
            replace(AUTO, mask="rowwise"), HOPPER,
            "masks of single rows have no kernels, as grad_weight could not use them; "
            "grad_weight: a rowwise mask is not 2:4 along M, over which it contracts",
        ),
    ],
)  # fmt: skip
def test_devices(scheme: Any, limits: Limits, reason: str) -> None:
    """What is computed does not depend on the device."""
    found = captured(Up(bias=True), leaf(8, 64), {"up": scheme}, limits=device(limits))
    (site,) = found.report.sites
    kernel = "masked_dense" if reason else "cusparselt" if limits is HOPPER else "reference"
    assert (site.reason, site.output, site.grad_weight) == (reason, kernel, kernel)
    assert found.text.count("sparse_pass.input_mask24(") == (kernel == "masked_dense")


WAYS = {
    "bmm": (
        lambda x, w: torch.bmm(x, w.T.expand(2, 64, 128)), (128, 64), (2, 11, 64),
        "the graph has it as aten.bmm.default, which has no sparse kernel",
    ),
    "weight left": (lambda x, w: w @ x, (128, 64), (64, 11), "the weight is the left operand of the matmul"),
    "scaled": (
        lambda x, w: torch.addmm(x[:, :1], x, w.T, beta=0.5, alpha=2), (128, 64), (11, 64),
        "addmm with {'beta': 0.5, 'alpha': 2} has no sparse kernel",
    ),
    "float32": (
        lambda x, w: F.linear(x.float(), w.float()).bfloat16(), (128, 64), (11, 64),
        "float32 has no 2:4 kernels, only float16 and bfloat16",
    ),
    "K": (
        lambda x, w: x @ w.T, (128, 48), (11, 48),
        "K and N are 48 and 128: a 2:4 input needs multiples of 64 and 16",
    ),
    "N": (
        lambda x, w: x @ w.T, (72, 64), (11, 64), "K and N are 64 and 72: a 2:4 input needs multiples of 64 and 16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_reasons(way: str) -> None:
    multiply, shape, size, reason = WAYS[way]
    found = captured(Apply(multiply, *shape), leaf(*size), {"w": ACT})
    (site,) = found.report.sites
    assert (site.status, site.output, site.grad_weight) == ("masked_dense", "masked_dense", "masked_dense")
    assert site.reason == reason


def test_exported_program() -> None:
    """Where the graph has the linear as one op, with the weight as it is stored."""
    model = nn.Sequential(nn.GELU(), nn.Linear(64, 48)).bfloat16()
    x = normal(2, 35, 64)
    module = torch.export.export(model, (x,)).module()
    (site,) = sp.rewrite(module, {"1": ACT}).sites
    assert (site.status, site.output, site.fused) == ("sparse", "reference", "gelu")
    assert not any(node.target is torch.ops.aten.linear.default for node in module.graph.nodes)
    hidden = F.gelu(x)
    expected = model[1](torch.where(sparse.input_mask24(hidden, "optimal"), hidden, 0))
    assert relative_error(module(x), expected) < TOLERANCE[torch.bfloat16]
