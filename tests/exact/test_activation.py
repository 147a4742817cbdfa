"""`ActivationSparsity`: masks of inputs, and exactness against eager models whose linears are given masked inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_printer import capture, printed
from networks import Conv1D, OwnLinear, Up
from support import (
    TOLERANCE,
    compare_inputs,
    errors,
    fresh_compile,
    hook_inputs,
    invariants_checked,
    mask_by_hand,
    masked_input,
    relative_error,
    run,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import sparse_pass as sp
from sparse_pass.fqn import parse_config
from sparse_pass.one_graph import rewrite_graph
from sparse_pass.ops.reference import inputs as reference_inputs

ACT = sp.ActivationSparsity()
MASKED = sp.ActivationSparsity(grad_input="masked")
ROWWISE = sp.ActivationSparsity(mask="rowwise")
SCHEMES = [ACT, MASKED, ROWWISE, sp.ActivationSparsity(mask="greedy"), replace(ROWWISE, grad_input="masked")]
INNERS = pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
INF, NAN = float("inf"), float("nan")
ops = torch.ops.sparse_pass


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


# Masks


@pytest.mark.parametrize("mask", ["optimal", "greedy", "rowwise"])
@pytest.mark.parametrize("shape", [(8, 12), (7, 8), (1, 4), (12,), (2, 3, 8), (2, 1, 5, 4), (0, 8), (2, 0, 8)], ids=str)
def test_masks(shape: tuple[int, ...], mask: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(shape).to(dtype)
        kept = ops.input_mask24(x, mask)
        assert kept.is_contiguous()
        assert torch.equal(kept, mask_by_hand(x, mask))
        assert (kept.reshape(-1, 4).sum(1) <= 2).all()


def test_ties_and_what_is_not_finite() -> None:
    x = torch.tensor([[1.0, -1, 1, 1], [0, 0, 0, 0], [1, NAN, 2, -INF], [3, 4, -4, 3]])
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 1, 0]]
    assert ops.input_mask24(x, "rowwise").int().tolist() == expected


def test_rows_are_independent_if_rowwise_and_only_then() -> None:
    """Another last token changes nothing of the first ones, or it would be known to them."""
    x = torch.randn(16, 64)
    changed = torch.cat([x[:-1], 10 * torch.randn(1, 64)])
    for mask in ("rowwise", "optimal"):
        before, after = (ops.input_mask24(one, mask)[:-1] for one in (x, changed))
        assert torch.equal(before, after) == (mask == "rowwise")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    for x in (torch.randn(7, 8), torch.randn(8, 7).T, torch.randn(2, 3, 8), torch.randn(0, 8), torch.randn(8)):
        for mask in ("optimal", "greedy", "rowwise"):
            torch.library.opcheck(ops.input_mask24.default, (x.to(dtype), mask))


@pytest.mark.parametrize(
    ("x", "mask", "parts"),
    [
        (torch.zeros(4, 4), "best", ["'best'", "optimal, greedy, rowwise"]),
        (torch.zeros(4, 6), "optimal", ["[4, 6]", "multiple of 4"]),
        (torch.tensor(1.0), "rowwise", ["[]", "[..., K]"]),
        (torch.zeros(4, 4, dtype=torch.int8), "optimal", ["torch.int8", "float32"]),
    ],
)
def test_op_errors(x: Tensor, mask: str, parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"mask|input") as error:
        ops.input_mask24(x, mask)
    assert all(part in str(error.value) for part in parts), error.value
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=r"mask|input"):
        ops.input_mask24(mode.from_tensor(x), mask)


# The scheme


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("mask", "best", "expected one of 'optimal', 'greedy', 'rowwise'"),
        ("grad_input", "sparse", "expected one of 'dense', 'masked'"),
        ("backend", None, "expected one of 'auto', 'cusparselt', 'masked_dense'"),
    ],
)
def test_bad_field(field: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"ActivationSparsity\({field}={value!r}\): {expected}"):
        sp.ActivationSparsity(**{field: value})


def test_is_a_frozen_value() -> None:
    assert sp.ActivationSparsity() == ACT
    assert [str(scheme) for scheme in SCHEMES[:3]] == ["act24", "act24(grad_input=masked)", "act24(mask=rowwise)"]
    with pytest.raises(FrozenInstanceError):
        ACT.mask = "greedy"  # type: ignore[misc]


def test_uuid_knows_every_field() -> None:
    """Of a scheme alone and in a tuple."""
    other = {"mask": "rowwise", "grad_input": "masked", "backend": "masked_dense"}
    assert set(other) == {field.name for field in fields(ACT)}
    schemes = [ACT, *(replace(ACT, **{name: value}) for name, value in other.items())]
    configs = [*schemes, *((sp.WeightSparsity(), scheme) for scheme in schemes), sp.WeightSparsity()]
    assert len({sp.SparsePass({"0": scheme}).uuid() for scheme in configs}) == len(configs)


class Mlp(nn.Module):
    def __init__(self, dim: int = 8, hidden: int = 12, bias: bool = True, checkpointed: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden, bias), nn.Linear(hidden, dim, bias)
        self.checkpointed = checkpointed

    def body(self, x: Tensor) -> Tensor:
        return self.down(self.up(x.cos()).relu().square()).sin()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)


class Attention(nn.Module):
    """Three linears of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        heads = [layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)).sin()


