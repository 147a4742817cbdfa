"""Graphs that are not a plain forward and backward: branches, regions, fused ops, monitors beside the linear."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from support import TOLERANCE, compare, errors, mask_by_hand, run
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph

import sparse_pass as sp
from sparse_pass.apply.editor import Editor

W24 = sp.WeightSparsity()
INNERS = pytest.mark.parametrize("inner", ["aot_eager", "inductor"])


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 16)


class Monitored(Net):
    """A matmul under no_grad has the seq_nr of a linear beside it, and no backward. Of two weights it is no linear."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(self.fc1(x))
        with torch.no_grad():
            overlap = self.fc2.weight @ self.fc2.weight.t()
        return y + 0 * overlap.mean()


class MonitoredByInput(Net):
    """Here it multiplies an input, which makes it a call of the linear."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(self.fc1(x))
        with torch.no_grad():
            norm = (self.fc2.weight.t() @ x.t()).norm()
        return y + 0 * norm


class Detached(nn.Module):
    """The second call has no backward, whose GEMMs thus are all of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + self.fc(torch.sin(x)).detach()


class Sign(nn.Module):
    """A gradient of constant zeros, whose backward GEMMs need none from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sign(self.fc(x)) + x


class Region(Net):
    def forward(self, x: Tensor) -> Tensor:
        @torch.compiler.nested_compile_region
        def block(h: Tensor) -> Tensor:
            return self.fc2(self.fc1(h).relu())

        return block(block(x))


@INNERS
@pytest.mark.parametrize(
    ("build", "names", "sites"),
    [
        (Monitored, ("fc1", "fc2"), 2),
        (MonitoredByInput, ("fc1", "fc2"), 3),
        (Detached, ("fc",), 2),
        (Region, ("fc1", "fc2"), 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_matmuls_beside_the_linear(
    build: Callable[[], nn.Module], names: tuple[str, ...], sites: int, inner: str
) -> None:
    compare(build(), dict.fromkeys(names, W24), (leaf(8, 16),), inner=inner, sites=sites)


@INNERS
def test_constant_gradient(inner: str) -> None:
    """Its backward is no further call of the linear."""
    compare(Sign(), {"fc": W24}, (leaf(8, 16),), inner=inner, same_gradients=True)


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(
            x.sum() > 0,
            lambda h: self.fc2(self.fc1(h).relu()),
            lambda h: self.fc2(self.fc1(h).sin()),
            (x,),
        )


@INNERS
def test_branches_stay_dense_and_are_reported(inner: str) -> None:
    model, x = Branches(), leaf(8, 16)
    backend = sp.sparse_backend({"fc1": W24, "fc2": W24}, inner=inner)
    parameters = dict(model.named_parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="sparse_pass")  # the report has them, so they are not misspelt
        actual = run(torch.compile(model, backend=backend), parameters, [x])
    expected = run(model, parameters, [x])
    torch.testing.assert_close(actual.outputs, expected.outputs)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(actual.gradients[name], gradient, msg=name)
    sites = {site.fqn: site for site in backend.report.sites}
    assert {name: site.status for name, site in sites.items()} == {"fc1": "skipped", "fc2": "skipped"}
    assert all("cond" in site.reason for site in sites.values())


def test_pass_alone_leaves_branches_dense(caplog: pytest.LogCaptureFixture) -> None:
    """Without parameter names: the forward of a branch must not be masked when its backward is not."""
    model, x = Branches(), leaf(8, 16)
    sparse_pass = sp.SparsePass({"fc1": W24, "fc2": W24})
    parameters = dict(model.named_parameters())
    compiled = torch.compile(model, options={"joint_custom_pre_pass": sparse_pass})
    with pytest.warns(UserWarning, match="named no linear"):
        actual = run(compiled, parameters, [x])
    torch.testing.assert_close(actual.outputs, run(model, parameters, [x]).outputs)
    assert sparse_pass.report.unmatched == ("fc1", "fc2")
    note = "fc1, fc2: left dense inside a branch (torch.cond and the like)"
    assert note in sparse_pass.report.notes
    assert note in caplog.messages
    assert not any("no matmul of the graph carries a module name" in note for note in sparse_pass.report.notes)


@INNERS
def test_fused_encoder_layer_is_reported(inner: str) -> None:
    """In eval mode nn.TransformerEncoderLayer is one fused op, which multiplies by weights that no pass can see."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval()
    names = ["linear1", "linear2", "self_attn.in_proj_weight", "self_attn.out_proj"]
    backend = sp.sparse_backend(dict.fromkeys(names, W24), model=layer, inner=inner)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend=backend)(x), layer(x))
    sites = {site.fqn: site for site in backend.report.sites}
    assert set(sites) == set(names)
    assert {site.status for site in sites.values()} == {"skipped"}
    assert "_transformer_encoder_layer_fwd" in sites["linear1"].reason


def test_fused_encoder_layer_is_an_error_where_strict() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    backend = sp.sparse_backend({"linear1": W24}, inner="aot_eager", strict=True)
    with torch.no_grad(), pytest.raises(Exception, match=r"'linear1': no matmul of this weight was found"):
        torch.compile(layer, backend=backend)(torch.randn(2, 5, 16))


