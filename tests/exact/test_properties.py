r"""Random networks: compiled with the pass, each computes what its straight-through reference does.

A failing example is printed as a line of Python that runs it again. The environment sets how long and where::

    SPARSE_PASS_EXAMPLES=5000   examples of each inner compiler (default: 240 by aot_eager, 15 by Inductor, a third of
                                these with its loops; if set: all with its loops)
    SPARSE_PASS_INNER=inductor  only this inner compiler
    SPARSE_PASS_SEED=1          other examples (default: 0); Hypothesis' own seed is not used
    SPARSE_PASS_DEVICE=cuda     where the networks live (default: cpu)

They are spread over several tests, for ``pytest -n``. A run on a GPU::

    SPARSE_PASS_EXAMPLES=2000 SPARSE_PASS_DEVICE=cuda SPARSE_PASS_INNER=aot_eager \
        pytest -n 4 tests/exact/test_properties.py
"""

from __future__ import annotations

import copy
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import random_float8
import random_reference
import random_seen
import torch
from float8_by_hand import scale_by_hand
from hypothesis import Phase, given, note, seed, settings
from hypothesis import strategies as st
from random_networks import (
    DTYPES,
    FUSED,
    MODULES,
    Block,
    Example,
    Layer,
    Network,
    Place,
    compiled_as,
    examples,
    meant,
    places,
)
from random_reference import has_kernel, reference_of
from random_seen import Match, Seen
from support import TOLERANCE, Result, errors, fresh_compile, invariants_checked, run, twins
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.utils._pytree import tree_map

import sparse_pass as sp
from sparse_pass.config import gradient_scheme, input_scheme, is_float8, weight_scheme

DEVICE = os.environ.get("SPARSE_PASS_DEVICE", "cpu")
SEED = int(os.environ.get("SPARSE_PASS_SEED", "0"))
INNERS = [os.environ["SPARSE_PASS_INNER"]] if "SPARSE_PASS_INNER" in os.environ else ["aot_eager", "inductor"]
EXAMPLES = {"aot_eager": 240, "inductor": 15}
SHARDS = {"aot_eager": 4, "inductor": 3}
ALL_LOOPS = DEVICE != "cpu" or "SPARSE_PASS_EXAMPLES" in os.environ

KERNEL = "cusparselt" if DEVICE == "cuda" else "reference"


def gemm_dtype(example: Example) -> torch.dtype:
    return DTYPES[example.autocast or example.dtype]


def modes(example: Example) -> AbstractContextManager[Any]:
    if not example.autocast:
        return nullcontext()
    return torch.autocast(DEVICE, DTYPES[example.autocast])


