"""What the tests share: the straight-through reference, the comparison with it, graph invariants, tolerances."""

from __future__ import annotations

import copy
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from compile_time import quick_dynamo
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

import sparse_pass as sp
from sparse_pass.config import input_scheme, weight_scheme
from sparse_pass.ops.reference import gradients as reference_gradients
from sparse_pass.ops.reference import weights as masks

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}
"""Relative error (Frobenius norm) that rounding may cause in the models of these tests, by GEMM dtype.
A dropped or misplaced mask costs 0.1 and more."""

Config = Mapping[str, sp.WeightSparsity | None]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``, in float64; shapes must be equal."""
    assert actual.shape == expected.shape, f"shape {actual.shape} is not {expected.shape}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype} is not {expected.dtype}"
    actual, expected = actual.detach().double(), expected.detach().double()
    difference, norm = (actual - expected).norm(), expected.norm()
    return float(difference / norm) if norm else float(difference)


# The reference


class _Replaced(torch.autograd.Function):
    """Another value, whose gradient goes to the weight, all of it or where there is a mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.mask = mask
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad if ctx.mask is None else torch.where(ctx.mask, grad, 0), None, None


class StraightThrough(nn.Module):
    """S(w), with the gradient of w; where the scheme says so masked as w is."""

    def __init__(self, scheme: sp.WeightSparsity) -> None:
        super().__init__()
        self.scheme = scheme

    def forward(self, weight: Tensor) -> Tensor:
        mask = sp.mask24(weight, self.scheme.mask)
        masked = self.scheme.grad_weight == "masked"
        if self.scheme.factor == 1:  # by what torch.func transforms, too
            kept = torch.where(mask, weight, torch.zeros_like(weight))
            return kept if masked else weight + (kept - weight).detach()
        kept = torch.where(mask, weight.detach(), 0) * self.scheme.factor
        return _Replaced.apply(weight, kept, mask if masked else None)  # type: ignore[no-any-return]


def named_parameters(model: nn.Module, config: Config) -> dict[str, sp.WeightSparsity]:
    """The parameters that a config means, where its entries do not overlap. Not the code under test."""
    chosen = {}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            tensors |= {f"{path}.{leaf}": getattr(module, leaf) for leaf in module.parametrizations}
    for name, parameter in tensors.items():
        for key, scheme in config.items():
            plain = re.escape(key).replace(r"\*", "[^.]+")
            pattern = f"({key[3:]})" if key.startswith("re:") else plain
            if scheme and parameter.dim() == 2 and re.fullmatch(rf"{pattern}(\.weight)?", name):
                chosen[name] = scheme
    return chosen


def ste_reference(model: nn.Module, config: Config) -> nn.Module:
    """A deep copy of ``model`` whose named parameters are parametrized by `StraightThrough`.

    Of a tied weight only the named places are masked. ``decay`` is added once per parameter.
    """
    reference = copy.deepcopy(model)
    decayed = set()
    for name, scheme in named_parameters(model, config).items():
        owner, _, leaf = name.rpartition(".")
        parametrize.register_parametrization(reference.get_submodule(owner), leaf, StraightThrough(scheme))
        weight = getattr(reference.get_submodule(owner).parametrizations[leaf], "original", None)
        if scheme.decay and weight.requires_grad and id(weight) not in decayed:
            decayed.add(id(weight))
            weight.register_hook(lambda gradient, w=weight, s=scheme: gradient + decay_of(w, s))
    return reference


def decay_of(weight: Tensor, scheme: sp.WeightSparsity) -> Tensor:
    """What the scheme's decay adds to the gradient of a weight."""
    return scheme.decay * weight.detach() * ~sp.mask24(weight, scheme.mask)


def original_name(name: str) -> str:
    """Name in the model of a parameter of its reference."""
    return re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)


