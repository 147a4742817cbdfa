"""Training: the mask follows the live weights, the model stays dense and untouched, and the way back is free."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from replaced_weights import REPLACED
from support import TOLERANCE, errors, in_threads, relative_error, run, ste_reference, twins
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch.utils.checkpoint import checkpoint

import sparse_pass as sp

W24 = sp.WeightSparsity()
CONFIG = {"up": W24, "down": W24}
FLOAT32 = TOLERANCE[torch.float32]
INNERS = pytest.mark.parametrize("inner", ["aot_eager", "inductor"])


class Net(nn.Module):
    """An MLP with buffers that training moves and with random numbers."""

    def __init__(self, dropout: float = 0.0, checkpointed: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = dropout
        self.checkpointed = checkpointed

    def body(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.tanh(self.norm(self.up(x))), self.dropout, self.training)
        return self.down(x)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x)


def compiled(model: nn.Module, inner: str = "aot_eager", scheme: sp.WeightSparsity = W24) -> Callable[..., Tensor]:
    config = dict.fromkeys(CONFIG, scheme)
    return torch.compile(model, backend=sp.sparse_backend(config, model=model, inner=inner))


def batches(count: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 8), torch.randn(size, 8)) for _ in range(count)]


def steps(
    call: Callable[..., Tensor], optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]
) -> list[float]:
    losses = []
    for x, target in data:
        loss = F.mse_loss(call(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def masks(model: Net) -> list[Tensor]:
    return [sp.mask24(layer.weight) for layer in (model.up, model.down)]


def agree(call: Callable[..., Tensor], model: nn.Module, x: Tensor, masked: bool = True) -> bool:
    """Whether ``call`` computes what the reference of the model, as it is now, does; or what the model does."""
    reference = ste_reference(model, CONFIG) if masked else copy.deepcopy(model)
    return relative_error(call(x), reference(x)) < FLOAT32


# The mask follows the weights


SCHEMES = [W24, sp.WeightSparsity(mask="greedy"), sp.WeightSparsity(grad_weight="masked"), sp.WeightSparsity(decay=0.1)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_training_is_that_of_the_reference(scheme: sp.WeightSparsity) -> None:
    """Twenty steps of AdamW on both sides; kept masks would part from the reference's."""
    model = Net()
    reference = ste_reference(model, dict.fromkeys(CONFIG, scheme))
    first = masks(model)
    data = batches(20)
    losses = steps(compiled(model, scheme=scheme), adamw(model), data)
    expected = steps(reference, adamw(reference), data)
    assert losses == pytest.approx(expected, rel=1e-3)
    for name in ("up", "down"):
        trained = reference.get_submodule(name).parametrizations.weight.original
        assert relative_error(model.get_submodule(name).weight, trained) < 1e-3
    # AdamW moved every mask: with those of the first forward the losses above would differ.
    assert all(not torch.equal(now, then) for now, then in zip(masks(model), first, strict=True))


@INNERS
def test_mask_follows_the_weight_in_the_next_forward(inner: str) -> None:
    """After each step in place the output is that of the new mask, not of the one before."""
    model = Net().eval()
    call, optimizer = compiled(model, inner), torch.optim.SGD(model.parameters(), lr=5.0)
    for x, target in batches(3):
        before = masks(model)
        steps(call, optimizer, [(x, target)])
        kept = copy.deepcopy(model)
        with torch.no_grad():
            for layer, mask in zip((kept.up, kept.down), before, strict=True):
                layer.weight.mul_(mask)
        assert agree(call, model, x)
        assert relative_error(call(x), kept(x)) > 0.01, "the step changed no mask: nothing was tested"


@pytest.mark.parametrize(("how", "inner"), [*((how, "aot_eager") for how in REPLACED), ("data", "inductor")])
def test_replaced_weights(how: str, inner: str) -> None:
    model, other, x = Net().eval(), Net().eval(), torch.randn(6, 8)
    call = compiled(model, inner)
    old = call(x)
    REPLACED[how](model, other)
    assert agree(call, model, x)
    assert relative_error(call(x), old) > 0.01
    reference = ste_reference(model, CONFIG)
    actual = run(call, dict(model.named_parameters()), [x])
    found = errors(actual, run(reference, twins(model, reference), [x]))
    assert max(found.values()) < FLOAT32


@pytest.mark.parametrize("named", [["0"], ["2"], ["0", "2"]], ids="+".join)
def test_tied_and_untied(named: list[str]) -> None:
    """Tied after the first step, and untied again: each linear as it is named."""
    config = dict.fromkeys(named, W24)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    call = torch.compile(model, backend=sp.sparse_backend(config, model=model, inner="aot_eager"))
    for tied in (False, True, False):
        model[2].weight = model[0].weight if tied else nn.Parameter(torch.randn(8, 8))
        x = torch.randn(5, 8, requires_grad=True)
        reference = ste_reference(model, config)
        actual = run(call, dict(model.named_parameters()), [x])
        found = errors(actual, run(reference, twins(model, reference), [x]))
        assert max(found.values()) < FLOAT32