def by_hand(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """Outputs on the CPU, where `run` makes their cotangents."""
    return tree_map(torch.Tensor.cpu, function(*inputs))


def check(example: Example, inner: str, masked: Callable[[Example, Place], Any] = meant) -> sp.Report:
    """Compile an example's network with the pass and compare with the reference; check the report.

    Compared are outputs, the gradients of parameters and input, what was masked or drawn from, and a second call, which
    must give the same bits from the same seed.

    Args:
        masked: the scheme of each place in the reference; other than by default the check must fail.
    """
    network = example.network(DEVICE)
    before = copy.deepcopy(network.state_dict())
    known = places(network)
    schemes = {}
    for place in known:
        scheme = masked(example, place)
        if scheme is not None and place.takes(scheme):
            schemes[place.name] = scheme

    def backend_of(model: nn.Module) -> Any:
        model = model if example.named else None
        return sp.sparse_backend(dict(example.config), model=model, inner=inner, tune="off")

    options = {"backward": example.training and _has_leaves(example, network), "context": partial(modes, example)}
    tolerance = TOLERANCE[gemm_dtype(example)]
    drawn: dict[tuple[str, str], set[bool]] = {}
    # As eager calls round: between ops that it fuses Inductor keeps float32, and a relu of nearly zero can tell.
    rounded = inductor_config.patch(emulate_precision_casts=True)
    with fresh_compile(), rounded, invariants_checked(), torch.set_grad_enabled(example.training):
        mark = example.dynamic == "batch"
        compiled, backend = compiled_as(example, network, backend_of, None if mark else bool(example.dynamic))
        for x in example.inputs(DEVICE):
            call = partial(run, inputs=[x], **options)
            parameters = dict(network.named_parameters())
            match = Match(seen := Seen())
            torch.manual_seed(example.seed)
            with seen.watching():
                actual = call(partial(by_hand, compiled), parameters, mark_dynamic=mark)
            torch.manual_seed(example.seed)
            again = call(partial(by_hand, compiled), parameters)
            reference = reference_of(network, schemes, match)
            expected = call(partial(by_hand, reference), twins(network, reference))
            exact = partial(_exact, network, schemes, match, x, options)
            _compare(_with(actual, match, 0), _with(expected, match, 1), exact, tolerance)
            match.check_all_taken(tolerance)
            _compare_bits(actual, again)
            for name, which in match.drawn.items():
                drawn.setdefault(name, set()).update(which)
        report = backend.report
    _check_report(report, example, network, known, inner)
    _check_drawn(report, drawn)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was changed"
    return report


def _has_leaves(example: Example, network: Network) -> bool:
    return example.input_grad or any(parameter.requires_grad for parameter in network.parameters())


def _compare(actual: Result, expected: Result, exact: Callable[[], Result], tolerance: float) -> None:
    """Where rounding alone makes large errors the reference has them too: then both are held against float64."""
    wrong = {name: error for name, error in errors(actual, expected).items() if not error <= tolerance}
    if wrong:
        truth = exact()
        ours, theirs = errors(_double(actual), truth), errors(_double(expected), truth)
        wrong = {name: (wrong[name], ours[name], theirs[name]) for name in wrong if not ours[name] <= 3 * theirs[name]}
    assert not wrong, f"relative errors above {tolerance} (to the reference, of both to float64): {wrong}"


def _exact(network: Network, schemes: dict[str, Any], like: Match, x: Tensor, options: dict[str, Any]) -> Result:
    precise = copy.deepcopy(network).double()
    reference = reference_of(precise, schemes, match := Match(like.seen, like))
    x = x.detach().double().requires_grad_(x.requires_grad)
    result = run(partial(by_hand, reference), twins(precise, reference), [x], backward=options["backward"])
    return _with(result, match, 1)


def _with(result: Result, match: Match, side: int) -> Result:
    """Beside the outputs what was masked or drawn from: as the compiled network had it, or as the reference has it."""
    return Result((*result.outputs, *(pair[side].cpu() for pair in match.pairs)), result.gradients)


def _double(result: Result) -> Result:
    gradients = {name: None if value is None else value.double() for name, value in result.gradients.items()}
    return Result(tuple(output.double() for output in result.outputs), gradients)


def _compare_bits(one: Result, two: Result) -> None:
    pairs = [*zip(one.outputs, two.outputs, strict=True), *((v, two.gradients[k]) for k, v in one.gradients.items())]
    same = all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)
    assert same, "a second call gave other bits"


