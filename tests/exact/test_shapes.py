"""Exactness in odd cases: shapes, strides, ways to multiply by a weight, schemes, exported graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import OwnLinear
from support import (
    TOLERANCE,
    Config,
    check_invariants,
    compare,
    errors,
    graph_facts,
    original_name,
    relative_error,
    run,
    ste_reference,
)
from torch import Tensor, nn

import sparse_pass as sp

W24 = sp.WeightSparsity()
INNERS = pytest.mark.parametrize("inner", ["aot_eager", "inductor"])


class Two(nn.Module):
    """Two linears, so that both have all three GEMMs."""

    def __init__(self, dim: int = 8, hidden: int = 12, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden, bias)
        self.down = nn.Linear(hidden, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


BOTH = {"up": W24, "down": W24}


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


# Inputs


SHAPES = {
    "rank 1": (8,),
    "rank 2": (6, 8),
    "one row": (1, 8),
    "rank 3": (2, 3, 8),
    "rank 4": (2, 1, 3, 8),
    "rank 5": (2, 2, 1, 3, 8),
    "no rows": (0, 8),
    "no rows, rank 3": (2, 0, 8),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_input_shape(shape: tuple[int, ...], bias: bool) -> None:
    compare(Two(bias=bias), BOTH, (leaf(*shape),))


@pytest.mark.loops
@pytest.mark.parametrize(("shape", "bias"), [((8,), True), ((1, 8), False)], ids=str)
def test_one_row_through_inductor(shape: tuple[int, ...], bias: bool) -> None:
    """Inductor's CPU decompositions make a product and a sum of a one-row matmul."""
    compare(Two(bias=bias), BOTH, (leaf(*shape),), inner="inductor")


@INNERS
def test_no_rows_through(inner: str) -> None:
    compare(Two(), BOTH, (leaf(0, 8),), inner=inner)


def strided(kind: str) -> Tensor:
    base = torch.randn(6, 5, 8)
    made = {
        "transposed": base.transpose(0, 1),
        "features outermost": torch.randn(8, 6).t(),
        "every second": torch.randn(6, 16)[:, ::2],
        "expanded rows": torch.randn(1, 8).expand(6, 8),
        "expanded batch": torch.randn(5, 8).expand(3, 5, 8),
        "expanded features": torch.randn(6, 1).expand(6, 8),
        "offset": torch.randn(100)[4:52].view(6, 8),
    }
    return made[kind].requires_grad_()


@pytest.mark.parametrize(
    "kind",
    [
        "transposed",
        "features outermost",
        "every second",
        "expanded rows",
        "expanded batch",
        "expanded features",
        "offset",
    ],
)
def test_strides(kind: str) -> None:
    x = strided(kind)
    compare(Two(), BOTH, (x,))
    compare(Two(), BOTH, (x,), entry=lambda model: lambda x: model(x.movedim(-1, 0).movedim(0, -1)))


@pytest.mark.parametrize(("k", "n"), [(4, 4), (4, 64), (68, 12), (100, 36), (64, 192), (20, 132)], ids=str)
def test_widths(k: int, n: int) -> None:
    compare(Two(k, n), BOTH, (leaf(5, k),))


def test_linear_of_a_transposed_weight() -> None:
    """The parameter itself is not contiguous."""
    model = Two()
    model.up.weight = nn.Parameter(torch.randn(8, 12).t() / 3)
    compare(model, BOTH, (leaf(5, 8),))


@INNERS
def test_dynamic_rank_and_length(inner: str) -> None:
    batches = [(leaf(b, n, 8),) for b, n in ((2, 5), (3, 7), (4, 2))]
    compare(Two(), BOTH, *batches, dynamic=True, inner=inner)


def test_dynamic_to_one_and_to_none() -> None:
    """Sizes 0 and 1 are graphs of their own."""
    batches = [(leaf(b, 8),) for b in (4, 5, 1, 0)]
    compare(Two(), BOTH, *batches, dynamic=True, graphs=3)


# Ways to multiply


class By(nn.Module):
    """A GEMM between two other ops, written by hand."""

    def __init__(self, multiply: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.multiply = multiply
        self.w = nn.Parameter(torch.randn(*shape) / 3)
        self.b = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.multiply(torch.cos(x), self.w, self.b))