def both(scheme: Any) -> dict[str, Any]:
    return {"up": scheme, "down": scheme}


# Exactness


@INNERS
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_mlp(scheme: sp.ActivationSparsity, inner: str) -> None:
    report = compare_inputs(Mlp(), both(scheme), leaf(2, 5, 8), inner=inner)
    assert {(site.status, site.grad_input, site.grad_weight) for site in report.sites} == {
        ("masked_dense", "dense", "masked_dense")
    }


SHAPES = [(8,), (6, 8), (1, 8), (2, 3, 8), (2, 1, 3, 8), (2, 2, 1, 3, 8), (0, 8), (2, 0, 8)]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rank(shape: tuple[int, ...], bias: bool) -> None:
    compare_inputs(Mlp(bias=bias), both(MASKED), leaf(*shape))


@pytest.mark.parametrize(("shape", "bias"), [((8,), True), ((1, 8), False)], ids=str)
def test_one_row_through_inductor(shape: tuple[int, ...], bias: bool) -> None:
    """Where a matmul of one row is a product and a sum."""
    compare_inputs(Mlp(bias=bias), both(MASKED), leaf(*shape), inner="inductor")


@INNERS
@pytest.mark.parametrize("scheme", [ACT, MASKED], ids=str)
def test_attention(scheme: sp.ActivationSparsity, inner: str) -> None:
    compare_inputs(Attention(), dict.fromkeys(["q", "k", "v", "out"], scheme), leaf(2, 5, 16), inner=inner)


@INNERS
def test_conv1d(inner: str) -> None:
    model = nn.Sequential(nn.Tanh(), Conv1D(8, 12), nn.Tanh(), Conv1D(12, 8))
    compare_inputs(model, {"1": MASKED, "3": ACT}, leaf(2, 5, 8), inner=inner)


@INNERS
@pytest.mark.parametrize("scheme", [ACT, MASKED], ids=str)
def test_autocast_and_dynamic_batch(scheme: sp.ActivationSparsity, inner: str) -> None:
    """The mask is chosen on what the matmul reads, which is bfloat16."""
    compare_inputs(
        Mlp(16, 32), both(scheme), leaf(3, 16), leaf(5, 16), leaf(8, 16), inner=inner, dynamic="batch",
        context=lambda: torch.autocast("cpu", torch.bfloat16), tolerance=TOLERANCE[torch.bfloat16],
    )  # fmt: skip


@INNERS
def test_dynamic_rank_3(inner: str) -> None:
    compare_inputs(Mlp(), both(MASKED), leaf(2, 5, 8), leaf(3, 7, 8), inner=inner, dynamic=True)


HALVES = {"gated": lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1].sin(), "every second": lambda x: x[..., ::2]}


class Half(nn.Module):
    """A linear of half of the features."""

    def __init__(self, half: str, dim: int = 8) -> None:
        super().__init__()
        self.half, self.fc = HALVES[half], nn.Linear(dim, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.half(x)).sin()


