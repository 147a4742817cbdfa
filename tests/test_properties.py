"""Random networks: compiled with the pass, each computes what its straight-through reference does.

A failing example is printed as a line of Python that runs it again. The environment sets how long and where::

    SPARSE_PASS_EXAMPLES=5000   examples of each inner compiler (default: 500 by aot_eager, 8 by Inductor)
    SPARSE_PASS_INNER=inductor  only this inner compiler
    SPARSE_PASS_SEED=1          other examples (default: 0); Hypothesis' own seed is not used
    SPARSE_PASS_DEVICE=cuda     where the networks live (default: cpu)

They are spread over several tests, for ``pytest -n``. A run on a GPU::

    SPARSE_PASS_EXAMPLES=2000 SPARSE_PASS_DEVICE=cuda SPARSE_PASS_INNER=aot_eager pytest -n 4 tests/test_properties.py
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, note, seed, settings
from random_networks import DTYPES, MODULES, Example, Layer, Network, Place, examples, meant, places
from support import TOLERANCE, Result, errors, fresh_compile, invariants_checked, run, ste_reference, twins
from torch import Tensor
from torch.utils._pytree import tree_map

import sparse_pass as sp

DEVICE = os.environ.get("SPARSE_PASS_DEVICE", "cpu")
SEED = int(os.environ.get("SPARSE_PASS_SEED", "0"))
INNERS = [os.environ["SPARSE_PASS_INNER"]] if "SPARSE_PASS_INNER" in os.environ else ["aot_eager", "inductor"]
EXAMPLES = {"aot_eager": 500, "inductor": 8}
SHARDS = {"aot_eager": 4, "inductor": 2}

SPARSE = [("sparse", ""), ("sparse", "the weight is the left operand of the matmul")]
KERNEL_DTYPES = (torch.float16, torch.bfloat16)


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

    Compared are outputs, the gradients of parameters and input, and a second call, which must give the same bits.

    Args:
        masked: the scheme of each place in the reference; other than by default the check must fail.
    """
    network = example.network(DEVICE)
    before = copy.deepcopy(network.state_dict())
    known = places(network)
    schemes = {place.name: scheme for place in known if place.legal and (scheme := masked(example, place))}
    reference = ste_reference(network, schemes)
    backend = sp.sparse_backend(dict(example.config), model=network if example.named else None, inner=inner, tune="off")
    options = {"backward": example.training and _has_leaves(example, network), "context": partial(modes, example)}
    with fresh_compile(), invariants_checked(), torch.set_grad_enabled(example.training):
        mark = example.dynamic == "batch"
        compiled = torch.compile(network, backend=backend, dynamic=None if mark else bool(example.dynamic))
        for x in example.inputs(DEVICE):
            call = partial(run, inputs=[x], **options)
            parameters = dict(network.named_parameters())
            actual = call(partial(by_hand, compiled), parameters, mark_dynamic=mark)
            again = call(partial(by_hand, compiled), parameters)
            expected = call(partial(by_hand, reference), twins(network, reference))
            _compare(actual, expected, partial(_exact, network, schemes, x, options), TOLERANCE[gemm_dtype(example)])
            _compare_bits(actual, again)
        report = backend.report
    _check_report(report, example, network, known)
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


def _exact(network: Network, schemes: dict[str, Any], x: Tensor, options: dict[str, Any]) -> Result:
    precise = copy.deepcopy(network).double()
    reference = ste_reference(precise, schemes)
    x = x.detach().double().requires_grad_(x.requires_grad)
    return run(partial(by_hand, reference), twins(precise, reference), [x], backward=options["backward"])


def _double(result: Result) -> Result:
    gradients = {name: None if value is None else value.double() for name, value in result.gradients.items()}
    return Result(tuple(output.double() for output in result.outputs), gradients)


def _compare_bits(one: Result, two: Result) -> None:
    pairs = [*zip(one.outputs, two.outputs, strict=True), *((v, two.gradients[k]) for k, v in one.gradients.items())]
    same = all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)
    assert same, "a second call gave other bits"