WAYS = {
    "F.linear": (lambda x, w, b: F.linear(x, w, b), (12, 8), (5, 8)),
    "F.linear, no bias": (lambda x, w, b: F.linear(x, w), (12, 8), (5, 8)),
    "x @ w.T": (lambda x, w, b: x @ w.T, (12, 8), (5, 8)),
    "x @ w.T, rank 3": (lambda x, w, b: x @ w.T + b, (12, 8), (2, 5, 8)),
    "x @ w": (lambda x, w, b: x @ w + b, (8, 12), (5, 8)),
    "x @ w, rank 4": (lambda x, w, b: x @ w, (8, 12), (2, 3, 5, 8)),
    "w @ x": (lambda x, w, b: w @ x, (12, 8), (8, 5)),
    "w.T @ x": (lambda x, w, b: w.T @ x, (8, 12), (8, 5)),
    "w @ x, rank 3": (lambda x, w, b: w @ x, (12, 8), (2, 8, 5)),
    "w @ vector": (lambda x, w, b: w @ x + b, (12, 8), (8,)),
    "vector @ w": (lambda x, w, b: x @ w + b, (8, 12), (8,)),
    "mv": (lambda x, w, b: torch.mv(w, x), (12, 8), (8,)),
    "addmv": (lambda x, w, b: torch.addmv(b, w, x, beta=2, alpha=3), (12, 8), (8,)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w.T), (12, 8), (5, 8)),
    "addmm, scaled": (lambda x, w, b: torch.addmm(b, x, w.T, beta=0.5, alpha=2), (12, 8), (5, 8)),
    "addmm, full bias": (lambda x, w, b: torch.addmm(x @ w.T, x.sin(), w.T), (12, 8), (5, 8)),
    "addmm, weight left": (lambda x, w, b: torch.addmm(b[:, None], w, x, alpha=2), (12, 8), (8, 5)),
    "einsum": (lambda x, w, b: torch.einsum("bnk,ok->bno", x, w), (12, 8), (2, 5, 8)),
    "einsum, heads": (
        lambda x, w, b: torch.einsum("bnk,hdk->bhnd", x, w.view(3, 4, 8)), (12, 8), (2, 5, 8)
    ),
    "first rows": (lambda x, w, b: F.linear(x, w[:4], b[:4]), (12, 8), (5, 8)),
    "middle columns": (lambda x, w, b: F.linear(x[..., 2:6], w[:, 2:6], b), (12, 8), (5, 8)),
    "every second row": (lambda x, w, b: F.linear(x, w[::2]), (12, 8), (5, 8)),
    "chunks": (
        lambda x, w, b: torch.cat([F.linear(x, c).pow(i + 1) for i, c in enumerate(w.chunk(3))], -1),
        (12, 8), (5, 8),
    ),
    "one chunk of three": (lambda x, w, b: F.linear(x, w.chunk(3)[1]), (12, 8), (5, 8)),
    "split": (
        lambda x, w, b: F.linear(x, w.split([4, 8])[1]) + F.linear(x, w.split([4, 8])[0]).sum(),
        (12, 8), (5, 8),
    ),
    "overlapping slices": (lambda x, w, b: F.linear(x, w[:8]) * F.linear(x.sin(), w[4:]), (12, 8), (5, 8)),
    "bmm, expanded": (lambda x, w, b: torch.bmm(x, w.T.expand(2, 8, 12)), (12, 8), (2, 5, 8)),
    "baddbmm, expanded": (
        lambda x, w, b: torch.baddbmm(b, x, w.T.expand(2, 8, 12), beta=2, alpha=0.5), (12, 8), (2, 5, 8)
    ),
    "viewed flat and back": (lambda x, w, b: F.linear(x, w.reshape(-1).view(12, 8)), (12, 8), (5, 8)),
    "cast": (lambda x, w, b: F.linear(x.double(), w.double()).float(), (12, 8), (5, 8)),
    "own function": (lambda x, w, b: OwnLinear.apply(x, w), (12, 8), (5, 8)),
    # As Inductor decomposes mv, and mm and bmm of one row.
    "mv as product and sum": (lambda x, w, b: (w * x).sum(1), (12, 8), (8,)),
    "product and sum": (lambda x, w, b: (x.T * w.T).sum(0, keepdim=True), (12, 8), (1, 8)),
    "product and sum, rank 3": (
        lambda x, w, b: (x.unsqueeze(2) * w.T.unsqueeze(0)).sum(1), (12, 8), (1, 8)
    ),
    "product and sum, rank 4": (
        lambda x, w, b: (x.unsqueeze(-1) * w.T.expand(3, 8, 12).unsqueeze(1)).sum(2), (12, 8), (3, 1, 8)
    ),
    "twice": (lambda x, w, b: F.linear(x, w) @ w, (12, 8), (5, 8)),
    "twice, square": (lambda x, w, b: F.linear(F.linear(x, w).sin(), w), (8, 8), (5, 8)),
    "twice, square, x @ w": (lambda x, w, b: (x @ w).sin() @ w, (8, 8), (5, 8)),
}  # fmt: skip
"""Name: (product, shape of the weight, shape of the input)."""