@INNERS
@pytest.mark.parametrize("half", HALVES)
def test_features_of_dynamic_sizes(half: str, inner: str) -> None:
    """In the graph their number is no int, and may be an expression; the weight knows it."""
    compare_inputs(Half(half), {"fc": ACT}, leaf(5, 16), leaf(7, 16), inner=inner, dynamic=True)
    compare_inputs(Half(half), {"fc": MASKED}, leaf(2, 5, 16), leaf(3, 7, 16), inner=inner, dynamic=True)
    packed = sp.ActivationSparsity(backend="cusparselt")
    x, y = (torch.randn(rows, 128).bfloat16().requires_grad_() for rows in (5, 7))
    compare_inputs(
        Half(half, 64).bfloat16(), {"fc": packed}, x, y, inner=inner, dynamic=True,
        kernel="reference", tolerance=TOLERANCE[torch.bfloat16],
    )  # fmt: skip


@INNERS
@pytest.mark.parametrize("scheme", [ACT, MASKED], ids=str)
def test_checkpointed(scheme: sp.ActivationSparsity, inner: str) -> None:
    compare_inputs(Mlp(checkpointed=True), both(scheme), leaf(6, 8), inner=inner)


def test_tied() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[3].weight = model[1].weight
    compare_inputs(model, {"1": MASKED, "3": ACT}, leaf(5, 8))


def test_frozen_and_inference() -> None:
    model = Mlp()
    model.up.weight.requires_grad_(False)
    report = compare_inputs(model, both(ACT), leaf(5, 8))
    assert [site.grad_weight for site in report.sites] == [None, "masked_dense"]
    with torch.no_grad():
        report = compare_inputs(Mlp(), both(MASKED), torch.randn(5, 8), backward=False)
    assert {(site.grad_input, site.grad_weight) for site in report.sites} == {(None, None)}


def test_input_without_a_gradient() -> None:
    model = nn.Sequential(nn.Linear(8, 12))
    report = compare_inputs(model, {"0": MASKED}, torch.randn(5, 8))
    assert report.sites[0].grad_input is None


def strided(kind: str) -> Tensor:
    made = {
        "transposed": torch.randn(6, 5, 8).transpose(0, 1),
        "features outermost": torch.randn(8, 6).t(),
        "every second": torch.randn(6, 16)[:, ::2],
        "expanded rows": torch.randn(1, 8).expand(6, 8),
        "offset": torch.randn(100)[4:52].view(6, 8),
    }
    return made[kind].requires_grad_()


@pytest.mark.parametrize("kind", ["transposed", "features outermost", "every second", "expanded rows", "offset"])
def test_strides(kind: str) -> None:
    compare_inputs(
        nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)), {"0": MASKED, "2": MASKED}, strided(kind)
    )


def test_gradient_of_a_row_stored_as_a_column() -> None:
    """Its gradient has the strides of a column, and once it is masked of a row: for what reads it they are the same."""
    column = torch.randn(8, 1).t().requires_grad_()
    compare_inputs(
        nn.Sequential(nn.Linear(8, 12)), {"0": MASKED}, column,
        context=lambda: torch.autocast("cpu", torch.bfloat16), tolerance=TOLERANCE[torch.bfloat16],
    )  # fmt: skip


@INNERS
@pytest.mark.parametrize("columns", [False, True], ids=["stored by rows", "stored by columns"])
def test_input_changed_in_place(columns: bool, inner: str) -> None:
    """A vector is a view of the row that a matmul gives: forward and backward each make views of what it became."""
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.ReLU(inplace=True), nn.Linear(12, 8, bias=False))
    if columns:
        model[2].weight = nn.Parameter(model[2].weight.detach().T.contiguous().T)
    report = compare_inputs(model, {"0": ACT, "2": ACT}, leaf(8), inner=inner)
    assert {site.grad_weight for site in report.sites} == {"masked_dense"}


@pytest.mark.parametrize("scheme", [MASKED, (sp.WeightSparsity(), MASKED)], ids=["input", "pair"])
def test_gradient_of_a_square_input(scheme: Any) -> None:
    """Of an input stored column by column the matmul gives the transposed gradient, and its shape is the same."""
    for x in (torch.randn(8, 8), torch.randn(8, 8).t()):
        with fresh_compile():
            compare_inputs(nn.Sequential(nn.Linear(8, 12)), {"0": scheme}, x.requires_grad_())


def test_gradient_of_an_input_of_symbolic_strides() -> None:
    """What reads the masked gradient was captured with the strides that it had."""

    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.down.weight @ F.silu((self.up.weight @ x.mT).mT).mT).mT

    backend = sp.sparse_backend({"down.weight": MASKED}, inner="aot_eager")
    with invariants_checked():
        torch.compile(Left(), backend=backend, dynamic=True)(torch.randn(5, 8)).sum().backward()
    assert backend.report.sites[0].status == "masked_dense"


