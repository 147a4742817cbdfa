"""A named layer is sparse, or the user is told: wrappers that once lost names, and ways to hide a layer."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import StraightThrough
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import functional_call
from torch.nn.utils import parametrize

import sparse_pass as sp
from sparse_pass.dynamo.first_step import backend_of
from sparse_pass.graph_pass import _insist as insist

W24 = sp.WeightSparsity()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))


class Net(nn.Module):
    def __init__(self, depth: int = 2, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Forwarding(nn.Module):
    """Hands unknown attributes on to what it wraps, as PEFT's models, Fabric's wrapper and many others do."""

    def __init__(self, base_model: nn.Module) -> None:
        super().__init__()
        self.base_model = base_model

    def forward(self, x: Tensor) -> Tensor:
        return self.base_model(x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)


class OwnGetattr(Block):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class ConfigRoot(nn.Module):
    """A root with a `__getattr__` of its own, as of diffusers, two of whose children are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = Block(), Block()
        self.cfg = {"width": 16}

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(self.enc(x))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self.__dict__["cfg"]:
                return self.__dict__["cfg"][name]
            raise


def checkpointed() -> nn.Module:
    return checkpoint_wrapper(Block())


def batch() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def whole(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend=backend)


def by_blocks(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    for block in getattr(model, "base_model", model).blocks:
        block.compile(backend=backend)
    return model


def by_functional_call(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    """With other tensors than the parameters."""
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    compiled = torch.compile(lambda tensors, x: functional_call(model, tensors, (x,)), backend=backend)
    return lambda x: compiled(tensors, x)


def layers(report: sp.Report) -> set[str]:
    return {name for site in report.sites for name in (site.fqn, *site.serves)}


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*sparse_pass")
        yield


def reference_of(model: nn.Module, names: set[str]) -> nn.Module:
    """A copy whose layers of these names are straight-through; prefixes of wrappers do not count."""
    copied = copy.deepcopy(model)
    for path, module in list(copied.named_modules()):
        if path.replace("_checkpoint_wrapped_module.", "") in names:
            parametrize.register_parametrization(module, "weight", StraightThrough(W24))
    return copied


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.replace("parametrizations.weight.original", "weight"): parameter.grad
        for name, parameter in sorted(model.named_parameters())
    }


def check(
    model: nn.Module,
    config: Mapping[str, Any],
    names: set[str],
    compile: Callable[[nn.Module, Any], Callable[[Tensor], Tensor]],
    *,
    with_model: bool = True,
) -> sp.Report:
    """Train a step under ``strict``, without a warning: outputs and gradients of the reference, and the names."""
    reference = reference_of(model, names)
    backend = sp.sparse_backend(config, model=model if with_model else None, inner="aot_eager", strict=True)
    with silence():
        call = compile(model, backend)
        output = call(batch())
        if output.requires_grad:
            output.square().mean().backward()
            torch.optim.SGD(model.parameters(), lr=0.0).step()
        report = backend.report
    expected = reference(batch())
    torch.testing.assert_close(output, expected)
    if output.requires_grad:
        expected.square().mean().backward()
        wanted = gradients(reference)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, wanted[name])
    assert layers(report) == names
    assert (report.uncaptured, report.unmatched) == ((), ())
    return report


FC1 = {"blocks.*.fc1": W24}
BOTH = {"blocks.0.fc1", "blocks.1.fc1"}
BASE = "base_model."


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize(
    ("make", "config", "names", "compile"),
    [
        pytest.param(lambda: Net(block=checkpointed), FC1, BOTH, whole, id="checkpoint wrapper"),
        pytest.param(
            lambda: Net(block=checkpointed), {"blocks.1.fc1": W24}, {"blocks.1.fc1"}, whole, id="one of its kind"
        ),
        pytest.param(lambda: Net(block=OwnGetattr), FC1, BOTH, whole, id="own getattr below"),
        pytest.param(
            lambda: Forwarding(Forwarding(Net())),
            {f"{BASE}{BASE}blocks.*.fc1": W24},
            {f"{BASE}{BASE}{name}" for name in BOTH},
            whole,
            id="forwarding twice",
        ),
        pytest.param(
            lambda: Forwarding(Net(block=checkpointed)),
            {r"re:.*\.fc1": W24},
            {f"{BASE}{name}" for name in BOTH},
            whole,
            id="expression through both",
        ),
        pytest.param(ConfigRoot, {"dec.fc1": W24}, {"dec.fc1"}, whole, id="one of two children alike"),
        pytest.param(Net, {"blocks.1.fc1": W24}, {"blocks.1.fc1"}, by_functional_call, id="functional_call"),
    ],
)
def test_wrappers_change_nothing(
    make: Callable[[], nn.Module], config: Any, names: set[str], compile: Any, with_model: bool
) -> None:
    check(make(), config, names, compile, with_model=with_model)