SITES = {
    "addmm, full bias": 2,
    "chunks": 3,
    "split": 2,
    "overlapping slices": 2,
    "twice": 2,
    "twice, square": 2,
    "twice, square, x @ w": 2,
}
"""GEMMs of a way that read the weight, where they are not one."""


def by(way: str) -> tuple[By, Tensor]:
    multiply, weight, inputs = WAYS[way]
    return By(multiply, *weight), leaf(*inputs)


@pytest.mark.parametrize("way", WAYS)
def test_way(way: str) -> None:
    model, x = by(way)
    compare(model, {"w": W24}, (x,), sites=SITES.get(way, 1))


@pytest.mark.parametrize("way", ["w @ vector", "addmv"])
def test_way_through_inductor(way: str) -> None:
    model, x = by(way)
    compare(model, {"w": W24}, (x,), sites=SITES.get(way, 1), inner="inductor")


ALL_OPTIONS = sp.WeightSparsity(mask="greedy", grad_weight="masked", decay=0.3)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "own function"])
def test_way_with_all_options(way: str) -> None:
    model, x = by(way)
    compare(model, {"w": ALL_OPTIONS}, (x,), sites=SITES.get(way, 1))


@pytest.mark.parametrize("changed", [{"grad_weight": "masked"}, {"decay": 0.1}], ids=str)
def test_gradient_of_unknown_origin_is_refused(changed: dict[str, Any]) -> None:
    """A GEMM in somebody's backward is no grad_weight that the pass knows; the default leaves it alone."""
    model, x = by("own function")
    with pytest.raises(Exception, match=r"'w'.*changes grad_weight, but grad_weight: not found"):
        compare(model, {"w": sp.WeightSparsity(**changed)}, (x,))


# Schemes


SCHEMES = [
    sp.WeightSparsity(mask="greedy"),
    sp.WeightSparsity(grad_weight="masked"),
    sp.WeightSparsity(decay=0.25),
    ALL_OPTIONS,
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scheme(scheme: sp.WeightSparsity) -> None:
    compare(Two(), {"up": scheme, "down": W24}, (leaf(2, 3, 8),))


def test_schemes_through_inductor() -> None:
    config = {"up": ALL_OPTIONS, "down": sp.WeightSparsity(decay=0.25)}
    compare(Two(), config, (leaf(2, 3, 8),), inner="inductor")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scheme_under_autocast_and_dynamic(scheme: sp.WeightSparsity) -> None:
    compare(
        Two(), {"*": scheme}, (leaf(3, 8),), (leaf(5, 8),),
        dynamic="batch", context=lambda: torch.autocast("cpu", torch.bfloat16), tolerance=TOLERANCE[torch.bfloat16],
    )  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_scheme_where_the_weight_is_frozen(scheme: sp.WeightSparsity) -> None:
    model = Two()
    model.up.weight.requires_grad_(False)
    compare(model, {"up": scheme}, (leaf(3, 8),))


class Shared(nn.Module):
    """One weight under two names, of which each has its use."""

    def __init__(self, use: Callable[[Tensor, nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)
        self.alias = self.fc.weight
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.fc, self.alias)


USES = {
    "sum": lambda x, fc, w: fc(x) * w.sum() + w.square().mean(),
    "embedding": lambda x, fc, w: fc(F.embedding(x.argsort(-1)[..., 0], w)) + x,
    "gram": lambda x, fc, w: fc(x) + (w @ w.T).mean(),
    "second call": lambda x, fc, w: fc(torch.tanh(fc(x))),
}


@pytest.mark.parametrize("scheme", [W24, ALL_OPTIONS], ids=str)
@pytest.mark.parametrize("use", USES)
def test_weight_with_another_use(use: str, scheme: sp.WeightSparsity) -> None:
    """Only the linear is sparse; what else reads the weight reads it as it is. Decay is added once."""
    sites = 2 if use == "second call" else 1
    compare(Shared(USES[use]), {"fc": scheme}, (leaf(5, 12),), sites=sites)


def test_module_name_means_its_weight() -> None:
    """Also where F.linear reads it, as nn.MultiheadAttention does with that of out_proj."""
    model = Shared(lambda x, fc, w: fc(torch.tanh(F.linear(x, w))))
    compare(model, {"fc": W24}, (leaf(5, 12),), masked={"fc": W24, "alias": W24})


# Weights that cannot be 2:4 sparse


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 8, 12) / 3)
        self.out = nn.Linear(12, 6)
        self.last = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.out(torch.tanh(torch.bmm(x, self.experts))))


