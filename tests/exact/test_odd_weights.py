"""Weights that a graph reads in odd ways: none is masked that is no linear's, each that is declined has its reason."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_printer import capture, printed
from networks import OwnLinear
from support import TOLERANCE, compare, errors, fresh_compile, relative_error, run, ste_reference
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

import sparse_pass as sp
from sparse_pass.fqn import parse_config
from sparse_pass.kernels import probe
from sparse_pass.one_graph import rewrite_graph
from sparse_pass.plan.limits import Limits, device_limits

W24 = sp.WeightSparsity()
KERNELS = sp.WeightSparsity(backend="cusparselt")


class By(nn.Module):
    """``function(x, self.w)``."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int, dtype: torch.dtype | None = None):
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(*shape).to(dtype), requires_grad=dtype is None)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def report_of(model: nn.Module, x: Tensor, name: str = "*", scheme: Any = W24, **options: Any) -> sp.Report:
    """Compile with the named weights; the result is that of the model where they are all skipped."""
    backend = sp.sparse_backend({name: scheme}, model=model, inner="aot_eager", **options)
    output = torch.compile(model, backend=backend)(x)
    if output.requires_grad:
        output.float().sum().backward()
    if all(site.status == "skipped" for site in backend.report.sites):
        assert relative_error(output, model(x)) < TOLERANCE[torch.float32]
    return backend.report


# No linear: products and sums that only look like one


NO_LINEAR: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "sum of a scaled weight": (lambda x, w: (w * x).sum(1), (12, 8), (1,)),
    "one factor for a column": (lambda x, w: (x * w).sum(0, keepdim=True), (12, 8), (1, 1)),
    "rows with a factor each": (lambda x, w: (x * w).sum(1), (12, 8), (12, 1)),
    "rows with a factor each, not summed": (lambda x, w: (x * w).tanh(), (12, 8), (12, 1)),
    "elementwise": (lambda x, w: (x * w).sum(0, keepdim=True), (12, 8), (12, 8)),
    "largest product": (lambda x, w: (w * x).amax(1), (12, 8), (8,)),
    "product that is kept too": (lambda x, w: (p := w * x).sum(1) + p.exp().sum(1), (12, 8), (8,)),
    "sum in another dtype": (lambda x, w: (w * x).sum(1, dtype=torch.float64), (12, 8), (8,)),
    "sum of everything": (lambda x, w: (w * x).sum(), (12, 8), (8,)),
    "transposed, by no matmul": (lambda x, w: w.t().sin() + x, (12, 8), (8, 12)),
    "gram matrix": (lambda x, w: (w @ w.t()).sum() + x, (12, 8), (3,)),
}


@pytest.mark.parametrize("case", NO_LINEAR)
def test_no_linear(case: str) -> None:
    function, weight, x = NO_LINEAR[case]
    (site,) = report_of(By(function, *weight), leaf(*x)).sites
    assert (site.status, site.output) == ("skipped", None)
    assert site.reason.startswith("no matmul of this weight was found: it is read by aten.")


def test_readers_of_a_weight_without_linear_are_those_of_the_forward() -> None:
    (site,) = report_of(By(lambda x, w: w.t().sin() + x, 12, 8), leaf(8, 12)).sites
    assert site.reason == "no matmul of this weight was found: it is read by aten.sin.default"


def test_weight_without_linear_that_is_left_dense() -> None:
    """What is asked to stay dense needs no reason."""
    captured = capture(By(lambda x, w: w.t().sin() + x, 12, 8), [leaf(8, 12)], {"w": None, "*": W24})
    assert captured.report.sites == ()
    assert captured.text == printed(captured.before.graph)


def test_vector_times_a_matrix_that_is_no_weight() -> None:
    """A one-dimensional parameter is no linear's weight."""
    model = By(lambda x, w: x @ w, 8)
    program = torch.export.export(model, (x := torch.randn(4, 8),))
    module = program.module()
    report = sp.rewrite(module, {"w": W24})
    assert (report.sites, report.unmatched) == ((), ("w",))
    assert torch.equal(module(x), model(x))


# Weights that cannot be 2:4