@pytest.mark.parametrize("named", [0, 1])
def test_parts_that_share_a_weight(named: int) -> None:
    """Compiled one by one, each part has its own name for the weight."""
    parts = [nn.Sequential(nn.Linear(16, 16)), nn.Sequential(nn.Linear(16, 16))]
    parts[1][0].weight = parts[0][0].weight
    model, x = nn.ModuleList(parts), torch.randn(8, 16)
    backend = sp.sparse_backend({f"{named}.0": W24}, model=model, inner="aot_eager")
    outputs = [torch.compile(part, backend=backend)(x) for part in parts]
    masked = torch.where(sp.mask24(parts[0][0].weight), parts[0][0].weight, 0)
    for index, (part, output) in enumerate(zip(parts, outputs, strict=True)):
        weight = masked if index == named else part[0].weight
        torch.testing.assert_close(output, nn.functional.linear(x, weight, part[0].bias))
    assert [site.fqn for site in backend.report.sites] == [f"{named}.0"]


def laid_out(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """A contiguous mask of the values, that in their memory order, and whether it is the same node."""
    graph, mode = Graph(), FakeTensorMode()
    of, mask = graph.placeholder("values"), graph.placeholder("mask")
    with mode:
        of.meta["val"] = torch.empty_strided(values.shape, values.stride())
        mask.meta["val"] = torch.empty(values.shape, dtype=torch.bool)
        made = Editor(graph).laid_out(mask, of, graph.output(mask), like=of)
    return mask.meta["val"], made.meta["val"], made is mask


@pytest.mark.parametrize("dims", [(0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0)], ids=str)
def test_a_mask_takes_the_memory_order_of_its_values(dims: tuple[int, ...]) -> None:
    """What reads the masked values was captured with their strides."""
    values = torch.empty(2, 3, 4).permute(dims)
    _, made, same = laid_out(values)
    assert made.shape == values.shape
    assert made.stride() == values.stride()
    assert same == (dims == (0, 1, 2))


NOT_DENSE: dict[str, tuple[torch.Tensor, tuple[int, ...] | None]] = {
    "expanded": (torch.empty(1, 1, 4).expand(1, 3, 4), None),
    "expanded columns": (torch.empty(4, 1).T.expand(3, 4), None),
    "expanded features": (torch.empty(3, 1).expand(3, 4), None),
    "one and columns": (torch.empty(4, 1, 3).permute(1, 2, 0), (12, 1, 3)),
    "one of any stride": (torch.empty_strided((1, 3, 4), (1, 4, 1)), None),
    "one of no stride": (torch.empty_strided((1, 3, 4), (0, 1, 3)), (1, 1, 3)),
    "every second": (torch.empty(3, 8)[:, ::2], None),
}


@pytest.mark.parametrize(("values", "strides"), NOT_DENSE.values(), ids=NOT_DENSE)
def test_a_mask_of_values_that_are_not_dense(values: torch.Tensor, strides: tuple[int, ...] | None) -> None:
    """Expanded ones get a contiguous mask; the stride of a dim of one does not matter.

    strides: None where there is nothing to do.
    """
    mask, made, same = laid_out(values)
    assert made.stride() == (strides or mask.stride())
    assert same == (strides is None)


@pytest.mark.parametrize("output", ["bn", "nb"])
@pytest.mark.parametrize("layout", ["expanded", "columns"])
def test_masked_inputs_of_another_batch(layout: str, output: str) -> None:
    """With sizes that are symbols: the masked input is saved for the backward, which reads it in the order it has.

    Where the features come first in the output, they are not the last dim of the input that the matmul reads.
    """

    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.einsum(f"bk,nk->{output}", x, self.fc.weight)

    model = Einsum()
    backend = sp.sparse_backend({"fc": sp.ActivationSparsity(grad_input="masked")}, model=model)
    call = torch.compile(model, backend=backend, dynamic=True)
    for rows in (2, 4, 7):
        x = torch.randn(1, 64).expand(rows, 64) if layout == "expanded" else torch.randn(64, rows).T
        kept = mask_by_hand(x, "optimal")
        reference = copy.deepcopy(model)
        actual = run(call, {"weight": model.fc.weight}, [x.requires_grad_()])
        expected = run(lambda x, m=reference, k=kept: m(torch.where(k, x, 0)), {"weight": reference.fc.weight}, [x])
        found = errors(actual, expected)
        assert max(found.values()) < TOLERANCE[torch.float32], found
    assert {site.output for site in backend.report.sites} == {"masked_dense"}


@pytest.mark.parametrize("grad_input", ["dense", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_vector_that_is_multiplied_from_the_left(dtype: torch.dtype, grad_input: str) -> None:
    """Inductor makes a product of float32 and a sum of it, and the gradient of the weight from the vector as it is."""

    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc.weight @ x

    model, x = Left().to(dtype), torch.randn(64, dtype=dtype, requires_grad=True)
    scheme = sp.ActivationSparsity(mask="rowwise", grad_input=grad_input)
    backend = sp.sparse_backend({"fc": scheme}, model=model)
    kept, weight = mask_by_hand(x, "rowwise"), {"weight": model.fc.weight}
    actual = run(torch.compile(model, backend=backend), weight, [x])
    expected = run(lambda x: model(torch.where(kept, x, 0)), weight, [x])
    if grad_input == "dense":
        expected.gradients["input 0"] = run(model, weight, [x]).gradients["input 0"]
    found = errors(actual, expected)
    assert max(found.values()) < TOLERANCE[dtype], found
    (site,) = backend.report.sites
    assert (site.status, site.grad_weight) == ("masked_dense", "masked_dense")