REFUSED = {
    "experts": r"\[3, 8, 12\].*2-D",
    "out": r"\[6, 12\].*multiples of 4",
    "last": r"\[8, 6\].*multiples of 4",
}


@pytest.mark.parametrize("named", [True, False], ids=["model", "no_model"])
@pytest.mark.parametrize("name", REFUSED)
def test_exact_name_of_what_cannot_be_sparse(name: str, named: bool) -> None:
    def train(model: nn.Module) -> None:
        backend = sp.sparse_backend({name: W24}, model=model if named else None, inner="aot_eager")
        torch.compile(model, backend=backend)(leaf(3, 5, 8))

    with pytest.raises(Exception, match=rf"{name}.*{REFUSED[name]}"):
        train(Experts())


def test_pattern_that_reaches_what_cannot_be_sparse() -> None:
    """Skipped, each with its reason, and computed dense."""
    model, x = Experts(), leaf(3, 5, 8)
    backend = sp.sparse_backend({"re:.*": W24}, inner="aot_eager")
    parameters = dict(model.named_parameters())
    actual = run(torch.compile(model, backend=backend), parameters, [x])
    assert max(errors(actual, run(model, parameters, [x])).values()) < TOLERANCE[torch.float32]
    sites = {site.fqn: site for site in backend.report.sites}
    assert {name: site.status for name, site in sites.items()} == dict.fromkeys(["experts", "out", "last"], "skipped")
    assert "[3, 8, 12]" in sites["experts"].reason
    assert "multiples of 4" in sites["out"].reason


# Kernels: on a CPU the reference ones, in the byte layout of the GPU's


CUSPARSELT = sp.WeightSparsity(backend="cusparselt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (64,), (0, 64)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_reference_kernels(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    model, x = Two(64, 128, bias).to(dtype), leaf(*shape).detach().to(dtype).requires_grad_()
    compare(model, {"up": CUSPARSELT, "down": CUSPARSELT}, (x,), status="sparse", tolerance=TOLERANCE[dtype])


@INNERS
def test_reference_kernels_under_autocast(inner: str) -> None:
    scheme = sp.WeightSparsity(backend="cusparselt", grad_weight="masked", decay=0.1)
    compare(
        Two(64, 128), {"up": CUSPARSELT, "down": scheme}, (leaf(3, 64),), (leaf(5, 64),),
        dynamic="batch", inner=inner, status="sparse",
        context=lambda: torch.autocast("cpu", torch.bfloat16), tolerance=TOLERANCE[torch.bfloat16],
    )  # fmt: skip


@pytest.mark.parametrize("way", ["x @ w", "addmm, full bias", "x @ w, rank 4", "x @ w.T, rank 3"])
def test_reference_kernels_by_hand(way: str) -> None:
    """Conv1D's layout, and a bias that is a matrix."""
    multiply, _, inputs = WAYS[way]
    shape = (64, 128) if "w.T" not in way and "full" not in way else (128, 64)
    model = By(multiply, *shape).to(torch.bfloat16)
    model.b = nn.Parameter(torch.randn(128).bfloat16())
    x = torch.randn(*inputs[:-1], 64).bfloat16().requires_grad_()
    compare(model, {"w": CUSPARSELT}, (x,), sites=SITES.get(way, 1), status="sparse", tolerance=0.03)


def test_reference_kernels_with_tied_weights() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64, bias=False)).bfloat16()
    model[2].weight = model[0].weight
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    for config in ({"2": CUSPARSELT}, {"0": CUSPARSELT, "2": CUSPARSELT}):
        compare(model, config, (x,), status="sparse", tolerance=TOLERANCE[torch.bfloat16])


def test_what_the_kernels_do_not_take() -> None:
    """float32, and dims that are no multiples of 64: the same mathematics, with the reason."""
    for model, x, reason in (
        (Two(64, 128), leaf(5, 64), "float32 has no 2:4 kernels"),
        (Two(64, 68).bfloat16(), leaf(5, 64).detach().bfloat16().requires_grad_(), "multiples of 64"),
    ):
        tolerance = TOLERANCE[x.dtype]
        compare(model, {"up": CUSPARSELT, "down": CUSPARSELT}, (x,), tolerance=tolerance)
        backend = sp.sparse_backend({"up": CUSPARSELT}, inner="aot_eager")
        torch.compile(model, backend=backend)(x)
        assert reason in backend.report.sites[0].reason