class By(nn.Module):
    """A GEMM written by hand, whose input may be masked, which makes it the reference."""

    def __init__(self, multiply: Callable[..., Tensor], shape: tuple[int, ...], k_last: bool) -> None:
        super().__init__()
        self.multiply, self.k_last = multiply, k_last
        self.w, self.b = nn.Parameter(torch.randn(shape) / 3), nn.Parameter(torch.randn(12))
        self.scheme: sp.ActivationSparsity | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x.cos()
        if self.scheme is not None:
            x = masked_input(x, self.scheme) if self.k_last else masked_input(x.mT, self.scheme).mT
        return self.multiply(x, self.w, self.b).sin()


WAYS = {
    "x @ w.T": (lambda x, w, b: x @ w.T, (12, 8), (5, 8), True),
    "x @ w, rank 4": (lambda x, w, b: x @ w + b, (8, 12), (2, 3, 5, 8), True),
    "w @ x": (lambda x, w, b: w @ x, (12, 8), (8, 5), False),
    "w.T @ x": (lambda x, w, b: w.T @ x, (8, 12), (8, 5), False),
    "w @ vector": (lambda x, w, b: w @ x + b, (12, 8), (8,), True),
    "vector @ w": (lambda x, w, b: x @ w, (8, 12), (8,), True),
    "mv": (lambda x, w, b: torch.mv(w, x), (12, 8), (8,), True),
    "addmv": (lambda x, w, b: torch.addmv(b, w, x, beta=2, alpha=3), (12, 8), (8,), True),
    "addmm, scaled": (lambda x, w, b: torch.addmm(b, x, w.T, beta=0.5, alpha=2), (12, 8), (5, 8), True),
    "addmm, weight left": (lambda x, w, b: torch.addmm(b[:, None], w, x, alpha=2), (12, 8), (8, 5), False),
    "einsum": (lambda x, w, b: torch.einsum("bnk,ok->bno", x, w), (12, 8), (2, 5, 8), True),
    "first rows": (lambda x, w, b: F.linear(x, w[:3], b[:3]), (12, 8), (5, 8), True),
    "cast": (lambda x, w, b: F.linear(x.double(), w.double()).float(), (12, 8), (5, 8), True),
    "bmm, expanded": (lambda x, w, b: torch.bmm(x, w.T.expand(2, 8, 12)), (12, 8), (2, 5, 8), True),
    "baddbmm, expanded": (
        lambda x, w, b: torch.baddbmm(b, x, w.T.expand(2, 8, 12), beta=2, alpha=0.5), (12, 8), (2, 5, 8), True
    ),
    "mv as product and sum": (lambda x, w, b: (w * x).sum(1), (12, 8), (8,), True),
    "product and sum": (lambda x, w, b: (x.T * w.T).sum(0, keepdim=True), (12, 8), (1, 8), True),
}  # fmt: skip


@pytest.mark.parametrize("scheme", [ACT, MASKED], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_way(way: str, scheme: sp.ActivationSparsity) -> None:
    multiply, weight, size, k_last = WAYS[way]
    model, x = By(multiply, weight, k_last), leaf(*size)
    expected_from = copy.deepcopy(model)
    expected_from.scheme = scheme
    backend = sp.sparse_backend({"w": scheme}, model=model, inner="aot_eager")
    with invariants_checked():
        actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x])
    expected = run(expected_from, dict(expected_from.named_parameters()), [x])
    found = errors(actual, expected)
    assert max(found.values()) < TOLERANCE[torch.float32], f"{found}\n{backend.report}"
    dense = errors(run(model, dict(model.named_parameters()), [x]), expected)
    assert dense["output 0"] > 0.01
    assert dense["gradient of w"] > 0.01
    (site,) = backend.report.sites
    assert (site.output, site.grad_weight) == ("masked_dense", "masked_dense")


# Together with 2:4 weights


PAIRS = [
    (sp.WeightSparsity(), ACT),
    (MASKED, sp.WeightSparsity(mask="greedy")),
    (sp.WeightSparsity(grad_weight="masked", decay=0.3), ROWWISE),
    (sp.WeightSparsity(grad_weight="mvue"), MASKED),
    (sp.WeightSparsity(grad_weight="mvue", decay=0.3), ACT),
]