def twins(model: nn.Module, reference: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a reference, by the names and in the order of the model's."""
    originals = {
        original_name(name): parameter for name, parameter in reference.named_parameters(remove_duplicate=False)
    }
    return {name: originals[original_name(name)] for name, _ in model.named_parameters()}


# Running


@dataclass(frozen=True)
class Result:
    """Float tensors that one call gave: outputs, and gradients by the name of what they belong to."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor | None]


def run(
    function: Callable[..., Any],
    parameters: Mapping[str, Tensor],
    inputs: Sequence[Any],
    *,
    backward: bool = True,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    mark_dynamic: bool = False,
) -> Result:
    """Call ``function`` under ``context``, pull back the same cotangents every time, return all of it."""
    inputs = [_leaf(value) for value in inputs]
    for tensor in inputs if mark_dynamic else ():
        torch._dynamo.mark_dynamic(tensor, 0)
    for parameter in parameters.values():
        parameter.grad = None
    with context():
        result = function(*inputs)
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    gradients: dict[str, Tensor | None] = {}
    if backward:
        differentiable = [output for output in outputs if output.requires_grad]
        generator = torch.Generator().manual_seed(0)
        cotangents = [
            torch.randn(output.shape, generator=generator, dtype=torch.float32).to(output) for output in differentiable
        ]
        torch.autograd.backward(differentiable, cotangents)
        leaves = {f"input {i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor)}
        gradients = {name: leaf.grad for name, leaf in {**parameters, **leaves}.items()}
        for parameter in parameters.values():
            parameter.grad = None
    return Result(tuple(output.detach() for output in outputs), gradients)


def _leaf(value: Any) -> Any:
    """The same values in the same strides, as a leaf of a new graph."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().requires_grad_(value.requires_grad)


def python_environment(**variables: str) -> dict[str, str]:
    """For a process that is to import what this one can; with more variables."""
    path = os.pathsep.join([str(Path(sp.__file__).parents[1]), *sys.path])
    return {**os.environ, "PYTHONPATH": path, **variables}


def in_threads(work: Callable[[Any], None], each: Iterable[Any]) -> None:
    """Call ``work`` once for each, all at once, and wait for all."""
    threads = [threading.Thread(target=work, args=(one,)) for one in each]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def errors(actual: Result, expected: Result) -> dict[str, float]:
    """Relative error of every output and gradient, by name.

    A gradient that is zero but for rounding, such as that of the bias of keys before a softmax, is measured
    against the largest gradient.
    """
    norms = [float(gradient.norm()) for gradient in expected.gradients.values() if gradient is not None]
    assert len(actual.outputs) == len(expected.outputs)
    assert actual.gradients.keys() == expected.gradients.keys()
    found = {
        f"output {i}": relative_error(a, e)
        for i, (a, e) in enumerate(zip(actual.outputs, expected.outputs, strict=True))
    }
    for name, gradient in actual.gradients.items():
        other = expected.gradients[name]
        assert (gradient is None) == (other is None), f"only one side has a gradient of {name}"
        if gradient is not None and other is not None:
            tiny = float(other.norm()) < 1e-5 * max(norms)
            error = float((gradient - other).norm()) / max(norms) if tiny else relative_error(gradient, other)
            found[f"gradient of {name}"] = error
    return found


@contextmanager
def fresh_compile() -> Iterator[None]:
    """No compiled code and no compile cache from before: with a warm cache the pass would not run at all."""
    torch._dynamo.reset()
    with (
        # Not force_disable_caches: it would compile the C++ headers again for every kernel.
        torch._inductor.config.patch(force_disable_caches=False, fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
        quick_dynamo(),
    ):
        yield
    torch._dynamo.reset()


def compare(
    model: nn.Module,
    config: Config,
    *batches: Sequence[Any],
    masked: Config | None = None,
    sites: int | None = None,
    graphs: int | None = None,
    status: str = "masked_dense",
    inner: str = "aot_eager",
    dynamic: bool | str = False,
    entry: Callable[[nn.Module], Callable[..., Any]] = lambda model: model,
    named: nn.Module | str | None = "model",
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    backward: bool = True,
    same_gradients: bool = False,
    tolerance: float = TOLERANCE[torch.float32],
) -> float:
    """Compile ``model`` with the pass, run ``batches`` through it, and compare all with the reference.

    Asserts that outputs and every gradient agree; that the reference is not the dense model, so that a pass
    that does nothing fails; the number and status of the sites of the report; the invariants of each
    rewritten graph; and that no parameter changed.

    Args:
        batches: positional inputs of each call.
        masked: what the reference masks, if it is not what ``config`` says by `named_parameters`.
        sites: named linears per graph (default: the number of masked parameters).
        graphs: graphs that are compiled (default: one, or with ``dynamic=False`` one per batch).
        status: of every site.
        dynamic: as torch.compile's, or ``"batch"``: the first dim of every input is marked dynamic.
        entry: makes the function that is called, and compiled, from the model.
        named: the backend's ``model=``; by default ``model``.
        context: entered around each call, such as autocast.
        same_gradients: whether the mask is known to have no influence on any gradient.
        tolerance: greatest relative error.

    Returns:
        float: the greatest relative error.
    """
    masked = config if masked is None else masked
    chosen = named_parameters(model, masked)
    reference, dense = ste_reference(model, masked), copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    backend = sp.sparse_backend(config, model=model if named == "model" else named, inner=inner)
    worst, mark = 0.0, dynamic == "batch"
    options = {"backward": backward, "context": context}
    with fresh_compile(), invariants_checked():
        compiled = torch.compile(entry(model), backend=backend, dynamic=None if mark else dynamic)
        for inputs in batches:
            actual = run(compiled, dict(model.named_parameters()), inputs, mark_dynamic=mark, **options)
            expected = run(entry(reference), twins(model, reference), inputs, **options)
            unmasked = run(entry(dense), dict(dense.named_parameters()), inputs, **options)
            found = errors(actual, expected)
            worst = max(worst, *found.values())
            wrong = {name: error for name, error in found.items() if not error <= tolerance}
            assert not wrong, f"relative errors above {tolerance}: {wrong}"
            if any(output.numel() for output in expected.outputs):
                changed = errors(unmasked, expected)
                enough = 5 * tolerance
                assert any(changed[key] > enough for key in changed if key.startswith("output")), (
                    f"the reference gives the dense outputs: {changed}"
                )
                if backward and not same_gradients:
                    assert any(changed[key] > enough for key in changed if "gradient" in key), (
                        f"the reference gives the dense gradients: {changed}"
                    )
        report = backend.report
    sites = len(chosen) if sites is None else sites
    graphs = (1 if dynamic else len(batches)) if graphs is None else graphs
    assert report.unmatched == (), str(report)
    assert len(report.sites) == sites * graphs, f"expected {graphs} graphs with {sites} sites\n{report}"
    assert {site.status for site in report.sites} == {status}, str(report)
    after = model.state_dict()
    assert list(after) == list(before)
    for name in dict(model.named_parameters()):
        assert name not in before or torch.equal(after[name], before[name]), f"{name} was changed"
    return worst


# 2:4 inputs


def mask_by_hand(x: Tensor, mask: str) -> Tensor:
    """As the docstring says it, not the code under test."""
    matrix = x.detach().reshape(-1, x.shape[-1])
    if mask == "rowwise":
        groups = matrix.abs().reshape(matrix.shape[0], matrix.shape[1] // 4, 4)
        this, other = groups.unsqueeze(-1), groups.unsqueeze(-2)
        earlier = torch.ones(4, 4, dtype=torch.bool, device=x.device).tril(-1)
        kept = ((other > this) | ((other == this) & earlier)).sum(-1) < 2
    else:
        rows = matrix.shape[0]
        padded = torch.zeros(rows + -rows % 4, x.shape[-1], dtype=x.dtype, device=x.device)
        padded[:rows] = matrix
        kept = masks.mask24(padded, mask)[:rows]
    return kept.reshape(x.shape)


def masked_input(x: Tensor, scheme: sp.ActivationSparsity) -> Tensor:
    kept = torch.where(mask_by_hand(x, scheme.mask), x, torch.zeros_like(x))
    return kept if scheme.grad_input == "masked" else x + (kept - x).detach()


class MaskedProduct(torch.autograd.Function):
    """Both schemes: S(X) W^T; dY S(W); dY^T S(X), or MVUE(dY^T) X with the seeds that were drawn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, both: Any, drawn: list[Any]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.both, ctx.drawn = both, drawn
        scheme = input_scheme(both)
        return torch.where(mask_by_hand(x, scheme.mask), x, 0) @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        on_weight, on_input = weight_scheme(ctx.both), input_scheme(ctx.both)
        kept, mask = mask_by_hand(x, on_input.mask), sp.mask24(weight, on_weight.mask)
        grad_input = grad @ torch.where(mask, weight, 0)
        if on_input.grad_input == "masked":
            grad_input = torch.where(kept, grad_input, 0)
        if on_weight.grad_weight == "mvue":
            seen, seed = ctx.drawn.pop(0)
            assert relative_error(seen, grad) < TOLERANCE[grad.dtype]
            grad_weight = reference_gradients.mvue24(seen, seed).T @ x
        else:
            grad_weight = grad.T @ torch.where(kept, x, 0)
        if on_weight.grad_weight == "masked":
            grad_weight = torch.where(mask, grad_weight, 0)
        return grad_input, grad_weight + decay_of(weight, on_weight), None, None


def hook_inputs(model: nn.Module, config: Mapping[str, Any], drawn: list[Any]) -> nn.Module:
    """Give the named linears of ``model`` masked inputs, and the masked weights of a tuple; returns ``model``.

    drawn: what the operators of 2:4 gradients were given, grad_output and seed, in order.
    """

    def masking(scheme: sp.ActivationSparsity) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            autocast = torch.is_autocast_enabled("cpu")
            return (masked_input(inputs[0].to(torch.get_autocast_dtype("cpu")) if autocast else inputs[0], scheme),)

        return hook

    def product(both: Any) -> Callable[..., Any]:
        def forward(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            (x,) = inputs
            y = MaskedProduct.apply(x.reshape(-1, x.shape[-1]), module.weight, both, drawn)
            return (y if module.bias is None else y + module.bias).view(output.shape)

        return forward

    for name, scheme in config.items():
        module = model.get_submodule(name)
        if isinstance(scheme, tuple):
            module.register_forward_hook(product(scheme))
        else:
            module.register_forward_pre_hook(masking(scheme))
    return model


def compare_inputs(
    model: nn.Module,
    config: Mapping[str, Any],
    *batches: Tensor,
    inner: str = "aot_eager",
    kernel: str = "masked_dense",
    dynamic: bool | str = False,
    context: Callable[[], Any] = nullcontext,
    backward: bool = True,
    sites: int | None = None,
    copied: Callable[[nn.Module], nn.Module] = copy.deepcopy,
    tolerance: float = TOLERANCE[torch.float32],
) -> sp.Report:
    """As `compare`, for schemes of inputs: compile with the pass, train a step per batch, all must be the reference's.

    Args:
        kernel: of every ``output``.
        copied: makes the model whose linears `hook_inputs` gives masked inputs.
    """
    backend = sp.sparse_backend(config, model=model, inner=inner)
    drawn: list[Any] = []
    estimate = reference_gradients._estimate

    def record(grad: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        drawn.append((grad.clone(), seed.clone()))
        return estimate(grad, seed)

    options = {"context": context, "backward": backward}
    with fresh_compile(), invariants_checked():
        compiled = torch.compile(model, backend=backend, dynamic=None if dynamic == "batch" else dynamic)
        for x in batches:
            with mock.patch.object(reference_gradients, "_estimate", record):
                actual = run(compiled, dict(model.named_parameters()), [x], mark_dynamic=dynamic == "batch", **options)
            reference = hook_inputs(copied(model), config, drawn)
            expected = run(reference, dict(reference.named_parameters()), [x], **options)
            assert not drawn
            found = errors(actual, expected)
            assert max(found.values()) < tolerance, found
            dense = errors(run(model, dict(model.named_parameters()), [x], **options), expected)
            if x.numel():
                assert max(dense[key] for key in dense if key.startswith("output")) > 5 * tolerance
                # A frozen weight leaves the gradients of bias and input, which the mask reaches by detours only.
                if backward and any(site.grad_weight for site in backend.report.sites):
                    assert max(dense[key] for key in dense if "gradient" in key) > 5 * tolerance
    count = len(config) if sites is None else sites
    assert len(backend.report.sites) == count * (1 if dynamic else len(batches)), str(backend.report)
    assert {site.output for site in backend.report.sites} == {kernel}, str(backend.report)
    assert backend.report.unmatched == ()
    return backend.report


# 2:4 gradients


def probabilities(group: list[float]) -> np.ndarray:
    """min(1, c a_i) with the c that makes them sum to two, by bisection; for groups of three or four nonzeros."""
    magnitude = np.abs(np.array(group, dtype=np.float64))
    low, high = 0.0, 2 / np.sort(magnitude[magnitude > 0])[0]
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * magnitude).sum() < 2 else (low, middle)
    return np.minimum(1, high * magnitude)


def closed_form(grad: Tensor) -> Tensor:
    """Variance of each element [M, N]."""
    rows, cols = grad.shape
    padded = torch.nn.functional.pad(grad.T, (0, -rows % 4)).reshape(-1, 4)
    variance = np.zeros(padded.shape)
    for place, group in enumerate(padded.tolist()):
        if np.count_nonzero(group) > 2:
            p = probabilities(group)
            magnitude = np.abs(group)
            variance[place] = np.where(magnitude > 0, magnitude**2 * (1 / np.maximum(p, 1e-300) - 1), 0)
    return torch.from_numpy(variance).reshape(cols, -1)[:, :rows].T


def assert_unbiased(draws: Tensor, grad: Tensor) -> None:
    """Of float64 draws [number, M, N] of a grad [M, N]: the mean and the variance, within their standard errors."""
    exact = grad.double()
    variance = closed_form(exact)
    rounding = 0 if grad.dtype.itemsize > 2 else torch.finfo(grad.dtype).eps / 2
    # Up to half a unit of a kept value, whose probability makes it one of the dense value.
    deviation = (draws.mean(0) - exact).abs() - rounding * exact.abs()
    assert (deviation <= 4 * (variance / len(draws)).sqrt() + 1e-6 * exact.abs()).all()
    # A kept value is v or nothing: the sample variance has a standard error of its own.
    measured, fourth = draws.var(0), ((draws - draws.mean(0)) ** 4).mean(0)
    error = ((fourth - measured**2).clamp(min=0) / len(draws)).sqrt()
    assert ((measured - variance).abs() <= 5 * error + (1e-5 + 8 * rounding) * variance + 1e-12).all()
    assert variance.max() > 0.1


# Packed matrices


def bits(values: Tensor) -> Tensor:
    """Values as integers, all NaN alike: a conversion may choose their payload."""
    if values.dtype.itemsize == 1:
        return values.view(torch.uint8)
    return torch.where(values.isnan(), 0x7FFF, values.view(torch.int16))


def split_packed(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Values, and bytes of metadata."""
    half = packed.numel() // 5 * 4 if packed.dtype.itemsize == 1 else packed.numel() // 9 * 8
    return packed[:half], packed[half:].view(torch.uint8)


def assert_same_packed(actual: Tensor, expected: Tensor, about: object) -> None:
    """Bit for bit, but for the payload of a NaN."""
    (values, metadata), (their_values, their_metadata) = split_packed(actual), split_packed(expected)
    for name, wrong in (("values", bits(values) != bits(their_values)), ("metadata", metadata != their_metadata)):
        places = wrong.nonzero()[:4].flatten().tolist()
        assert not wrong.any(), f"{about}: {int(wrong.sum())} of {wrong.numel()} {name} differ, first at {places}"


# Graphs


@dataclass(frozen=True)
class GraphFacts:
    """What a rewrite of a graph must keep."""

    placeholders: tuple[str, ...]
    outputs: tuple[Any, ...]
    dead: frozenset[Node]
    nodes: frozenset[Node]
    tags: tuple[dict[str, Any], ...]


def graph_facts(graph: Graph | GraphModule) -> GraphFacts:
    """Take down what `check_invariants` compares with."""
    graph = graph.graph if isinstance(graph, GraphModule) else graph
    return GraphFacts(
        placeholders=tuple(node.name for node in graph.nodes if node.op == "placeholder"),
        outputs=tuple(_value(leaf) for leaf in tree_leaves(graph.output_node().args)),
        dead=frozenset(node for node in graph.nodes if _is_dead(node)),
        nodes=frozenset(graph.nodes),
        tags=tuple(_tags(node) for node in graph.nodes if node.op == "call_function"),
    )


def check_invariants(graph: Graph | GraphModule, before: GraphFacts | None = None) -> None:
    """Assert that a rewritten graph is sound.

    It passes lint; its dead nodes were dead before; each node that is new or reads a new one computes what its
    ``meta["val"]`` says (shape, dtype, device, and the strides that say where an element lies: that of a dim of size 1
    does not). With ``before``, placeholders and the outputs' number, shapes, dtypes and devices are as they were, and
    each new node bears the metadata (module stack, seq_nr, partitioner and recompute tags) of one old node; without
    it, all nodes count as new.
    """
    graph = graph.graph if isinstance(graph, GraphModule) else graph
    graph.lint()
    after = graph_facts(graph)
    old = before.nodes if before else frozenset()
    new_dead = after.dead - (before.dead if before else frozenset())
    assert not new_dead, f"dead nodes: {new_dead}"
    if before:
        assert after.placeholders == before.placeholders
        assert len(after.outputs) == len(before.outputs)
        for position, (now, then) in enumerate(zip(after.outputs, before.outputs, strict=True)):
            difference = _difference(now, then, strides=False)
            assert not difference, f"output {position}: {difference}"
        new = [n for n in graph.nodes if n.op == "call_function" and n not in old]
        lost = [node.name for node in new if _tags(node) not in before.tags]
        assert not lost, f"nodes whose metadata is no copy of an old node's: {lost}"
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node in old and not any(source not in old for source in node.all_input_nodes):
            continue
        assert "val" in node.meta, f"{node} has no meta['val']"
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        mode = _fake_mode(node)
        # The dispatcher: torch 2.11 computes no aten.linear of symbolic sizes without it.
        with mode if mode is not None else nullcontext(), torch.no_grad(), enable_python_dispatcher():
            value = node.target(*args, **kwargs)
        pairs = zip(tree_leaves(value), tree_leaves(node.meta["val"]), strict=True)
        wrong = [text for now, then in pairs if (text := _difference(now, then, strides=True))]
        assert not wrong, f"{node.format_node()}: computed against meta['val']: {wrong}"


@contextmanager
def invariants_checked() -> Iterator[None]:
    """Check every graph that a SparsePass rewrites."""
    original = sp.SparsePass.__call__

    def call(self: sp.SparsePass, graph: Graph) -> None:
        before = graph_facts(graph)
        original(self, graph)
        check_invariants(graph, before)

    with mock.patch.object(sp.SparsePass, "__call__", call):
        yield


def _is_dead(node: Node) -> bool:
    return node.op == "call_function" and not node.users and not node.is_impure()


def _tags(node: Node) -> dict[str, Any]:
    own = {"val", "tensor_meta", "eager_input_vals", "desc"}
    tags = {key: value for key, value in node.meta.items() if key not in own}
    if tags.get("partitioner_tag") == "must_be_in_backward":  # said of a new node, that it may not move
        tags["partitioner_tag"] = "is_backward"
    return tags


def _value(leaf: Any) -> Any:
    return leaf.meta.get("val") if isinstance(leaf, Node) else leaf


def _fake_mode(node: Node) -> Any:
    for value in tree_leaves([n.meta["val"] for n in (node, *node.all_input_nodes)]):
        if getattr(value, "fake_mode", None) is not None:
            return value.fake_mode
    return None


def _difference(now: Any, then: Any, *, strides: bool) -> str:
    """How two fake values differ; empty if they do not."""
    if not isinstance(now, Tensor) or not isinstance(then, Tensor):
        number = (int, float, torch.SymInt, torch.SymFloat)
        if isinstance(now, number) and isinstance(then, number):
            return "" if statically_known_true(now == then) else f"{now} against {then}"
        return "" if type(now) is type(then) else f"{now} against {then}"
    if (now.dtype, now.device, now.dim()) != (then.dtype, then.device, then.dim()):
        return f"{now} against {then}"
    sizes = [*now.shape, *(_strides(now) if strides else ())]
    others = [*then.shape, *(_strides(then) if strides else ())]
    same = all(statically_known_true(a == b) for a, b in zip(sizes, others, strict=True))
    return "" if same else f"{now.shape}, {now.stride()} against {then.shape}, {then.stride()}"


def _strides(value: Tensor) -> list[Any]:
    """Those of dims larger than 1, if there are elements. Of one row, or none, a pointwise op makes contiguous ones,
    whatever strides they had."""
    if any(statically_known_true(size == 0) for size in value.shape):
        return []
    pairs = zip(value.shape, value.stride(), strict=True)
    return [0 if statically_known_true(size == 1) else stride for size, stride in pairs]