# Transforms inside the compiled function


def grad(model: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    def gradients(x: Tensor) -> list[Tensor]:
        found = torch.func.grad(loss)(dict(model.named_parameters()), x)
        return [found[name] for name in sorted(found, key=original_name)]

    return gradients


TRANSFORMS = {
    "vmap": (lambda model: torch.func.vmap(model), BOTH),
    "vmap of rank 3": (lambda model: torch.func.vmap(lambda x: model(x.expand(2, 8))), BOTH),
    "jvp": (lambda model: lambda x: torch.func.jvp(model, (x,), (x.cos(),)), BOTH),
    "grad": (grad, {"down": W24}),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform(transform: str) -> None:
    entry, config = TRANSFORMS[transform]
    # A gradient inside the graph reads the weight of the second linear once more.
    sites = {"jvp": 4, "grad": 2}.get(transform, 2)
    x = leaf(5, 8).detach()
    compare(Two(), config, (x,), entry=entry, sites=sites, backward=transform != "grad")


# Exported graphs


def _module(program: torch.export.ExportedProgram, config: Config) -> tuple[sp.Report, Callable[..., Tensor]]:
    module = program.module()
    return _rewritten(module, config), module


def _graph_module(program: torch.export.ExportedProgram, config: Config) -> tuple[sp.Report, Callable[..., Tensor]]:
    return _rewritten(program.graph_module, config), program.module()


def _rewritten(graph_module: torch.fx.GraphModule, config: Config) -> sp.Report:
    before = graph_facts(graph_module)
    report = sp.rewrite(graph_module, config)
    check_invariants(graph_module, before)
    return report


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("decomposed", [False, True], ids=["linear", "addmm"])
@pytest.mark.parametrize("rewritten", [_module, _graph_module], ids=["module", "graph_module"])
def test_export(rewritten: Callable[..., Any], decomposed: bool, dynamic: bool) -> None:
    model, x = Two().eval(), torch.randn(4, 3, 8)
    model.down.bias = None
    dims = ({0: torch.export.Dim("batch", min=2)},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=dims)
    if decomposed:
        program = program.run_decompositions()
    report, run_it = rewritten(program, {"up": W24, "down": W24})
    assert [(site.fqn, site.status) for site in report.sites] == [("up", "masked_dense"), ("down", "masked_dense")]
    assert report.sites[0].shape[1:] == (12, 8)
    reference = ste_reference(model, BOTH)
    for inputs in (x, torch.randn(7, 3, 8)) if dynamic else (x,):
        with torch.no_grad():
            assert relative_error(run_it(inputs), reference(inputs)) < TOLERANCE[torch.float32]
            assert relative_error(model(inputs), reference(inputs)) > 0.1


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)], ids=str)
@pytest.mark.parametrize("decomposed", [False, True], ids=["linear", "addmm"])
def test_export_with_reference_kernels(decomposed: bool, shape: tuple[int, ...]) -> None:
    model, x = Two(64, 128).bfloat16().eval(), torch.randn(*shape).bfloat16()
    reference = ste_reference(model, BOTH)
    program = torch.export.export(model, (x,))
    if decomposed:
        program = program.run_decompositions()
    report, run_it = _module(program, {"up": CUSPARSELT, "down": CUSPARSELT})
    assert [site.output for site in report.sites] == ["reference", "reference"]
    with torch.no_grad():
        assert relative_error(run_it(x), reference(x)) < TOLERANCE[torch.bfloat16]
        assert relative_error(model(x), reference(x)) > 0.1


def test_export_dynamic_with_reference_kernels() -> None:
    model = Two(64, 128).bfloat16().eval()
    reference = ste_reference(model, BOTH)
    dims = ({0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)},)
    program = torch.export.export(model, (torch.randn(4, 3, 64).bfloat16(),), dynamic_shapes=dims)
    report, run_it = _module(program, {"up": CUSPARSELT, "down": CUSPARSELT})
    assert {site.status for site in report.sites} == {"sparse"}
    for batch, length in ((4, 3), (2, 7)):
        x = torch.randn(batch, length, 64).bfloat16()
        with torch.no_grad():
            assert relative_error(run_it(x), reference(x)) < TOLERANCE[torch.bfloat16]


# Sizes that only the data knows


class Routed(Two):
    """Each half of the rows goes its way, as in a mixture of experts."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).nonzero().squeeze(1)
        return torch.zeros_like(x).index_put((chosen,), super().forward(x[chosen]))


def test_rows_counted_by_the_data() -> None:
    x = leaf(6, 8)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compare(Routed(), BOTH, (x,))