@pytest.mark.parametrize(("k", "n"), [(8, 0), (0, 8)])
def test_empty_weight(k: int, n: int) -> None:
    (site,) = report_of(nn.Sequential(nn.Linear(k, n)), leaf(4, k)).sites
    assert site.status == "skipped"
    assert site.reason.startswith(f"the weight is [{n}, {k}]: 2:4 masks need both dims to be multiples of 4")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weight_of_few_bits(dtype: torch.dtype) -> None:
    model = By(lambda x, w: F.linear(x, w.to(torch.float32)), 12, 8, dtype=dtype)
    (site,) = report_of(model, leaf(4, 8)).sites
    assert (site.status, site.output) == ("skipped", "dense")
    assert site.reason == f"the weight is {dtype}: expected float16, bfloat16, float32 or float64"


def test_complex_weight_and_input() -> None:
    x = torch.randn(4, 8, dtype=torch.complex64)
    model = By(lambda x, w: torch.view_as_real(F.linear(x, w)), 12, 8, dtype=torch.complex64)
    (site,) = report_of(model, x).sites
    assert site.reason.startswith("the weight is torch.complex64: expected float16")
    model = By(lambda x, w: torch.view_as_real(F.linear(x, w.to(torch.complex64))), 12, 8)
    (site,) = report_of(model, x, scheme=sp.ActivationSparsity()).sites
    assert site.reason.startswith("the input is torch.complex64: expected float16")


# Ways to transpose a weight


FLIPS: dict[str, Callable[[Tensor], Tensor]] = {
    "t()": lambda w: w.t(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "T three times": lambda w: w.T.T.T,
    **{f"transpose{dims}": lambda w, d=dims: w.transpose(*d) for dims in [(0, 1), (1, 0), (-1, -2), (0, -1), (1, -2)]},
    **{f"permute{dims}": lambda w, d=dims: w.permute(*d) for dims in [(1, 0), (-1, 0), (-1, -2), (1, -2)]},
}


@pytest.mark.parametrize("flip", FLIPS)
def test_matmul_by_a_weight_that_was_transposed(flip: str) -> None:
    """As export keeps it: a matmul, which has no kernel; the mask is that of the weight as stored."""
    model = By(lambda x, w: x @ FLIPS[flip](w), 128, 64).bfloat16()
    x = torch.randn(8, 64).bfloat16()
    module = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        report, expected = sp.rewrite(module, {"w": KERNELS}), ste_reference(model, {"w": W24})(x)
        assert relative_error(module(x), expected) < TOLERANCE[torch.bfloat16]
    assert [site.status for site in report.sites] == ["masked_dense"]


@pytest.mark.parametrize("flips", [0, 2])
@pytest.mark.parametrize("flip", FLIPS)
def test_linear_of_a_weight_that_was_transposed(flip: str, flips: int) -> None:
    """`packed` or `packed_t`: by how often."""
    n = 64 if flips == 0 else 128
    model = By(lambda x, w: F.linear(x, FLIPS[flip](FLIPS[flip](w) if flips else w)), 128, 64).bfloat16()
    x = torch.randn(8, 128 if flips == 0 else 64).bfloat16()
    module = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        (site,) = sp.rewrite(module, {"w": KERNELS}).sites
        assert (site.status, site.reason, site.shape) == ("sparse", "", (8, n, 192 - n))
        assert relative_error(module(x), ste_reference(model, {"w": W24})(x)) < TOLERANCE[torch.bfloat16]


# Ways to move a weight, and to multiply by it


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "reshape": lambda w: w.reshape(8, 12).reshape(12, 8),
    "view": lambda w: w.view(-1).view(12, 8),
    "_unsafe_view": lambda w: torch.ops.aten._unsafe_view(w, [12, 8]),
    "flatten and unflatten": lambda w: w.flatten().unflatten(0, (12, 8)),
    "unsqueeze and squeeze": lambda w: w.unsqueeze(0).squeeze(0),
    "expand and select": lambda w: w.expand(2, 12, 8)[1],
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w.t().contiguous().t(),
    "alias": lambda w: torch.ops.aten.alias(w),
    "detach": lambda w: w.detach(),
    "lift_fresh_copy": lambda w: torch.ops.aten.lift_fresh_copy(w),
    "slice": lambda w: w[2:10],
    "narrow": lambda w: w.narrow(0, 2, 8),
    "split": lambda w: w.split(8)[0],
    "split_with_sizes": lambda w: w.split([4, 8])[1],
    "chunk": lambda w: w.chunk(3)[1],
    "unbind": lambda w: w.view(3, 4, 8).unbind(0)[1],
    "to": lambda w: w.to(torch.float64).to(torch.float32),
    "_to_copy": lambda w: torch.ops.aten._to_copy(w, dtype=torch.float32),
    "convert_element_type": lambda w: torch.ops.prims.convert_element_type(w, torch.float32),
}