def test_requires_grad_toggled() -> None:
    model, x = Net().eval(), torch.randn(6, 8)
    call = compiled(model)
    for frozen in (False, True, False):
        model.up.weight.requires_grad_(not frozen)
        call(x).sum().backward()
        assert agree(call, model, x)
        assert (model.up.weight.grad is None) == frozen
        model.zero_grad()


def test_moved_to_another_dtype() -> None:
    model, x = Net().eval(), torch.randn(6, 8)
    call = compiled(model)
    assert agree(call, model, x)
    model.double()
    assert relative_error(call(x.double()), ste_reference(model, CONFIG)(x.double())) < TOLERANCE[torch.float64]
    model.float()
    assert agree(call, model, x)


# The model is as it was


def test_state_dict_and_parameters_are_those_of_the_dense_model() -> None:
    model = Net()
    keys, identities = list(model.state_dict()), [id(p) for p in model.parameters()]
    call = compiled(model)
    steps(call, adamw(model), batches(2))
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == identities
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert all(bool((layer.weight != 0).all()) for layer in (model.up, model.down))
    Net().load_state_dict(model.state_dict())


def test_checkpoint_round_trip() -> None:
    """Saved in the middle and resumed in a new process' objects, training goes on as if it had not stopped."""
    model, data = Net(), batches(6)
    optimizer = adamw(model)
    call = compiled(model)
    steps(call, optimizer, data[:3])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    losses = steps(call, optimizer, data[3:])

    resumed = Net()
    optimizer = adamw(resumed)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert steps(compiled(resumed), optimizer, data[3:]) == losses
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name))


def test_gradient_accumulation() -> None:
    """Gradients of several backwards add up; decay counts once in each."""
    scheme = sp.WeightSparsity(grad_weight="masked", decay=0.1)
    model = Net().eval()
    reference = ste_reference(model, dict.fromkeys(CONFIG, scheme))
    call = compiled(model, scheme=scheme)
    for x, target in batches(3):
        for function in (call, reference):
            F.mse_loss(function(x), target).backward()
    for name in ("up", "down"):
        actual = model.get_submodule(name).weight.grad
        expected = reference.get_submodule(name).parametrizations.weight.original.grad
        assert actual is not None
        assert expected is not None
        assert relative_error(actual, expected) < FLOAT32


def test_repeated_runs_are_equal() -> None:
    def train() -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(7)
        model = Net(dropout=0.2)
        return steps(compiled(model), adamw(model), batches(4)), list(model.parameters())

    (losses, parameters), (again, others) = train(), train()
    assert losses == again
    assert all(torch.equal(p, q) for p, q in zip(parameters, others, strict=True))


def test_train_eval_no_grad_and_inference_in_turns() -> None:
    """One callable, a graph for each mode; BatchNorm's buffers move in training alone."""
    model, x = Net(), torch.randn(6, 8)
    reference = ste_reference(model, CONFIG)
    call = compiled(model)
    enabled, disabled = torch.enable_grad, torch.no_grad
    turns = [(True, enabled), (False, enabled), (False, torch.inference_mode), (False, disabled)]
    for training, mode in [*turns, *turns]:
        model.train(training)
        reference.train(training)
        with mode():
            assert relative_error(call(x), reference(x)) < FLOAT32
        assert torch.allclose(model.norm.running_mean, reference.norm.running_mean)


# Back to dense