def _check_report(report: sp.Report, example: Example, network: Network, known: list[Place], inner: str) -> None:
    """Every named linear of every graph is there, rewritten or skipped, each with its GEMMs and its reason."""
    named = {place.name: scheme for place in known if (scheme := meant(example, place))}
    counts = Counter(site.fqn for site in report.sites)
    assert report.unmatched == (), str(report)
    uses = {}
    differentiable = example.input_grad
    for index, (place, block) in enumerate(zip(known, network.blocks, strict=True)):
        gradients = {"grad_input": {differentiable}, "grad_weight": {block.fc.weight.requires_grad}}
        differentiable |= any(parameter.requires_grad for parameter in block.fc.parameters())
        if block.again:
            gradients["grad_input"].add(differentiable)
        uses[place.name] = (2 if block.layer.way == "halves" else 1) * (2 if block.again else 1)
        product = block.layer.way == "einsum" and place.k == 1  # there is nothing to sum: torch makes no matmul of it
        if product:
            uses[place.name] = 1
        for site in report.sites:
            if site.fqn == place.name:
                assert site.scheme == named.get(place.name), str(site)
                if product:
                    assert (site.status, site.output, site.shape[1:]) == ("skipped", None, (place.n, 1)), str(site)
                    assert "no matmul of this weight was found" in site.reason, str(site)
                    continue
                # Of a vector Inductor makes a product and a sum, in float32.
                vector = inner == "inductor" and site.shape[0] == 1
                assert site.dtype in (gemm_dtype(example), torch.float32 if vector else gemm_dtype(example)), str(site)
                _check_site(site, place, block.layer, site.dtype)
                _check_fused(site, example, block, network.blocks[index - 1] if index else None)
                for gemm, possible in gradients.items():
                    has = getattr(site, gemm) is not None
                    # Gradients that are empty Inductor may leave out, as behind a norm.
                    possible = {*possible, False} if inner == "inductor" and site.shape[0] == 0 else possible
                    assert has in {example.training and one for one in possible}, f"{gemm} of {site}\n{report}"
    if any(site.serves for site in report.sites):
        # Parts that are alike may share a graph, whose sites bear the names of the first.
        names = {name for site in report.sites for name in (site.fqn, *site.serves)}
        assert names == named.keys(), f"named: {named}\n{report}"
        return
    assert counts.keys() == named.keys(), f"named: {named}\n{report}"
    if not example.broken:
        graphs = dict.fromkeys(named, report.graphs)
        if example.wrapped == "one by one":
            # Each part has its own; of dynamic sizes that happen to be equal the next call may need another one, and of
            # a mark on the first size if others change, too.
            most = 2 if example.dynamic == "all" or (example.dynamic and len(example.batch) > 1) else 1
            graphs = {name: min(counts[name] // uses[name], most) for name in named}
        expected = Counter({name: uses[name] * graphs[name] for name in named})
        assert counts == expected, f"expected {expected}\n{report}"


def _check_site(site: sp.Site, place: Place, layer: Layer, dtype: torch.dtype) -> None:
    assert (site.status == "sparse") or site.reason, str(site)
    n, k = place.n, place.k
    if layer.way != "halves":
        assert site.shape[1:] == (n, k), str(site)
    if not place.takes(site.scheme):
        assert (site.status, site.output, site.fused) == ("skipped", "dense", None), str(site)
        assert "multiple" in site.reason, str(site)
        return
    on_weight, on_input, on_grad = (of(site.scheme) for of in (weight_scheme, input_scheme, gradient_scheme))
    mvue = {name for name in ("grad_weight", "grad_input") if getattr(on_grad, name, None) == "mvue"}
    # Torch makes a bmm of a linear whose input cannot be viewed as rows, if its weight, or a cast of it, is frozen.
    other_op = "the graph has it as" in site.reason
    left_dense = {name for name in mvue if getattr(site, name) == "dense"}
    for name in left_dense:
        reason = rf"{name}: the graph has it as \S+, not as one matmul of grad_output and"
        assert re.search(reason, site.reason), str(site)
    if not left_dense:
        assert not any(word in site.reason for word in ("left dense", "left as captured")), str(site)
    assert "not found" not in site.reason, str(site)
    assert "not rounded" not in site.reason, str(site)

    def possible(scheme: Any, *multiples: int) -> bool:
        return has_kernel(scheme, dtype, (n, k), multiples, DEVICE)

    by_weight, by_grad = possible(on_weight, 64, 64), possible(on_grad, 64, 16)
    by_input = possible(on_input, 16, 64) and on_input is not None and on_input.mask != "rowwise"
    for gemm, expected in {
        "output": by_input if on_input is not None else by_weight if on_weight is not None else None,
        "grad_input": by_grad if "grad_input" in mvue else by_weight if on_weight is not None else None,
        "grad_weight": by_grad if "grad_weight" in mvue else by_input if on_input is not None else None,
    }.items():
        kernel = getattr(site, gemm)
        if kernel is None or gemm in left_dense:
            continue
        if expected is None:
            # By the matmul that torch has for float8 on a GPU.
            assert kernel == "dense" or (kernel == "float8" and is_float8(site.scheme)), f"{gemm}: {site}"
        elif not expected:
            # Half of a weight may have another N that fits.
            assert kernel == "masked_dense" or (kernel == KERNEL and layer.way == "halves"), f"{gemm}: {site}"
        elif kernel != KERNEL:
            assert kernel == "masked_dense", f"{gemm}: {site}"
            usual = layer.way in (*MODULES, "F.linear") and not other_op
            # Inputs with the features outermost have a grad_input with the weight on the left.
            left = gemm == "grad_input" and "grad_input: the weight is the left operand of the matmul" in site.reason
            empty = is_float8(site.scheme) and site.shape[0] == 0 and "there is nothing to round" in site.reason
            assert left or empty or not usual, f"{gemm}: {site}"
    sparse = KERNEL in (site.output, site.grad_input, site.grad_weight)
    assert site.status == ("sparse" if sparse else "masked_dense"), str(site)


def _check_fused(site: sp.Site, example: Example, block: Block, previous: Block | None) -> None:
    """Nothing is fused but the activation function right before, and that is where nothing else reads it."""
    scheme = input_scheme(site.scheme)
    name = None if previous is None else FUSED.get(previous.layer.activation)
    assert site.fused in (None, name), str(site)
    if scheme is None or previous is None or name is None or site.fused is not None:
        return
    plain = all(one.layer.way == "module" and not one.layer.residual and not one.again for one in (block, previous))
    plain &= not (block.layer.before or previous.layer.after or example.autocast or example.broken or example.dynamic)
    plain &= name != "relu" and example.layout == "contiguous"  # relu's gradient reads its result
    checkpointed = block.layer.checkpointed or previous.layer.checkpointed
    sparse = site.output == KERNEL and site.grad_weight in (None, KERNEL) and scheme.grad_input == "dense"
    on_grad = gradient_scheme(site.scheme)
    mvue = on_grad is not None and on_grad.grad_weight == "mvue"  # reads all of the input
    frozen = site.grad_weight is None
    assert not (plain and sparse) or checkpointed or mvue or frozen, f"not fused: {site}"


def _check_drawn(report: sp.Report, drawn: dict[tuple[str, str], set[bool]]) -> None:
    """The gradients that the report says are 2:4 were drawn, and no others."""
    if any(site.serves for site in report.sites):
        return
    for (name, gemm), which in drawn.items():
        said = {getattr(site, gemm) != "dense" for site in report.sites if site.fqn == name and getattr(site, gemm)}
        assert which <= said, f"drawn for {gemm} of {name}: {which}\n{report}"


def _reproduce(example: Example, inner: str) -> str:
    """A line for a shell in the folder above ``tests``."""
    environment = f"SPARSE_PASS_DEVICE={DEVICE} PYTHONPATH=tests/helpers:tests/exact"
    imports = "from sparse_pass import *; from test_properties import *"
    return f"""{environment} python -c "{imports}; print(check({example!r}, {inner!r}))" """


def shards() -> list[Any]:
    return [
        pytest.param(inner, shard, id=f"{inner}-{shard}", marks=[pytest.mark.loops] * (ALL_LOOPS or shard == 2))
        for inner in INNERS
        for shard in range(SHARDS[inner])
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("inner", "shard"), shards())
def test_networks(inner: str, shard: int) -> None:
    total = int(os.environ.get("SPARSE_PASS_EXAMPLES", EXAMPLES[inner]))

    passed: set[Example] = set()

    @seed(SEED * 1000 + shard)
    @settings(
        max_examples=-(-total // SHARDS[inner]),
        deadline=None,  # a compilation takes what it takes
        database=None,  # the seed alone decides what is run
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @given(example=examples())
    def agrees(example: Example) -> None:
        check_once(example, inner, passed)

    agrees()


def check_once(example: Example, inner: str, passed: set[Example]) -> None:
    """`check` what has not passed yet: of many examples Hypothesis repeats every third.

    What passed ends the same again. With `assume` it would not, and while a failing example is shrunk what passed comes
    again: "flaky" is all that would be reported.
    """
    if example not in passed:
        note(_reproduce(example, inner))
        check(example, inner)
        passed.add(example)


# The property itself: it fails where the pass would be wrong


PLAIN = Example(
    layers=(Layer(width=64, activation="tanh"), Layer(width=32)),
    config=(("blocks.*.fc", sp.WeightSparsity(grad_weight="masked", decay=5.0)),),
    features=64,
)


def changed(**fields: Any) -> Callable[[Example, Place], Any]:
    return lambda example, place: replace(sp.WeightSparsity(grad_weight="masked", decay=5.0), **fields)


INPUTS = replace(PLAIN, config=(("blocks.*.fc", sp.ActivationSparsity(grad_input="masked")),))
DRAWN = replace(PLAIN, config=(("blocks.*.fc", sp.WeightSparsity(grad_weight="mvue")),), batch=(12,))
GRADIENTS = replace(PLAIN, config=(("blocks.*.fc", sp.GradientSparsity(grad_input="mvue")),), batch=(12,))
FLOAT8 = replace(PLAIN, config=(("blocks.*.fc", sp.WeightSparsity(precision="float8")),))
DRAWN_FLOAT8 = replace(DRAWN, config=(("blocks.*.fc", sp.WeightSparsity(precision="float8", grad_weight="mvue")),))
DENSE_FLOAT8 = replace(DRAWN, config=(("blocks.*.fc", sp.GradientSparsity(precision="float8")),))
PAIR = replace(PLAIN, config=(("blocks.*.fc", (sp.WeightSparsity(), sp.ActivationSparsity())),))


def instead(scheme: Any, *names: str) -> Callable[[Example, Place], Any]:
    """Another scheme of the places so named, or of all."""
    return lambda example, place: scheme if not names or place.name in names else meant(example, place)


WRONG = {
    "first dense": (PLAIN, instead(None, "blocks.0.fc")),
    "last dense": (PLAIN, instead(None, "blocks.1.fc")),
    "other masks": (PLAIN, changed(mask="greedy")),
    "gradient unmasked": (PLAIN, changed(grad_weight="dense")),
    "no decay": (PLAIN, changed(decay=0.0)),
    "other decay": (PLAIN, changed(decay=10.0)),
    "first input dense": (INPUTS, instead(None, "blocks.0.fc")),
    "last input dense": (INPUTS, instead(None, "blocks.1.fc")),
    "other masks of inputs": (INPUTS, instead(sp.ActivationSparsity(mask="rowwise", grad_input="masked"))),
    "gradient of inputs unmasked": (INPUTS, instead(sp.ActivationSparsity())),
    "nothing drawn for the first": (DRAWN, instead(sp.WeightSparsity(), "blocks.0.fc")),
    "nothing drawn for the last": (DRAWN, instead(sp.WeightSparsity(), "blocks.1.fc")),
    "nothing drawn for grad_input": (GRADIENTS, instead(sp.GradientSparsity(), "blocks.1.fc")),
    "nothing drawn for grad_weight": (
        GRADIENTS,
        instead(sp.GradientSparsity(grad_weight="dense", grad_input="mvue"), "blocks.0.fc"),
    ),
    "first not in float8": (FLOAT8, instead(sp.WeightSparsity(), "blocks.0.fc")),
    "last not in float8": (FLOAT8, instead(sp.WeightSparsity(), "blocks.1.fc")),
    "float8 scaled": (FLOAT8, instead(sp.WeightSparsity(precision="float8", scale=1.05))),
    "dense weights not in float8": (DENSE_FLOAT8, instead(sp.GradientSparsity(), "blocks.0.fc")),
    "estimates not in float8": (DRAWN_FLOAT8, instead(sp.WeightSparsity(grad_weight="mvue"))),
    "inputs alone": (PAIR, instead(sp.ActivationSparsity())),
    "weights alone": (PAIR, instead(sp.WeightSparsity())),
}


ONE_FEATURE = replace(PLAIN, layers=(Layer(width=5), Layer(width=8, before="but the first four", way="einsum")))
# Torch multiplies such an input first and then adds the bias: two roundings, and one element more survives the relu.
ADDED_APART = Example(
    layers=(Layer(width=124, before="unsqueeze", activation="relu"),),
    config=(("blocks.*.fc", sp.WeightSparsity(grad_weight="mvue")),),
    features=8,
    batch=(8,),
    layout="expanded features",
    dtype="float16",
    seed=2,
)
RIGHT = {
    "weights": PLAIN,
    "inputs": INPUTS,
    "drawn": DRAWN,
    "gradients": GRADIENTS,
    "float8": FLOAT8,
    "drawn in float8": DRAWN_FLOAT8,
    "dense in float8": DENSE_FLOAT8,
    "float8 kernels": replace(
        DRAWN_FLOAT8,
        layers=(Layer(width=64, activation="tanh"), Layer(width=128)),
        config=(("*.*.*", sp.WeightSparsity(precision="float8", grad_weight="mvue", backend="cusparselt")),),
        autocast="float16",
    ),
    "pair": PAIR,
    "one feature": ONE_FEATURE,
    "added apart": ADDED_APART,
}


@pytest.mark.parametrize("right", RIGHT.values(), ids=RIGHT)
def test_the_reference_of_these_is_right(right: Example) -> None:
    check(right, "aot_eager")


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_reference_is_noticed(wrong: str) -> None:
    example, masked = WRONG[wrong]
    for one in (example, replace(example, autocast="bfloat16")):
        with pytest.raises(AssertionError, match="relative errors"):
            check(one, "aot_eager", masked=masked)


@pytest.mark.parametrize("module", [random_reference, random_seen, random_float8], ids=["weight", "estimate", "others"])
def test_wrong_scales_of_float8_are_noticed(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By half a scale most numbers become the same. Each of these files has the scale of an operand."""
    monkeypatch.setattr(module, "scale_by_hand", lambda *args: scale_by_hand(*args) / 2)
    with pytest.raises(AssertionError, match=r"rounded,? times"):
        check(DRAWN_FLOAT8, "aot_eager")


def test_numbers_that_are_not_rounded_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_float8, "rounded", lambda tensor, scale: tensor)
    with pytest.raises(AssertionError, match="relative errors"):
        check(FLOAT8, "aot_eager")


def test_a_printed_example_runs_again(capsys: pytest.CaptureFixture[str]) -> None:
    """But for the new process."""
    *environment, python, _, code = shlex.split(_reproduce(PLAIN, "aot_eager"))
    assert python == "python"
    _, _, path = environment[1].partition("=")
    assert all((Path(__file__).parents[2] / folder).is_dir() for folder in path.split(os.pathsep))
    exec(code, {})
    assert "2 named linears in 1 graph(s)" in capsys.readouterr().out


def test_what_passed_passes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Example] = []
    monkeypatch.setitem(globals(), "check", lambda example, inner: checked.append(example))

    @settings(max_examples=1, database=None)
    @given(example=st.just(PLAIN))
    def twice(example: Example) -> None:
        passed: set[Example] = set()
        check_once(example, "aot_eager", passed)
        check_once(example, "aot_eager", passed)

    twice()
    assert checked == [PLAIN]