@pytest.mark.parametrize("move", MOVES)
def test_moved_weight(move: str) -> None:
    """As export keeps it: the mask is that of the weight as stored, whatever part of it the matmul reads."""
    model, x = By(lambda x, w: F.linear(x, MOVES[move](w)), 12, 8), torch.randn(5, 8)
    with torch.no_grad():
        module = torch.export.export(model, (x,)).module()
        (site,) = sp.rewrite(module, {"w": W24}).sites
        assert site.status == "masked_dense"
        assert relative_error(module(x), ste_reference(model, {"w": W24})(x)) < TOLERANCE[torch.float32]
        assert relative_error(module(x), model(x)) > 0.05


KEEPS = ("clone", "contiguous", "alias", "detach", "to", "_to_copy", "convert_element_type")


@pytest.mark.parametrize("move", KEEPS)
def test_moved_weight_in_kernels(move: str) -> None:
    """What keeps the elements in their places keeps the kernel."""
    keeps = {**MOVES, "to": lambda w: w.float().to(torch.bfloat16), "_to_copy": lambda w: w.float().bfloat16()}
    keeps["convert_element_type"] = lambda w: torch.ops.prims.convert_element_type(w, torch.bfloat16)
    model = By(lambda x, w: F.linear(x, keeps[move](w)), 128, 64).bfloat16()
    x = torch.randn(5, 64).bfloat16()
    with torch.no_grad():
        module = torch.export.export(model, (x,)).module()
        (site,) = sp.rewrite(module, {"w": KERNELS}).sites
        assert (site.status, site.reason) == ("sparse", "")
        assert relative_error(module(x), ste_reference(model, {"w": W24})(x)) < TOLERANCE[torch.bfloat16]


PRODUCTS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...], int]] = {
    "linear": (lambda x, w: F.linear(x, w), (12, 8), (5, 8), 5),
    "addmm": (lambda x, w: torch.addmm(x.new_ones(12), x, w.t()), (12, 8), (5, 8), 5),
    "left": (lambda x, w: w @ x, (12, 8), (8, 5), 5),
    "addmm, left": (lambda x, w: torch.addmm(x.new_ones(5), w, x), (12, 8), (8, 5), 5),
    "bmm": (lambda x, w: torch.bmm(x, w.t().expand(2, 8, 12)), (12, 8), (2, 5, 8), 10),
    "bmm, left": (lambda x, w: torch.bmm(w.expand(2, 12, 8), x), (12, 8), (2, 8, 5), 10),
    "baddbmm": (lambda x, w: torch.baddbmm(x.new_ones(12), x, w.t().expand(2, 8, 12)), (12, 8), (2, 5, 8), 10),
    "baddbmm, left": (lambda x, w: torch.baddbmm(x.new_ones(5), w.expand(2, 12, 8), x), (12, 8), (2, 8, 5), 10),
    "mv": (lambda x, w: torch.mv(w, x), (12, 8), (8,), 1),
    "addmv": (lambda x, w: torch.addmv(x.new_ones(12), w, x), (12, 8), (8,), 1),
    "product and sum": (lambda x, w: (w * x).sum(1), (12, 8), (8,), 1),
    "of a row": (lambda x, w: (x.t() * w.t()).sum(0, keepdim=True), (12, 8), (1, 8), 1),
    "of a batch": (lambda x, w: (x[..., None] * w.t().expand(3, 8, 12)[:, None]).sum(2), (12, 8), (3, 1, 8), 3),
}