@INNERS
def test_sparse_and_dense_side_by_side(inner: str) -> None:
    """The same parameters under the pass, under plain torch.compile and eager, in any order."""
    model = Net().eval()
    sparse = compiled(model, inner)
    dense = torch.compile(model, backend=inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    order = [sparse, dense, model, dense, sparse, model, sparse]
    for call, (x, target) in zip(order, batches(len(order)), strict=True):
        assert agree(call, model, x, masked=call is sparse)
        assert not agree(call, model, x, masked=call is not sparse)
        steps(call, optimizer, [(x, target)])


def test_dense_after_sparse_training() -> None:
    """Training begun sparse ends dense: one compiled step after the other on the same optimizer."""
    model = Net()
    twin = copy.deepcopy(model)
    reference = ste_reference(twin, CONFIG)
    data = batches(6)
    optimizer = adamw(model)
    losses = steps(compiled(model), optimizer, data[:3]) + steps(
        torch.compile(model, backend="aot_eager"), optimizer, data[3:]
    )

    other = adamw(reference)
    expected = steps(reference, other, data[:3])
    for name in ("up", "down"):
        parametrize = nn.utils.parametrize
        layer = reference.get_submodule(name)
        weight = layer.parametrizations.weight.original
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        assert layer.weight is weight
    expected += steps(reference, other, data[3:])
    assert losses == pytest.approx(expected, rel=1e-4)


def test_sparse_copies_of_one_model_with_two_schemes() -> None:
    """Two backends on the same parameters."""
    model, x = Net().eval(), torch.randn(6, 8)
    one = torch.compile(model, backend=sp.sparse_backend({"up": W24}, inner="aot_eager"))
    two = torch.compile(model, backend=sp.sparse_backend({"down": sp.WeightSparsity(mask="greedy")}, inner="aot_eager"))
    for _ in range(2):
        assert relative_error(one(x), ste_reference(model, {"up": W24})(x)) < FLOAT32
        expected = ste_reference(model, {"down": sp.WeightSparsity(mask="greedy")})(x)
        assert relative_error(two(x), expected) < FLOAT32
        assert relative_error(one(x), expected) > 0.01


# Deployment


@pytest.mark.parametrize(("mask", "inner"), [("optimal", "inductor"), ("greedy", "aot_eager")])
def test_pruned_dense_model_is_the_sparse_one(inner: str, mask: str) -> None:
    scheme = sp.WeightSparsity(mask=mask)
    model, x = Net(), torch.randn(6, 8)
    call = compiled(model, inner, scheme)
    steps(call, adamw(model), batches(5))
    model.eval()
    with torch.no_grad():
        expected = call(x)
        pruned = copy.deepcopy(model)
        report = sp.prune_(pruned, dict.fromkeys(CONFIG, scheme))
        assert relative_error(model(x), expected) > 0.01
        for dense in (pruned, torch.compile(pruned, backend=inner)):
            assert relative_error(dense(x), expected) < 1e-6
    assert [(site.fqn, site.status) for site in report.sites] == [("up", "sparse"), ("down", "sparse")]
    for layer, original in ((pruned.up, model.up), (pruned.down, model.down)):
        kept = layer.weight != 0
        assert kept.view(-1, layer.in_features // 4, 4).sum(-1).max() == 2
        assert kept.t().reshape(-1, layer.out_features // 4, 4).sum(-1).max() == 2
        assert torch.equal(layer.weight[kept], original.weight[kept])
    assert list(pruned.state_dict()) == list(model.state_dict())


def test_pruned_weights_stay_under_the_pass() -> None:
    """What is 2:4 already loses nothing: the pass gives the dense model's outputs and gradients."""
    model, x = Net().eval(), torch.randn(6, 8, requires_grad=True)
    sp.prune_(model, CONFIG)
    parameters = dict(model.named_parameters())
    found = errors(run(compiled(model), parameters, [x]), run(model, parameters, [x]))
    assert max(found.values()) < 1e-6


# explain


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_explain_leaves_no_trace(checkpointed: bool) -> None:
    model, x = Net(dropout=0.5, checkpointed=checkpointed), torch.randn(6, 8)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in gradients]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = sp.explain(model, CONFIG)(x)
    assert [(site.fqn, site.status) for site in report.sites] == [("up", "masked_dense"), ("down", "masked_dense")]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [parameter.grad for parameter in model.parameters()] == gradients
    assert all(torch.equal(gradient, value) for gradient, value in zip(gradients, values, strict=True))
    assert model.training
    model.eval()
    model.dropout = 0.0
    assert agree(compiled(model), model, x)
    assert agree(model, model, x, masked=False)


def test_explain_of_a_model_in_training() -> None:
    """Between two steps of a compiled model: the steps are those of a run without it."""

    def train(explained: bool) -> list[float]:
        torch.manual_seed(3)
        model = Net(dropout=0.3)
        call, optimizer, data = compiled(model), adamw(model), batches(4)
        losses = steps(call, optimizer, data[:2])
        if explained:
            sp.explain(call, CONFIG)(data[0][0])
        return losses + steps(call, optimizer, data[2:])

    assert train(True) == train(False)


# Calls from several threads, and transforms from outside


@INNERS
def test_threads_run_at_once(inner: str) -> None:
    """One compiled model: each thread gets the outputs and gradients of its own inputs."""
    model = Net().eval()
    call, reference = compiled(model, inner), ste_reference(model, CONFIG)
    inputs = [torch.randn(6, 8, requires_grad=True) for _ in range(4)]
    call(inputs[0]).sum().backward()
    inputs[0].grad = None
    together = threading.Barrier(len(inputs))
    errors: list[float] = []

    def work(x: Tensor) -> None:
        expected = torch.autograd.grad(reference(x).square().sum(), x)[0]
        together.wait()
        for _ in range(10):
            y = call(x)
            gradient = torch.autograd.grad(y.square().sum(), x)[0]
            errors.append(max(relative_error(y, reference(x)), relative_error(gradient, expected)))

    in_threads(work, inputs)
    assert len(errors) == 40
    assert max(errors) < FLOAT32


OUTSIDE = {
    "grad": lambda call, x: torch.func.grad(lambda x: call(x).square().sum())(x),
    "vmap": lambda call, x: torch.func.vmap(call)(x),
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (x.cos(),)),
}


@pytest.mark.parametrize("transform", OUTSIDE)
def test_transform_of_a_compiled_model_is_an_error_with_fullgraph(transform: str) -> None:
    """torch refuses it before any backend is asked; one inside the compiled function works (exact/test_shapes.py)."""
    model, x = Net().eval(), torch.randn(6, 8)
    call = torch.compile(model, backend=sp.sparse_backend(CONFIG, model=model, inner="aot_eager"), fullgraph=True)
    with pytest.raises(Unsupported, match=r"Ensure that torch.func.\w+ is also wrapped within a torch.compile"):
        OUTSIDE[transform](call, x)
    assert agree(call, model, x)
