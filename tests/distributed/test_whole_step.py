"""`rewrite` on graphs of a whole training step, as make_fx traces them, against the joint route and the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_printer import printed
from ranks import CONFIG, W24, batch, loss_of, network
from support import TOLERANCE, relative_error, ste_reference, twins
from torch import Tensor, nn
from torch._functorch._aot_autograd.logging_utils import setup_stacktrace_preservation_hooks
from torch._inductor.decomposition import select_decomp_table
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import sparse_pass as sp


class Shared(nn.Module):
    """Three linears of the inputs of the model, one weight for two calls, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 8, bias=False) for _ in range(3))
        self.out = nn.Linear(8, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        y = self.out(torch.softmax(q @ k.mT, -1) @ v)
        return self.frozen(y) + self.out(torch.tanh(self.v(y)))


def shared() -> Shared:
    torch.manual_seed(0)
    return Shared()


Step = Callable[[list[Tensor], Tensor, Tensor], Any]


def step_of(
    model: nn.Module, update: Callable[[Tensor, Tensor], Tensor] | None = None, *, marks: bool = False
) -> tuple[list[str], Step]:
    """A training step as a function of the parameters, and their names.

    Args:
        update: gives a new parameter of an old one and its gradient; then these are returned, and not the gradients.
        marks: have autograd mark what it computes, as graph trainers do.
    """
    names = list(dict(model.named_parameters()))
    trained = [place for place, one in enumerate(model.parameters()) if one.requires_grad]

    def step(parameters: list[Tensor], x: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        loss = loss_of(functional_call(model, dict(zip(names, parameters, strict=True)), (x,)), classes)
        if marks:
            setup_stacktrace_preservation_hooks([loss.grad_fn])
        gradients = torch.autograd.grad(loss, [parameters[place] for place in trained])
        if update is None:
            return loss, *gradients
        return loss, *(update(parameters[place], one) for place, one in zip(trained, gradients, strict=True))

    return names, step


def leaves(model: nn.Module) -> list[Tensor]:
    return [one.detach().clone().requires_grad_(one.requires_grad) for one in model.parameters()]


def traced(model: nn.Module, step: Step, **options: Any) -> GraphModule:
    with torch.fx.traceback.preserve_node_meta():
        return make_fx(step, tracing_mode="fake", **options)(leaves(model), *batch(0))


def expected(model: nn.Module, config: Mapping[str, Any]) -> list[Tensor]:
    """Loss and gradients of the reference."""
    reference = ste_reference(model, config)
    x, classes = batch(0)
    loss = loss_of(reference(x), classes)
    loss.backward()
    found = [twin.grad for twin in twins(model, reference).values()]
    return [loss.detach(), *(one for one in found if one is not None)]


def check(model: nn.Module, config: Mapping[str, Any], *, marks: bool = False, **options: Any) -> sp.Report:
    names, step = step_of(model, marks=marks)
    graph = traced(model, step, **options)
    if marks and not any(node.meta.get("autograd_backward") for node in graph.graph.nodes):
        pytest.skip("this torch marks nothing")
    report = sp.rewrite(graph, config, parameters=names)
    actual, wanted = graph(leaves(model), *batch(0)), expected(model, config)
    dense = step(leaves(model), *batch(0))
    errors = [relative_error(one, other) for one, other in zip(actual, wanted, strict=True)]
    assert max(errors) < TOLERANCE[torch.float32], errors
    assert max(relative_error(one, other) for one, other in zip(dense, wanted, strict=True)) > 0.01
    assert report.unmatched == ()
    assert {site.training for site in report.sites} == {True}
    return report


MASKED = sp.WeightSparsity(grad_weight="masked", decay=0.1)
DECOMPOSED = {"decomposition_table": select_decomp_table()}


@pytest.mark.parametrize("options", [{}, {"marks": True}, DECOMPOSED], ids=["bare", "marked", "decomposed"])
@pytest.mark.parametrize("config", [CONFIG, {"re:.*fc[12]": MASKED}], ids=["dense", "masked"])
def test_network(config: Mapping[str, Any], options: dict[str, Any]) -> None:
    report = check(network(), config, **options)
    for site in report.sites:
        assert (site.status, site.output, site.grad_input, site.grad_weight) == (
            "masked_dense", "masked_dense", "masked_dense", "dense",
        )  # fmt: skip
        assert site.reason == "no 2:4 kernels on cpu"


def test_shared_inputs_and_weights() -> None:
    report = check(shared(), {"*": W24})
    assert [site.fqn for site in report.sites] == ["q", "k", "v", "out", "frozen", "v", "out"]
    report = check(shared(), {"out": sp.WeightSparsity(grad_weight="masked"), "v": W24})
    with pytest.raises(ValueError, match=r"'q': .* several products of its input may be the gradient"):
        check(shared(), {"q": sp.WeightSparsity(grad_weight="masked")})


class WithOnes(nn.Sequential):
    """A forward that makes a one itself, which is no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](torch.where(self[0](x) > 0, torch.ones_like(x.sum()), x))


def test_a_one_of_the_forward() -> None:
    torch.manual_seed(0)
    check(WithOnes(nn.Linear(16, 16).requires_grad_(False), nn.Linear(16, 16)), {"1": MASKED}, **DECOMPOSED)


def test_same_numbers_as_the_joint_route() -> None:
    model = network()
    names, step = step_of(model)
    graph = traced(model, step)
    sp.rewrite(graph, CONFIG, parameters=names)
    loss, *gradients = graph(leaves(model), *batch(0))
    run = torch.compile(model, backend=sp.sparse_backend(CONFIG, model=model, inner="aot_eager"))
    x, classes = batch(0)
    joint = loss_of(run(x), classes)
    joint.backward()
    assert torch.equal(loss, joint)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient), name


def test_with_the_optimizer_inside() -> None:
    def update(parameter: Tensor, gradient: Tensor) -> Tensor:
        return parameter * (1 - 0.1 * 0.01) - 0.1 * gradient

    model, config = network(), {**CONFIG, "blocks.0.fc2": sp.WeightSparsity(grad_weight="masked")}
    names, step = step_of(model, update)
    graph = traced(model, step)
    report = sp.rewrite(graph, config, parameters=names)
    assert len(report.sites) == 4
    _, *updated = graph(leaves(model), *batch(0))
    _, *gradients = expected(model, config)
    for parameter, new, gradient in zip(model.parameters(), updated, gradients, strict=True):
        assert relative_error(new, update(parameter, gradient)) < TOLERANCE[torch.float32]
    with pytest.raises(ValueError, match="the graph does not return it: add the decay in the optimizer"):
        sp.rewrite(traced(model, step), {"blocks.0.fc1": sp.WeightSparsity(decay=0.1)}, parameters=names)


def test_estimates_of_grad_output() -> None:
    """With a 2:4 grad_output, found by what its product multiplies."""
    model = network()
    names, step = step_of(model)
    graph = traced(model, step)
    scheme = sp.WeightSparsity(grad_weight="mvue")
    (site,) = sp.rewrite(graph, {"blocks.1.fc1": scheme}, parameters=names).sites
    assert site.grad_weight == "masked_dense"
    torch.manual_seed(1)
    actual = graph(leaves(model), *batch(0))
    wanted = expected(model, {"blocks.1.fc1": W24})
    errors = [relative_error(one, other) for one, other in zip(actual, wanted, strict=True)]
    place = 1 + names.index("blocks.1.fc1.weight")
    assert errors[place] > 0.1
    assert max(error for at, error in enumerate(errors) if at != place) < TOLERANCE[torch.float32]


def test_two_inputs() -> None:
    """2:4 inputs go the same way."""
    model = network()
    names, step = step_of(model)
    graph = traced(model, step)
    (site,) = sp.rewrite(graph, {"blocks.1.fc2": sp.ActivationSparsity()}, parameters=names).sites
    assert (site.output, site.grad_input, site.grad_weight) == ("masked_dense", "dense", "masked_dense")


def test_names_are_those_of_leading_placeholders() -> None:
    model = network()
    names, step = step_of(model)
    with pytest.raises(ValueError, match="parameters= has 30 names, and the graph 16 placeholders"):
        sp.rewrite(traced(model, step), CONFIG, parameters=names * 2 + names[:2])
    assert sp.rewrite(traced(model, step), {"blocks.7.fc1": W24}, parameters=names).unmatched == ("blocks.7.fc1",)


def test_golden() -> None:
    def step(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        loss = F.linear(x, weight).square().mean()
        return loss, *torch.autograd.grad(loss, [weight])

    graph = make_fx(step, tracing_mode="fake")(torch.randn(8, 8, requires_grad=True), torch.randn(4, 8))
    sp.rewrite(graph, {"fc": W24}, parameters=["fc.weight"])
    assert_expected_inline(
        printed(graph.graph),
        """\
mask24 = sparse_pass.mask24(weight_1, 'optimal')
full = aten.full(0)
where = aten.where(mask24, weight_1, full)
t = aten.t(where)
mm = aten.mm(x_1, t)
pow = aten.pow(mm, 2)
mean = aten.mean(pow)
ones_like = aten.ones_like(mean, memory_format=torch.preserve_format)
expand = aten.expand(ones_like)
div = aten.div(expand, 32)
pow_1 = aten.pow(mm, 1.0)
mul = aten.mul(pow_1, 2.0)
mul_1 = aten.mul(div, mul)
t_1 = aten.t(mul_1)
mm_1 = aten.mm(t_1, x_1)
t_2 = aten.t(mm_1)
t_3 = aten.t(t_2)
return mean, t_3""",
    )