@INNERS
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " + ".join(map(str, pair)))
def test_pair(pair: Any, inner: str) -> None:
    """output: the input is sparse; grad_input: the weight; grad_weight: the input, or with mvue grad_output."""
    compare_inputs(Mlp(16, 32), {"up": pair, "down": pair}, leaf(2, 9, 16), inner=inner)


def test_pair_with_kernels() -> None:
    pair = (sp.WeightSparsity(grad_weight="mvue", backend="cusparselt"), ACT)
    model, x = Mlp(64, 128).bfloat16(), torch.randn(70, 64).bfloat16().requires_grad_()
    report = compare_inputs(model, both(pair), x, tolerance=TOLERANCE[torch.bfloat16])
    assert {(site.status, site.output, site.grad_input, site.grad_weight) for site in report.sites} == {
        ("sparse", "masked_dense", "reference", "reference")
    }
    assert "w24(grad_weight=mvue, backend=cusparselt) + act24" in str(report)


# Graphs


@pytest.mark.loops
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fused_activations_round_as_inductor_does(dtype: torch.dtype) -> None:
    """Once, from float32: a near tie has the same mask whether a kernel computes the activation or Inductor."""
    x, gate = torch.randn(2, 64, 64).to(dtype)
    for name, function in reference_inputs.ACTIVATIONS.items():
        arguments = (x, gate) if name == "silu_gate" else (x,)
        compiled = torch.compile(lambda *args, f=function: f(*args))(*arguments)
        once = reference_inputs.activate(x, gate if name == "silu_gate" else None, name)
        # Inductor's erf is another one than torch's; rounded twice, a quarter of silu_gate would differ.
        assert (compiled != once).float().mean() < 0.002
    # Op by op it is rounded twice: as docs/schemes.md says, some masks are others.
    ones = [sp.mask24(reference_inputs.activate(x, gate, "silu_gate")), sp.mask24(F.silu(x) * gate)]
    assert (ones[0] != ones[1]).float().mean() < 0.005