@pytest.mark.parametrize("product", PRODUCTS)
def test_sizes_in_the_report(product: str) -> None:
    function, weight, x, m = PRODUCTS[product]
    (site,) = report_of(By(function, *weight), leaf(*x)).sites
    assert site.shape == (m, 12, 8)


# Others


def test_a_linear_by_another_name() -> None:
    """Known to a pass that sees no parameter names."""

    class Projection(nn.Linear):
        pass

    one = sp.SparsePass({"0": W24})
    torch.compile(nn.Sequential(Projection(8, 12)), options={"joint_custom_pre_pass": one})(torch.randn(4, 8))
    assert [site.fqn for site in one.report.sites] == ["0"]


@pytest.mark.parametrize("scheme", [W24, sp.ActivationSparsity()], ids=str)
def test_a_linear_that_multiplies_from_the_left(scheme: Any) -> None:
    """Of a square input nothing but the name tells which operand is the weight."""

    class Left(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return (self.weight @ x.mT).mT + self.bias

    model, x = nn.Sequential(nn.Tanh(), Left(8, 12)), leaf(8, 8)
    plain = nn.Sequential(nn.Tanh(), nn.Linear(8, 12))
    plain.load_state_dict(model.state_dict())
    found = []
    for one in (model, plain):
        with fresh_compile():
            backend = sp.sparse_backend({"1": scheme}, model=one, inner="aot_eager")
            found.append(run(torch.compile(one, backend=backend), dict(one.named_parameters()), [x]))
        (site,) = backend.report.sites
        assert (site.fqn, site.status, site.shape) == ("1", "masked_dense", (8, 12, 8))
    assert max(errors(*found).values()) < TOLERANCE[torch.float32]


def test_a_parameter_that_a_linear_takes_as_input() -> None:
    """The module's own weight is meant, also where it is computed and the input is a parameter."""

    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(4, 8))
            self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(8, 12))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.query) + x

    (site,) = report_of(Query(), leaf(4, 12), "fc").sites
    assert (site.fqn, site.status, site.shape) == ("fc", "masked_dense", (4, 12, 8))


def test_a_weight_times_a_weight() -> None:
    """One of them is the weight; that the other was read by a matmul, and is none of its weights, is said."""

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Parameter(torch.randn(8, 12)), nn.Parameter(torch.randn(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.v @ self.u)

    (site,) = report_of(Product(), leaf(5, 16), "v").sites
    assert site.status == "skipped"
    assert site.reason == "it is multiplied by another weight, 'u', and counts as the input of that one"


def test_a_call_without_a_gradient_beside_one_that_has_it() -> None:
    class Monitored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x.sin())
            with torch.no_grad():
                norm = (self.fc.weight.t() @ x.t()).norm()
            return y + 0 * norm

    report = report_of(Monitored(), leaf(4, 8), "fc", sp.WeightSparsity(decay=0.5))
    assert [(site.grad_input, site.grad_weight) for site in report.sites] == [("masked_dense", "dense"), (None, None)]


def test_one_weight_in_two_dtypes_in_kernels() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        results = []
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                results.append(F.linear(x, w).float())
        return torch.cat(results)

    x = torch.randn(5, 64, requires_grad=True)
    compare(By(function, 64, 64), {"w": KERNELS}, (x,), sites=2, status="sparse", tolerance=TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("grad", [True, False])
def test_weight_that_is_returned_and_not_read(grad: bool) -> None:
    backend = sp.sparse_backend({"w": W24}, inner="aot_eager")
    with pytest.warns(UserWarning, match="'w' named no linear"), torch.set_grad_enabled(grad):
        torch.compile(By(lambda x, w: (x.sin(), w.t()), 12, 8), backend=backend)(leaf(4, 8))
    assert (backend.report.sites, backend.report.unmatched) == ((), ("w",))


def test_graph_without_module_names() -> None:
    """No layer can be named, which is said; where there are names it is not."""
    for forget in (True, False):
        graph = capture(nn.Sequential(nn.Linear(8, 12)), [torch.randn(4, 8)], {"0": W24}).before
        for node in graph.graph.nodes if forget else ():
            node.meta.pop("nn_module_stack", None)
        notes = " ".join(rewrite_graph(graph.graph, parse_config({"0": W24})).notes)
        assert ("no matmul of the graph carries a module name" in notes) == forget


def test_one_weight_with_two_masks_in_kernels() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).bfloat16()
    model[2].weight = model[0].weight
    config = {str(i): sp.WeightSparsity(mask=mask, backend="cusparselt") for i, mask in ((0, "optimal"), (2, "greedy"))}
    x = torch.randn(5, 64).bfloat16().requires_grad_()
    compare(model, config, (x,), status="sparse", tolerance=TOLERANCE[torch.bfloat16])