def _check_report(report: sp.Report, example: Example, network: Network, known: list[Place]) -> None:
    """Every named linear of every graph is there, rewritten or skipped, each with its GEMMs and its reason."""
    named = {place.name: scheme for place in known if (scheme := meant(example, place))}
    counts = Counter(site.fqn for site in report.sites)
    assert report.unmatched == (), str(report)
    uses = {}
    differentiable = example.input_grad
    for place, block in zip(known, network.blocks, strict=True):
        gradients = {"grad_input": {differentiable}, "grad_weight": {block.fc.weight.requires_grad}}
        differentiable |= any(parameter.requires_grad for parameter in block.fc.parameters())
        if block.again:
            gradients["grad_input"].add(differentiable)
        uses[place.name] = (2 if block.layer.way == "halves" else 1) * (2 if block.again else 1)
        for site in report.sites:
            if site.fqn == place.name:
                _check_site(site, place, block.layer, named.get(place.name), gemm_dtype(example))
                for gemm, possible in gradients.items():
                    has = getattr(site, gemm) is not None
                    assert has in {example.training and one for one in possible}, f"{gemm} of {site}\n{report}"
    if example.broken == "parts" and any("also serves" in one for one in report.notes):
        # Parts that are alike may share a graph, whose sites bear the names of the first.
        assert counts.keys() <= named.keys(), f"named: {named}\n{report}"
        return
    assert counts.keys() == named.keys(), f"named: {named}\n{report}"
    if not example.broken:
        expected = Counter({name: uses[name] * report.graphs for name in named})
        assert counts == expected, f"expected {expected}\n{report}"


def _check_site(
    site: sp.Site, place: Place, layer: Layer, scheme: sp.WeightSparsity | None, dtype: torch.dtype
) -> None:
    assert site.scheme == scheme, str(site)
    assert site.dtype == dtype, str(site)
    assert not any(word in site.reason for word in ("not found", "left dense", "left as captured")), str(site)
    assert (site.status == "sparse") or site.reason, str(site)
    n, k = reversed(place.shape) if layer.way == "Conv1D" else place.shape
    if layer.way != "halves":
        assert site.shape[1:] == (n, k), str(site)
    if not place.legal:
        assert (site.status, site.output) == ("skipped", "dense"), str(site)
        assert "multiples of 4" in site.reason, str(site)
        return
    asked = site.scheme.backend == "cusparselt" or (DEVICE == "cuda" and site.scheme.backend == "auto")
    possible = asked and dtype in KERNEL_DTYPES and n % 64 == k % 64 == 0
    if not possible:
        assert site.status == "masked_dense", str(site)
    elif layer.way in (*MODULES, "F.linear"):
        # Torch makes a bmm of a linear whose input cannot be viewed as rows, if its weight, or a cast of it, is frozen.
        batched = "the graph has it as aten.bmm.default" in site.reason
        # Inputs with the features outermost have a grad_input with the weight on the left.
        assert batched or (site.status, site.reason.removeprefix("grad_input: ")) in SPARSE, str(site)
    assert site.grad_weight in ("dense", None), str(site)


def _reproduce(example: Example, inner: str) -> str:
    """A line for a shell in the tests' folder."""
    code = f"from test_properties import *; print(check({example!r}, {inner!r}))"
    return f"""SPARSE_PASS_DEVICE={DEVICE} python -c "from sparse_pass import WeightSparsity; {code}" """


def shards() -> list[Any]:
    return [pytest.param(inner, shard, id=f"{inner}-{shard}") for inner in INNERS for shard in range(SHARDS[inner])]


@pytest.mark.slow
@pytest.mark.parametrize(("inner", "shard"), shards())
def test_networks(inner: str, shard: int) -> None:
    total = int(os.environ.get("SPARSE_PASS_EXAMPLES", EXAMPLES[inner]))

    passed = set()

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
        assume(example not in passed)  # Hypothesis repeats every third
        note(_reproduce(example, inner))
        check(example, inner)
        passed.add(example)

    agrees()


# The property itself: it fails where the pass would be wrong


PLAIN = Example(
    layers=(Layer(width=64, activation="tanh"), Layer(width=32)),
    config=(("blocks.*.fc", sp.WeightSparsity(grad_weight="masked", decay=5.0)),),
    features=64,
)


def unmasked_at(index: int) -> Callable[[Example, Place], Any]:
    return lambda example, place: None if place.name == f"blocks.{index}.fc" else meant(example, place)


def changed(**fields: Any) -> Callable[[Example, Place], Any]:
    return lambda example, place: replace(sp.WeightSparsity(grad_weight="masked", decay=5.0), **fields)


WRONG = {
    "first dense": unmasked_at(0),
    "last dense": unmasked_at(1),
    "other masks": changed(mask="greedy"),
    "gradient unmasked": changed(grad_weight="dense"),
    "no decay": changed(decay=0.0),
    "other decay": changed(decay=10.0),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_reference_is_noticed(wrong: str) -> None:
    check(PLAIN, "aot_eager")
    for example in (PLAIN, replace(PLAIN, autocast="bfloat16")):
        with pytest.raises(AssertionError, match="relative errors"):
            check(example, "aot_eager", masked=WRONG[wrong])