class Region(Block):
    """Dynamo captures it once for all that are alike."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_regions_that_share_a_graph() -> None:
    report = check(Net(3, Region), FC1, {f"blocks.{i}.fc1" for i in range(3)}, whole)
    assert report.notes == ("the graph of blocks.1 also serves blocks.2",)
    model = Net(3, Region)
    backend = sp.sparse_backend({"blocks.1.fc1": W24}, model=model, inner="aot_eager")
    with pytest.raises(Exception, match=r"'blocks.1.fc1.weight', 'blocks.2.fc1.weight' share one graph .*differently"):
        torch.compile(model, backend=backend)(batch())


def test_weights_of_dynamic_sizes_are_skipped_with_the_remedy() -> None:
    """Tensors that functional_call is given are inputs: with ``dynamic=True`` their sizes are symbols."""
    model, x = Net(), batch()
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    backend = sp.sparse_backend(FC1, model=model, inner="aot_eager")
    compiled = torch.compile(lambda given, x: functional_call(model, given, (x,)), backend=backend, dynamic=True)
    torch.testing.assert_close(compiled(tensors, x), model(x))
    assert {(site.fqn, site.status) for site in backend.report.sites} == {
        ("blocks.0.fc1", "skipped"),
        ("blocks.1.fc1", "skipped"),
    }
    assert all("mark it with torch._dynamo.mark_static" in site.reason for site in backend.report.sites)
    for tensor in tensors.values():
        torch._dynamo.mark_static(tensor)
    torch._dynamo.reset()
    backend = sp.sparse_backend({"blocks.1.fc1": W24}, model=model, inner="aot_eager")
    compiled = torch.compile(lambda given, x: functional_call(model, given, (x,)), backend=backend, dynamic=True)
    torch.testing.assert_close(compiled(tensors, x), reference_of(model, {"blocks.1.fc1"})(x))
    assert [site.status for site in backend.report.sites] == ["masked_dense"]


@pytest.mark.parametrize("block", [Block, OwnGetattr, checkpointed])
@pytest.mark.parametrize("below", [False, True], ids=["", "below a wrapper"])
@pytest.mark.parametrize(("dense", "graphs"), [((), 2), ((1, 3, 5, 7), 3)], ids=["all alike", "half of them"])
def test_parts_one_by_one(block: Any, below: bool, dense: Sequence[int], graphs: int) -> None:
    """Two graphs for blocks that are alike, as the first input needs no gradient, and three where half are named."""
    model: nn.Module = Net(8, block)
    prefix = ""
    if below:
        model, prefix = Forwarding(model), BASE
    config = {f"{prefix}blocks.*.fc1": W24, **{f"{prefix}blocks.{i}.fc1": None for i in dense}}
    names = {f"{prefix}blocks.{i}.fc1" for i in range(8) if i not in dense}
    report = check(model, config, names, by_blocks)
    assert report.graphs == graphs


def test_who_runs_a_shared_graph() -> None:
    report = check(Net(4), FC1, {f"blocks.{i}.fc1" for i in range(4)}, by_blocks)
    assert [(site.fqn, site.serves) for site in report.sites] == [
        ("blocks.0.fc1", ()),
        ("blocks.1.fc1", ("blocks.2.fc1", "blocks.3.fc1")),
    ]
    assert report.notes == ("the graph of blocks.1 also serves blocks.2, blocks.3",)
    assert str(report).startswith("sparse_pass: 4 named linears in 2 graph(s): 4 masked_dense\n")


# Ways to hide a named layer


def disabled(model: nn.Module) -> nn.Module:
    model.blocks[1].forward = torch.compiler.disable(model.blocks[1].forward)
    return model


def hooked(model: nn.Module) -> nn.Module:
    model.blocks[1].fc1.register_full_backward_hook(lambda *_: None)
    return model


class Eager(Net):
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Shorter(Net):
    """Never calls its last block."""

    def forward(self, x: Tensor) -> Tensor:
        for block in list(self.blocks)[:-1]:
            x = block(x)
        return x


class Detour(Net):
    """Multiplies by a weight that a call outside of the compiled function has computed."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.twice(self.blocks[1].fc1.weight)
        return self.blocks[0](x) @ weight.T

    @torch.compiler.disable
    def twice(self, weight: Tensor) -> Tensor:
        return 2 * weight