def test_a_weight_expanded_to_a_batch_that_changes() -> None:
    """The size is a node of the graph beside the weight's own."""
    model = By(lambda x, w: torch.bmm(x.sin(), w.t().expand(x.shape[0], 8, 12)), 12, 8)
    compare(model, {"w": W24}, (leaf(2, 5, 8),), (leaf(3, 5, 8),), dynamic="batch")


def test_a_column_that_was_cut_from_a_longer_one() -> None:
    """A 2:4 input of a product and a sum."""
    model = By(lambda x, w: (x.sin()[:8] * w.t()).sum(0, keepdim=True), 12, 8)
    (site,) = report_of(model, leaf(16, 1), scheme=sp.ActivationSparsity()).sites
    assert (site.status, site.shape[1:]) == ("masked_dense", (12, 8))


@pytest.mark.parametrize("changed", [{"grad_weight": "masked"}, {"decay": 0.5}], ids=str)
def test_weight_of_a_tensor_subclass(changed: dict[str, Any]) -> None:
    """As a DTensor is one: each inner tensor has its mask, in the outputs and in the gradient."""
    model, x = nn.Sequential(nn.Tanh(), nn.Linear(8, 12, bias=False)), torch.randn(5, 8)
    inner = {name: torch.randn(12, 8) for name in ("a", "b")}
    model[1].weight = nn.Parameter(TwoTensor(**inner))
    report = report_of(model, x, "1", sp.WeightSparsity(**changed))
    assert [(site.fqn, site.output, site.grad_weight) for site in report.sites] == [("1", "masked_dense", "dense")] * 2
    for name, weight in inner.items():
        single = nn.Sequential(nn.Tanh(), nn.Linear(8, 12, bias=False))
        single[1].weight = nn.Parameter(weight)
        reference = ste_reference(single, {"1": sp.WeightSparsity(**changed)})
        reference(x).sum().backward()
        expected = reference[1].parametrizations.weight.original.grad
        assert relative_error(getattr(model[1].weight.grad, name), expected) < TOLERANCE[torch.float32]


def test_weight_that_has_no_gradient_although_it_could() -> None:
    """Its gradient is an output of the graph, and None."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = F.linear(x, self.w)
            return y + F.linear(x, self.v)

    (site,) = report_of(Two(), torch.randn(4, 8), "w", sp.WeightSparsity(grad_weight="masked")).sites
    assert (site.status, site.output, site.grad_weight) == ("masked_dense", "masked_dense", None)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 does not trace the function, which strict refuses")
def test_strict_lets_a_gradient_be_that_need_not_change() -> None:
    """Nothing that the scheme asks for is missing where an own backward computes grad_weight."""
    report = report_of(By(OwnLinear.apply, 12, 8), leaf(5, 8), strict=True)
    assert {site.status for site in report.sites} == {"masked_dense"}


def test_two_passes_that_name_one_layer() -> None:
    """The first has it; the second leaves it alone, and says so."""
    model, x = nn.Sequential(nn.Linear(8, 12)), leaf(5, 8)
    passes = [sp.SparsePass({"0": scheme}) for scheme in (W24, sp.WeightSparsity(decay=0.5))]
    options = sp.inductor_options({"0": sp.WeightSparsity(mask="greedy")}, {"joint_custom_pre_pass": passes})
    with pytest.warns(UserWarning, match="'0' named no linear"):
        output = torch.compile(model, options=options)(x)
    assert relative_error(output, ste_reference(model, {"0": W24})(x)) < TOLERANCE[torch.float32]
    assert [len(one.report.sites) for one in passes] == [1, 0]
    (site,) = options["joint_custom_pre_pass"].report.sites
    assert (site.status, site.output) == ("skipped", None)
    assert "it is read by sparse_pass.mask24.default" in site.reason


def test_the_longest_name_of_a_tied_weight_is_the_modules() -> None:
    """A plain object holds the model: its path stands before the names of both owners."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Linear(8, 8)
            self.a = nn.Module()
            self.a.z = nn.Linear(8, 8)
            self.a.z.weight = self.z.weight

    class Holder:
        def __init__(self, net: nn.Module) -> None:
            self.net = net

        def run(self, x: Tensor) -> Tensor:
            return self.net.a.z(x) + self.net.z(x).sin()

    model = Model()
    backend = sp.sparse_backend({"a.z": W24}, model=model, inner="aot_eager")
    torch.compile(Holder(model).run, backend=backend)(torch.randn(4, 8))
    assert [site.fqn for site in backend.report.sites] == ["a.z"]