# Weights that the graph computes


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled(linear: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(linear, "weight", Doubled())


def cayley(linear: nn.Module) -> nn.Module:
    """A solve; the orthogonal map that is the default is a long graph, column by column."""
    return parametrizations.orthogonal(linear, orthogonal_map="cayley")


PARAMETRIZATIONS = [parametrizations.weight_norm, cayley, doubled]
COMPUTED = [ACT, ROWWISE, MASKED, (sp.WeightSparsity(), ACT), (sp.WeightSparsity(grad_weight="mvue"), ACT)]


@pytest.mark.parametrize(
    ("computed", "scheme"),
    [*((one, scheme) for one in PARAMETRIZATIONS for scheme in COMPUTED), (parametrizations.orthogonal, ACT)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_parametrized_weight(computed: Callable[[nn.Module], nn.Module], scheme: Any) -> None:
    """The gradient of what a parametrization computed is `dY^T S(X)`, from where autograd takes it on."""
    model = nn.Sequential(nn.Tanh(), computed(nn.Linear(8, 12)), nn.Tanh(), computed(nn.Linear(12, 8)))
    report = compare_inputs(model, {"1": scheme, "3": scheme}, leaf(5, 8))
    assert {site.grad_weight for site in report.sites} == {"masked_dense"}


@pytest.mark.parametrize("setting", ["autocast", "one row", "kernels", "batch"])
def test_parametrized_weight_in_other_settings(setting: str) -> None:
    options: dict[str, Any] = {"inner": "inductor" if setting == "one row" else "aot_eager"}
    model, x = nn.Sequential(nn.Tanh(), doubled(nn.Linear(64, 64))), leaf(1 if setting == "one row" else 5, 64)
    scheme = ACT
    if setting == "autocast":
        options["context"] = lambda: torch.autocast("cpu", torch.bfloat16)
        options["tolerance"] = TOLERANCE[torch.bfloat16]
    if setting == "kernels":
        model, x = model.bfloat16(), x.detach().bfloat16().requires_grad_()
        scheme, options["kernel"] = replace(ACT, backend="cusparselt"), "reference"
        options["tolerance"] = TOLERANCE[torch.bfloat16]
    if setting == "batch":
        x = leaf(2, 5, 64)
    compare_inputs(model, {"1": scheme}, x, **options)


def test_parametrized_weight_in_two_calls() -> None:
    """Computed once, its gradient is a sum: each call has its own share."""

    class Twice(nn.Linear):
        seen = staticmethod(lambda x: x)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight
            y = F.linear(self.seen(x.tanh()), weight, self.bias).tanh()
            return F.linear(self.seen(y), weight)

    model, x = nn.Sequential(doubled(Twice(8, 8))), leaf(5, 8)
    backend = sp.sparse_backend({"0": ACT}, inner="aot_eager")
    with invariants_checked():
        actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x])
    assert [site.grad_weight for site in backend.report.sites] == ["masked_dense"] * 2
    model[0].seen = lambda x: masked_input(x, ACT)
    expected = run(model, dict(model.named_parameters()), [x])
    assert max(errors(actual, expected).values()) < TOLERANCE[torch.float32]


def test_frozen_parametrized_weight() -> None:
    """Has no gradient to be found."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), doubled(nn.Linear(8, 12)).requires_grad_(False))
    report = compare_inputs(model, {"2": ACT}, leaf(5, 8))
    assert report.sites[0].grad_weight is None


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x.cos()
        return F.silu(self.gate(x)) * self.up(x)


def test_one_mask_for_linears_of_one_input() -> None:
    captured = capture(Gated(), [leaf(6, 8)], {"gate": ACT, "up": MASKED})
    captured.check_invariants()
    assert captured.text.count("sparse_pass.input_mask24(") == 1
    compare_inputs(Gated(), {"gate": ACT, "up": MASKED}, leaf(6, 8))


# Reports and refusals


def test_features_that_are_no_multiple_of_four() -> None:
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8)), leaf(5, 8)
    backend = sp.sparse_backend({"re:.*": ACT}, model=model, inner="aot_eager")
    torch.compile(model, backend=backend)(x)
    wide, narrow = backend.report.sites
    assert (wide.status, wide.fqn) == ("masked_dense", "0")  # N may be anything
    assert narrow.status == "skipped"
    assert "the input has 6 features" in narrow.reason
    for strict, name in ((True, "re:.*"), (False, "2")):
        torch._dynamo.reset()
        backend = sp.sparse_backend({name: ACT}, model=model, inner="aot_eager", strict=strict)
        with pytest.raises(Exception, match=r"'2' .*the input has 6 features"):
            torch.compile(model, backend=backend)(x)
    with pytest.raises(ValueError, match=r"'0' cannot be sparsified: the weight is \[6, 10\]"):
        sp.sparse_backend({"0": ACT}, model=nn.Sequential(nn.Linear(10, 6)))


def test_of_a_pair_both_must_be_possible() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    backend = sp.sparse_backend({"*": (sp.WeightSparsity(), ACT)}, inner="aot_eager")
    x = torch.randn(5, 8)
    assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    assert backend.report.sites[0].status == "skipped"


def test_reasons() -> None:
    for scheme, reason in (
        (ACT, "no 2:4 kernels on cpu"),
        (replace(ACT, backend="masked_dense"), "backend='masked_dense' was asked for"),
        (replace(ACT, backend="cusparselt"), "float32 has no 2:4 kernels, only float16 and bfloat16"),
        (
            ROWWISE,
            "no 2:4 kernels on cpu; grad_weight: a rowwise mask is not 2:4 along M, over which it contracts",
        ),
    ):
        (site,) = sp.explain(Up(), {"up": scheme})(leaf(8, 64)).sites
        assert site.reason == reason


ORIGINS = {
    "of a parameter": (lambda x, w, b: OwnLinear.apply(x, w), "grad_weight: not found in the graph; left as captured"),
    "of a computed weight": (
        lambda x, w, b: b + OwnLinear.apply(x, w),
        "grad_weight: that of a weight which the graph computes; left as captured",
    ),
    "under no_grad, beside a matmul of the same input": (
        lambda x, w, b: (x @ b[:8, None].expand(8, 12) + _without_gradient(x, w)) * w.sum(),
        "grad_weight: that of a weight which the graph computes; left as captured",
    ),
}


def _without_gradient(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        return F.linear(x, w)


class Named(nn.Linear):
    """``function(x, weight, bias)``, by the module's name also where the weight is a computed one."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__(8, 12)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.cos(), self.weight, self.bias)


@pytest.mark.parametrize("origin", ORIGINS)
def test_grad_weight_of_unknown_origin(origin: str) -> None:
    """A masked output beside a gradient of the whole input is other mathematics: skipped, or an error."""
    function, reason = ORIGINS[origin]
    model, x = nn.Sequential(Named(function)), leaf(5, 8)
    if "computes" in reason:
        doubled(model[0])
    expected = run(model, dict(model.named_parameters()), [x])
    backend = sp.sparse_backend({"*": ACT}, inner="aot_eager")
    with invariants_checked():
        actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x])
    assert max(errors(actual, expected).values()) < TOLERANCE[torch.float32]
    assert {(site.status, site.output, site.reason) for site in backend.report.sites} == {("skipped", "dense", reason)}
    for name, strict in (("*", True), ("0", False)):
        torch._dynamo.reset()
        backend = sp.sparse_backend({name: ACT}, inner="aot_eager", strict=strict)
        with pytest.raises(Exception, match=f"'0' \\(named .*: {reason}"):
            torch.compile(model, backend=backend)(x)