def hide_block(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    return whole(disabled(model), backend)


def hide_by_hook(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    return whole(hooked(model), backend)


def one_of_two(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    model.blocks[0].compile(backend=backend)
    return model


def function_of_one_block(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    first = torch.compile(lambda x: model.blocks[0](x), backend=backend)
    return lambda x: model.blocks[1](first(x))


def beyond_the_limit(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    """Dynamo makes eight graphs of one code and no more: other backends had them."""
    for _ in range(torch._dynamo.config.recompile_limit):
        torch.compile(model, backend="eager", dynamic=False)
        one = sp.sparse_backend({"re:.*": None}, inner="aot_eager")
        torch.compile(model, backend=one)(batch())
    return whole(model, backend)


def replaced_layer(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    """Another layer stands in its place by the time that the model is called, and Dynamo does not see into it."""
    call = whole(model, backend)
    model.blocks[1].fc1.forward = torch.compiler.disable(nn.Linear(16, 32).forward)
    return call


def containers(model: nn.Module, backend: Any) -> Callable[[Tensor], Tensor]:
    """On torch 2.13 Dynamo makes no graph of a built-in container that is compiled by itself."""
    for block in model.blocks:
        block.compile(backend=backend)
    return model


def sequential() -> nn.Module:
    from collections import OrderedDict

    return nn.Sequential(OrderedDict(fc1=nn.Linear(16, 16), act=nn.ReLU()))


HIDDEN = [
    pytest.param(Net, hide_block, id="a disabled block"),
    pytest.param(Net, hide_by_hook, id="a full backward hook"),
    pytest.param(Eager, whole, id="a disabled model"),
    pytest.param(Net, one_of_two, id="one block compiled, two named"),
    pytest.param(lambda: Net(block=checkpointed), one_of_two, id="the same of checkpointed blocks"),
    pytest.param(Net, function_of_one_block, id="a function of one block"),
    pytest.param(Net, beyond_the_limit, id="no graph left"),
    pytest.param(Detour, whole, id="computed outside"),
    pytest.param(Shorter, whole, id="not called"),
    pytest.param(Net, replaced_layer, id="another layer in its place"),
]


def first_step(model: nn.Module, call: Callable[[Tensor], Tensor], optimizer: bool) -> None:
    call(batch()).square().mean().backward()
    if optimizer:
        torch.optim.AdamW(model.parameters(), lr=0.1).step()


NOT_RUN = {"not called", "another layer in its place"}
"""Such a layer gets no gradient: only an optimizer can tell that a step has ended."""


@pytest.mark.parametrize(("make", "compile"), HIDDEN)
def test_strict_ends_no_step_dense(make: Callable[[], nn.Module], compile: Any) -> None:
    """At the call, and before the optimizer changes anything."""
    model = make()
    call = compile(model, sp.sparse_backend(FC1, model=model, inner="aot_eager", strict=True))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((RuntimeError, ValueError), match=r"sparse_pass.*'blocks\.1\.fc1'"):
        first_step(model, call, optimizer=True)
    torch.testing.assert_close(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize(("make", "compile"), [one for one in HIDDEN if one.id not in NOT_RUN])
def test_strict_ends_no_backward_dense(make: Callable[[], nn.Module], compile: Any) -> None:
    """Without an optimizer of torch the gradient of the dense layer tells."""
    model = make()
    call = compile(model, sp.sparse_backend(FC1, model=model, inner="aot_eager", strict=True))
    with pytest.raises((RuntimeError, ValueError), match=r"sparse_pass.*'blocks\.1\.fc1'"):
        first_step(model, call, optimizer=False)


@pytest.mark.parametrize(("make", "compile"), HIDDEN)
def test_a_dense_layer_is_warned_of_once(make: Callable[[], nn.Module], compile: Any) -> None:
    """For patterns too."""
    model = make()
    backend = sp.sparse_backend(FC1, model=model, inner="aot_eager")
    call = compile(model, backend)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            first_step(model, call, optimizer=True)
        backend.report  # noqa: B018
    told = [str(one.message) for one in seen if "in no graph" in str(one.message)]
    assert len(told) == 1
    assert "'blocks.1.fc1'" in told[0]
    assert "blocks.1.fc1" in backend.report.uncaptured


@pytest.mark.skipif(torch.__version__ >= "2.14", reason="newer torch makes graphs of them")
def test_container_of_which_dynamo_makes_no_graph() -> None:
    model = Net(block=sequential)
    backend = sp.sparse_backend(FC1, model=model, inner="aot_eager", strict=True)
    call = containers(model, backend)
    with pytest.raises(RuntimeError, match=r"'blocks\.0\.fc1', 'blocks\.1\.fc1': in no graph after the first step"):
        first_step(model, call, optimizer=False)


@pytest.mark.skipif(torch.__version__ < "2.14", reason="older torch makes no graphs of them")
def test_container_compiled_by_itself() -> None:
    check(Net(block=sequential), FC1, BOTH, containers)


def test_dense_on_purpose_first() -> None:
    """What was compiled and not called yet says nothing of a dense step before it."""
    model = Net()
    backend = sp.sparse_backend(FC1, model=model, inner="aot_eager", strict=True)
    compiled = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with silence():
        for call in (model, compiled, model):
            call(batch()).sum().backward()
            optimizer.step()
    assert layers(backend.report) == BOTH


@pytest.mark.parametrize("in_place", [True, False])
def test_optimizer_that_calls_a_closure(in_place: bool) -> None:
    """The step begins before the forward, as of LBFGS, and of Lightning for all optimizers."""
    model = Net()
    backend = sp.sparse_backend(FC1, model=model, inner="aot_eager", strict=True)
    call = by_blocks(model, backend) if in_place else whole(model, backend)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = call(batch()).square().mean()
        loss.backward()
        return loss

    with silence():
        optimizer.step(closure)
    assert layers(backend.report) == BOTH


def test_optimizer_of_another_part() -> None:
    """As of two networks that take turns: what this one does not hold may run in another step."""
    model = Net()
    backend = sp.sparse_backend(FC1, model=model, inner="aot_eager", strict=True)
    call = by_blocks(model, backend)
    with silence():
        for block in model.blocks:
            optimizer = torch.optim.SGD(block.parameters(), lr=0.0)
            optimizer.step()  # to make its state: there are no gradients yet
            block(batch()).sum().backward()
            optimizer.step()
        call(batch())
    assert layers(backend.report) == BOTH


class ByMode(Net):
    """Dynamo sees evaluation alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.eagerly(x) if self.training else super().forward(x)

    @torch.compiler.disable
    def eagerly(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_captured_in_evaluation_alone() -> None:
    model = ByMode()
    backend = sp.sparse_backend(FC1, model=model, inner="aot_eager", strict=True)
    compiled = torch.compile(model, backend=backend)
    model.eval()
    with torch.no_grad(), silence():
        compiled(batch())
    model.train()
    with pytest.raises(RuntimeError, match=r"'blocks\.1\.fc1': in no graph"):
        compiled(batch()).sum().backward()


def test_captured_in_a_copy_alone() -> None:
    """As of an average of the weights that is evaluated and trained by itself."""
    model = disabled(Net())
    backend = sp.sparse_backend(FC1, model=model, inner="aot_eager", strict=True)
    other = copy.deepcopy(model)
    del other.blocks[1].forward
    torch.compile(other, backend=backend)(batch()).sum().backward()
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"'blocks\.1\.fc1': in no graph"):
        torch.compile(model, backend=backend)(batch()).sum().backward()


def test_a_whole_step_that_is_compiled() -> None:
    model = disabled(Net())
    backend = sp.sparse_backend(FC1, model=model, inner="aot_eager", strict=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile(backend=backend)
    def step(x: Tensor) -> None:
        model(x).square().mean().backward()
        optimizer.step()

    with pytest.raises(RuntimeError, match=r"'blocks\.1\.fc1': in no graph"):
        step(batch())


def test_function_of_a_weight() -> None:
    """It is compiled once and called with any: a guard keeps those that are treated otherwise apart."""
    model = Net(3)
    backend = sp.sparse_backend({"blocks.0.fc1": W24, "blocks.2.fc1": W24}, model=model, inner="aot_eager", strict=True)
    multiply = torch.compile(lambda x, w: nn.functional.linear(x, w), backend=backend)
    x = batch()
    with silence():
        outputs = [multiply(x, block.fc1.weight) for block in model.blocks]
        report = backend.report
    for index, block in enumerate(model.blocks):
        weight = block.fc1.weight
        kept = weight * sp.mask24(weight) if index != 1 else weight
        torch.testing.assert_close(outputs[index], x @ kept.T)
    assert layers(report) == {"blocks.0.fc1", "blocks.2.fc1"}


class SetUp(torch.autograd.Function):
    """In the form without a ctx in its forward, with a graph break inside."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x @ w.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w, grad.T @ x


class ByFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return SetUp.apply(x, self.fc.weight)


def test_function_whose_backward_runs_eagerly() -> None:
    """Not half of it is masked: it is an error, or skipped for a pattern."""
    model = ByFunction()
    backend = sp.sparse_backend({"re:.*": W24}, model=model, inner="aot_eager")
    x = batch().requires_grad_()
    output = torch.compile(model, backend=backend)(x)
    torch.testing.assert_close(output, x @ model.fc.weight.T)
    assert {site.status for site in backend.report.sites} == {"skipped"}
    assert "backward runs eagerly" in backend.report.sites[0].reason
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"cannot sparsify 'fc' \(named exactly\): its autograd\.Function"):
        torch.compile(model, backend=sp.sparse_backend({"fc": W24}, model=model, inner="aot_eager"))(x)


def test_another_model_of_the_same_process() -> None:
    model, other = Net(), Net()
    backend = sp.sparse_backend(FC1, model=model, inner="aot_eager", strict=True)
    model.blocks[0].compile(backend=backend)
    model.blocks[0](batch())
    with silence():
        other(batch()).sum().backward()
        torch.optim.SGD(other.parameters(), lr=0.0).step()


def test_hooks_go_when_all_is_captured() -> None:
    from torch._dynamo.callback import callback_handler
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    gc.collect()  # backends of other tests
    before = len(_global_optimizer_pre_hooks), len(callback_handler.start_callbacks)
    model = Net()
    backend = sp.sparse_backend(FC1, model=model, inner="aot_eager")
    assert model.blocks[0].fc1.weight._post_accumulate_grad_hooks
    torch.compile(model, backend=backend)(batch())
    assert not model.blocks[0].fc1.weight._post_accumulate_grad_hooks
    assert (len(_global_optimizer_pre_hooks), len(callback_handler.start_callbacks)) == before
    sp.sparse_backend(FC1, model=model)
    gc.collect()
    assert not model.blocks[0].fc1.weight._post_accumulate_grad_hooks
    assert (len(_global_optimizer_pre_hooks), len(callback_handler.start_callbacks)) == before


def test_last_graph_under_strict() -> None:
    """Beyond it Dynamo runs calls eagerly and tells nobody: an error while there is still one to raise."""
    model = Net()
    backend = sp.sparse_backend(FC1, model=model, inner="aot_eager", strict=True)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        compiled(batch())
        with pytest.raises(RuntimeError, match=r"recompile_limit = 2 graphs of one code"):
            compiled(torch.randn(4, 16))


# Copies, pickles, optimizers and arguments


def test_optimizer_in_the_compiled_function() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for with_model in (True, False):
        torch._dynamo.reset()
        options = {"model": model} if with_model else {}
        backend = sp.sparse_backend({"re:.*": W24}, inner="aot_eager", strict=True, **options)

        def step(x: Tensor) -> Tensor:
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        with silence():
            torch.compile(step, backend=backend)(batch())
        assert layers(backend.report) == {f"blocks.{i}.fc{j}" for i in (0, 1) for j in (1, 2)}
        assert backend.report.graphs == 1


def unpickled(compiled: Any) -> Any:
    return pickle.loads(pickle.dumps(compiled))


def saved(compiled: Any) -> Any:
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, unpickled, saved])
@pytest.mark.parametrize("gone", [True, False], ids=["original gone", "original there"])
def test_copy_of_a_compiled_model(again: Callable[[Any], Any], gone: bool) -> None:
    model = Net()
    compiled = torch.compile(model, backend=sp.sparse_backend(FC1, model=model, inner="aot_eager", strict=True))
    other = again(compiled)
    if gone:
        del model, compiled
        gc.collect()
    pruned = copy.deepcopy(other._orig_mod)
    sp.prune_(pruned, FC1)
    with silence():
        output = other(batch())
        output.sum().backward()
    torch.testing.assert_close(output, pruned(batch()))
    report = backend_of(other.dynamo_ctx.callback).report
    assert (layers(report), report.uncaptured) == (BOTH, ())


def test_a_copy_of_a_backend_is_the_backend() -> None:
    backend = sp.sparse_backend(FC1, model=(model := Net()), inner="aot_eager")
    assert copy.deepcopy({"backend": backend})["backend"] is copy.copy(backend) is backend
    torch.compile(model, backend=copy.deepcopy(backend))(batch())
    assert layers(backend.report) == BOTH


def test_compiled_module_given_as_the_model() -> None:
    model = Net()
    backend = sp.sparse_backend(FC1, model=torch.compile(model), inner="aot_eager")
    gc.collect()
    torch.compile(model, backend=backend)(batch())
    assert (layers(backend.report), backend.report.uncaptured) == (BOTH, ())


def test_keywords_of_newer_torch() -> None:
    model = Net()
    backend = sp.sparse_backend(FC1, model=model, inner="aot_eager")
    torch.compile(model, backend=lambda graph, inputs: backend(graph, inputs, name="net"))(batch())
    assert layers(backend.report) == BOTH


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: torch.compile(m, backend=sp.sparse_backend)(batch()), r"backend=sparse_backend\(config\)"),
        (lambda m: sp.sparse_backend(FC1, m), r"give the model as a keyword: sparse_backend\(config, model=model\)"),
        (lambda m: sp.sparse_backend(FC1, "inductor"), "takes the config alone by position"),
        (lambda m: torch.compile(m, backend=sp.SparsePass(FC1))(batch()), r"write backend=sparse_backend\(config\)"),
        (lambda m: sp.explain(m, FC1, batch()), r"explain\(model, config\)\(x\)"),
    ],
)
def test_arguments_in_the_wrong_place(call: Callable[[nn.Module], Any], text: str) -> None:
    with pytest.raises((TypeError, RuntimeError), match=text):
        call(Net())


def test_unknown_option_in_one_line() -> None:
    with pytest.raises(RuntimeError, match="'max_fusion_siz' is neither") as raised:
        sp.sparse_backend(FC1, max_fusion_siz=8)
    assert "'max_fusion_size'" in str(raised.value)
    assert len(str(raised.value)) < 400


# To insist on 2:4 kernels


def insisting(device: str, **fields: Any) -> None:
    """Hand a pass that insists a graph of that device, with one row."""
    row = {"fqn": "fc1", "pattern": "fc1", "scheme": W24, "shape": (8, 32, 16), "dtype": torch.bfloat16}
    site = {**row, "reason": "because", **fields}
    graph = torch.fx.Graph()
    with FakeTensorMode():
        graph.placeholder("weight").meta["val"] = torch.empty(32, 16, device=device)
    graph.output(())
    insist(sp.Report(sites=(sp.Site(**site),), graphs=1), graph)


@pytest.mark.parametrize("status", ["masked_dense", "skipped"])
def test_require_sparse(status: str) -> None:
    with pytest.raises(ValueError, match=rf"require='sparse': no 2:4 kernel for 'fc1' is {status}: because$"):
        insisting("cuda", status=status)
    insisting("cuda", status=status, measured=True)
    insisting("cuda", status="sparse")
    insisting("cpu", status=status)


def test_require_sparse_on_a_cpu() -> None:
    """It is of the layers on a GPU: the same script runs on a laptop."""
    check_required = sp.sparse_backend(FC1, model=(model := Net()), inner="aot_eager", require="sparse")
    torch.compile(model, backend=check_required)(batch())
    with pytest.raises(ValueError, match="require='fast': expected None or 'sparse'"):
        sp.sparse_backend(FC1, require="fast")