def test_two_weights_in_one_module_without_names() -> None:
    class Both(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + F.linear(x, self.extra)

    layer = Both(8, 12)
    layer.extra = nn.Parameter(torch.randn(12, 8))
    options = {"joint_custom_pre_pass": sp.SparsePass({"0": W24})}
    with pytest.raises(Exception, match="the module multiplies by 2 weights and their names are not visible"):
        torch.compile(nn.Sequential(layer), options=options)(torch.randn(4, 8))


def test_weights_that_prune_cannot_write() -> None:
    """Nothing is written then, to the others neither."""
    meta = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    computed = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    cases = [(meta, "'1' is on the meta device: load its data"), (computed, "'1' .* call .*parametrize.remove_param")]
    for compute, removal in (
        (nn.utils.weight_norm, r"remove_weight_norm\(module\)"),
        (nn.utils.spectral_norm, r"remove_spectral_norm\(module\)"),
        (lambda one: prune.random_unstructured(one, "weight", 0.5), r"prune\.remove\(module, 'weight'\)"),
        (lambda one: prune.ln_structured(prune.identity(one, "weight"), "weight", 0.5, 2, 0), r"prune\.remove"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first two are deprecated
            computed = nn.Sequential(nn.Linear(8, 8), compute(nn.Linear(8, 8)))
        cases.append((computed, f"'1' .* call .*nn.utils.{removal}"))
    for model, message in cases:
        before = model[0].weight.detach().clone()
        with pytest.raises(ValueError, match=message):
            sp.prune_(model, {"*": W24})
        assert torch.equal(model[0].weight, before)


def test_weights_that_prune_leaves() -> None:
    """Of odd dims where a pattern names them, with the reason; those of which nothing is to be pruned, in silence."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    before = copy.deepcopy(model.state_dict())
    report = sp.prune_(model, {"*": W24, "2": sp.ActivationSparsity()})
    assert [(site.fqn, site.status) for site in report.sites] == [("0", "sparse"), ("1", "skipped")]
    assert report.sites[1].reason.startswith("the weight is [6, 8]: 2:4 masks need both dims to be multiples of 4")
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["0.weight"]


# What a device can do


@pytest.mark.parametrize(
    ("capability", "dtype", "unavailable"),
    [
        ((7, 5), torch.bfloat16, ""),
        ((9, 0), torch.float32, ""),
        ((8, 0), torch.bfloat16, "asked"),
        ((9, 0), torch.float16, "asked"),
    ],
)
def test_kernels_are_tried_where_they_can_work(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, unavailable: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(probe, "availability", lambda device, dtype: "asked")
    expected = Limits(device="cuda", capability=capability, unavailable=unavailable)
    assert device_limits(torch.device("cuda", 0), dtype) == expected


def test_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    limits = device_limits(torch.device("cuda", 0), torch.bfloat16)
    assert limits == Limits(device="cuda", capability=(9, 4), unavailable="ROCm has no cuSPARSELt kernels")