def test_gradient_of_the_input_of_unknown_origin_is_refused() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), Shared())
    graph = capture(model, [leaf(5, 8)], {"1": ACT}).before.graph
    for node in graph.nodes:
        if node.meta.get("partitioner_tag") == "is_backward":
            node.meta.pop("seq_nr", None)
    before = printed(graph)
    scheme = (sp.WeightSparsity(grad_weight="mvue"), MASKED)
    with pytest.raises(ValueError, match=r"act24\(grad_input=masked\) changes grad_input, but grad_input: a backward"):
        rewrite_graph(graph, parse_config({"3.fc": scheme}))
    assert printed(graph) == before


def test_grad_weight_of_another_tensor() -> None:
    """A GEMM that reads something else than the input, here what is equal to it: it stays, with a reason."""
    graph = capture(nn.Sequential(nn.Tanh(), nn.Linear(8, 12)), [leaf(5, 8)], {"1": None}).before.graph
    (gemm,) = [n for n in graph.nodes if n.target is torch.ops.aten.mm.default and n.args[1].name.startswith("tanh")]
    input = gemm.args[1]
    with graph.inserting_before(gemm):
        other = graph.call_function(torch.ops.aten.neg.default, (input,))
        other = graph.call_function(torch.ops.aten.neg.default, (other,))
    for node in (other, other.args[0]):
        node.meta.update(input.meta)
    gemm.update_arg(1, other)
    with pytest.raises(ValueError, match=r"'1' .*: grad_weight: the GEMM that reads the input"):
        rewrite_graph(graph, parse_config({"1": ACT}))
    (site,) = rewrite_graph(graph, parse_config({"*": ACT})).sites
    assert (site.status, site.output, site.grad_weight) == ("skipped", "dense", "dense")
    assert site.reason.startswith("grad_weight: the GEMM that reads the input was not found; left as captured")
    assert gemm.args[1] is other


class Shared(nn.Module):
    """One weight in two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() @ self.fc.weight @ self.fc.weight + self.fc(x)


def test_prune_leaves_the_weight_dense() -> None:
    model = Mlp()
    before = copy.deepcopy(model.state_dict())
    report = sp.prune_(model, {"up": ACT, "down": (sp.WeightSparsity(), ACT)})
    assert {site.fqn: site.status for site in report.sites} == {"up": "skipped", "down": "skipped"}
    reasons = {site.fqn: site.reason for site in report.sites}
    assert "of the input only" in reasons["up"]
    # The forward of a pair is S(X) W^T: with S(W) the layer would compute what it never computed.
    assert "the output is computed with the dense weight" in reasons["down"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # Not even one that could not be written.
    computed = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)))
    assert sp.prune_(computed, {"0": (sp.WeightSparsity(), ACT)}).sites == ()


def test_parts_of_a_model_that_are_treated_differently() -> None:
    """Compiled one by one: no graph is shared by a block with a 2:4 input and one without."""
    model = nn.Sequential(Mlp(), Mlp(), Mlp())
    pair = (sp.WeightSparsity(), ACT)
    config = {"0.up": ACT, "1.up": pair}
    backend = sp.sparse_backend(config, model=model, inner="aot_eager")
    reference = hook_inputs(copy.deepcopy(model), config, [])
    for block in model:
        block.compile(backend=backend)
    x = torch.randn(5, 8)
    assert relative_error(model(x), reference(x)) < TOLERANCE[torch.float32]
    assert {site.fqn: str(site.scheme) for site in backend.report.sites} == {"0.up": str(ACT), "1.up": str(pair)}
