"""Which linear a config names: patterns, prefixes, sources of Dynamo, parts of models, and what is refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import sparse_pass as sp
from sparse_pass.config import WeightSparsity
from sparse_pass.dynamo.recompiles import why_last
from sparse_pass.fqn import choose, from_source, nearest, normalize, parse_config

W24 = sp.WeightSparsity()
GREEDY = sp.WeightSparsity(mask="greedy")


# Names


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("blocks.0.fc1", "blocks.0.fc1"),
        ("_orig_mod.blocks.0.fc1", "blocks.0.fc1"),
        ("module.fc1", "fc1"),
        ("module.module.fc1", "fc1"),
        ("_orig_mod.module.fc1", "fc1"),
        ("module._orig_mod.fc1", "fc1"),
        ("_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.fc1", "blocks.0.fc1"),
        ("blocks.0._checkpoint_wrapped_module.fc1.weight", "blocks.0.fc1.weight"),
        # only a leading `module` is DDP's; anywhere else it is the user's own
        ("net.module.fc1", "net.module.fc1"),
        ("module", "module"),
        ("my_orig_mod.fc1", "my_orig_mod.fc1"),
        ("", ""),
    ],
)
def test_normalize(raw: str, name: str) -> None:
    assert normalize(raw) == name
    assert normalize(name) == name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        # parameters, as torch 2.11 to 2.15 spell them
        ("L['self']._modules['blocks']._modules['0']._parameters['weight']", "blocks.0.weight"),
        ("L['fn']._modules['0']._parameters['weight']", "0.weight"),
        ("L['self']._parameters['in_proj_weight']", "in_proj_weight"),
        ("L['fn'].__self__._parameters['weight']", "weight"),
        ("G['model']._modules['fc']._parameters['weight']", "fc.weight"),
        ("L['models'][0]._modules['fc']._parameters['weight']", "fc.weight"),
        ("L['models']['teacher']._modules['fc']._parameters['weight']", "fc.weight"),
        ("L['self'].hidden._modules['fc']._parameters['weight']", "fc.weight"),
        ("L['self']._modules['heads']._modules['a b']._parameters['weight']", "heads.a b.weight"),
        ("L['self']._modules['heads']._modules['a-b']._parameters['weight']", "heads.a-b.weight"),
        ("L['self']._modules['inner']._orig_mod._modules['0']._parameters['weight']", "inner.0.weight"),
        ("L['self']._modules['_fsdp_wrapped_module']._modules['fc']._parameters['weight']", "fc.weight"),
        ("L['self']._modules['module']._modules['fc']._parameters['weight']", "fc.weight"),
        ('L["self"]._modules["fc"]._parameters["weight"]', "fc.weight"),
        ("L['self']._modules['norm']._buffers['mean']", "norm.mean"),
        ("L['self'].__dict__['_modules']['fc']", "fc"),
        ("L['self']._modules['a'].__dict__['_modules']['b']._modules['fc']._parameters['weight']", "a.b.fc.weight"),
        ("L['self'].net.__dict__['_modules']['b']._modules['fc']._parameters['weight']", "b.fc.weight"),
        ("L['__self__']._modules['0']._parameters['weight']", "0.weight"),
        # module stacks
        ("L['self']", ""),
        ("L['self'].blocks.0.fc1", "blocks.0.fc1"),
        ("L['self'].heads.a-b", "heads.a-b"),
        ("L['self'].heads.a b", "heads.a b"),
        ("L['self'].plain[0]", "plain.0"),
        ("L['models']['teacher'].fc", "teacher.fc"),
        ("L['self'].inner._orig_mod.0", "inner.0"),
        ("getattr(G['m'].blocks, '0').fc1", "blocks.0.fc1"),
        ("getattr(getattr(L['self'].blocks, '0').heads, 'a b')", "blocks.0.heads.a b"),
        ("L['self'].__dict__['_modules']['enc'].fc1", "enc.fc1"),
        ("L['step'].__self__.net.fc1", "net.fc1"),
        ("L['step'].__closure__[0].cell_contents.fc1", "fc1"),
        # torch.export
        ("blocks.0.fc1", "blocks.0.fc1"),
        ("", ""),
        # no path
        ("L['x']", ""),
        ("G['W']", ""),
        ("some.thing[0]", ""),
        ("L['self'].x()", ""),
    ],
)
def test_from_source(source: str, name: str) -> None:
    assert from_source(source) == name


NAMES = ("blocks.0.mlp.fc1", "blocks.0.mlp.fc1.weight")


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("blocks.0.mlp.fc1", True),
        ("blocks.0.mlp.fc1.weight", True),
        ("_orig_mod.module.blocks.0.mlp.fc1", True),
        ("blocks.*.mlp.fc1", True),
        ("blocks.*.mlp.*", True),
        ("blocks.0.mlp.fc*", True),
        ("blocks.0.m*p.f*1", True),
        ("*.*.*.*", True),
        ("module.blocks.*.mlp.fc1", True),
        (r"re:blocks\.\d+\.mlp\.fc[12]", True),
        ("re:.*fc1", True),
        # a full match, and a `*` within one dotted part
        ("blocks", False),
        ("blocks.0.mlp", False),
        ("blocks.*", False),
        ("*", False),
        ("blocks.*.fc1", False),
        ("re:blocks", False),
        ("re:fc1", False),
        ("locks.0.mlp.fc1", False),
        ("blocks.0.mlp.fc11", False),
        # other characters stand for themselves
        ("blocks.0.mlp.fc.", False),
        ("blocks.[0].mlp.fc1", False),
        ("blocks.?.mlp.fc1", False),
        ("Blocks.0.mlp.fc1", False),
    ],
)
def test_pattern(pattern: str, named: bool) -> None:
    (parsed,) = parse_config({pattern: W24})
    assert parsed.names(NAMES) is named
    assert parsed.exact is ("*" not in pattern and not pattern.startswith("re:"))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"blocks.*.mlp.fc1": W24, "blocks.0.mlp.fc1": GREEDY}, "blocks.0.mlp.fc1"),
        ({"blocks.*.mlp.fc1": W24, "blocks.0.mlp.fc1.weight": GREEDY}, "blocks.0.mlp.fc1.weight"),
        ({"re:.*": W24, "blocks.0.mlp.fc1": None}, "blocks.0.mlp.fc1"),
        ({"re:.*": W24, "blocks.*.mlp.fc1": GREEDY}, "re:.*"),
        ({"blocks.*.mlp.fc1": GREEDY, "re:.*": W24}, "blocks.*.mlp.fc1"),
        ({"blocks.*.mlp.fc2": GREEDY, "re:.*": W24}, "re:.*"),
        ({"blocks.*.mlp.fc1": None, "re:.*": W24}, "blocks.*.mlp.fc1"),
        ({"blocks.*.mlp.fc2": GREEDY}, None),
    ],
)
def test_exact_beats_patterns_and_the_first_pattern_wins(config: Mapping[str, Any], key: str | None) -> None:
    chosen = choose(parse_config(config), NAMES)
    assert (chosen.text if chosen else None) == key
    if chosen:
        assert chosen.scheme is config[chosen.text]


def test_nearest() -> None:
    known = ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "head", "embed"]
    assert nearest("_orig_mod.blocks.0.mlp.fc1x", known)[0] == "blocks.0.mlp.fc1"
    assert "head" not in nearest("blocks.0.mpl.fc1", known)
    assert nearest("zzz", known) == []


# Configs


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "config is empty"),
        ({"fc1": "2:4"}, r"config\['fc1'\] = '2:4': expected a WeightSparsity or None"),
        ({"fc1": True}, r"config\['fc1'\] = True: expected"),
        ({"fc1": WeightSparsity}, r"config\['fc1'\] = <class .*>: expected .* instantiate it: WeightSparsity\(\)"),
        ({"re:fc(1": W24}, r"config key 're:fc\(1': the regular expression does not compile: missing \)"),
        ({"re:*": W24}, r"config key 're:\*': the regular expression does not compile: nothing to repeat"),
        ({"fc1": sp.ActivationSparsity}, r"instantiate it: ActivationSparsity\(\)"),
        ({"fc1": (W24, W24)}, r"config\['fc1'\] = \(Weight.*\): expected .* or a tuple of an ActivationSparsity"),
        ({"fc1": (W24,)}, r"config\['fc1'\] = \(Weight.*\): expected .* or a tuple of an ActivationSparsity"),
        (
            {"fc1": [W24, sp.ActivationSparsity()]},
            r"config\['fc1'\] = \[.*\]: expected .* or a tuple of an ActivationSparsity",
        ),
        ({"": W24}, "config key '': expected a layer name"),
        ({3: W24}, "config key 3: expected a layer name"),
        (["fc1"], r"config must map names to schemes, got list: \['fc1'\]"),
        ("fc1", "config must map names to schemes, got str: 'fc1'"),
        (None, "config must map names to schemes, got NoneType: None"),
    ],
)
@pytest.mark.parametrize(
    "entry",
    [
        sp.sparse_backend,
        sp.SparsePass,
        sp.inductor_options,
        lambda config: sp.explain(nn.Linear(4, 4), config),
        lambda config: sp.prune_(nn.Linear(4, 4), config),
        lambda config: sp.rewrite(torch.fx.symbolic_trace(nn.Linear(4, 4)), config),
    ],
    ids=["sparse_backend", "SparsePass", "inductor_options", "explain", "prune_", "rewrite"],
)
def test_bad_config(entry: Callable[[Any], Any], config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entry(config)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("mask", "best", "expected one of 'optimal', 'greedy'"),
        ("mask", None, "expected one of 'optimal', 'greedy'"),
        ("grad_weight", "sparse", "expected one of 'dense', 'masked'"),
        ("backend", "cutlass", "expected one of 'auto', 'cusparselt', 'masked_dense'"),
        ("decay", -0.1, "expected a finite number >= 0"),
        ("decay", float("nan"), "expected a finite number >= 0"),
        ("decay", float("inf"), "expected a finite number >= 0"),
        ("decay", "0.1", "expected a number >= 0"),
        ("decay", True, "expected a number >= 0"),
    ],
)
def test_bad_field(field: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"WeightSparsity({field}={value!r}): {expected}")):
        sp.WeightSparsity(**{field: value})


def test_scheme_is_a_frozen_value() -> None:
    with pytest.raises(FrozenInstanceError):
        W24.mask = "greedy"  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        W24.note = "x"  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        sp.WeightSparsity("greedy")  # type: ignore[misc]
    assert not hasattr(W24, "__dict__")
    assert sp.WeightSparsity(mask="greedy") == GREEDY != W24
    assert len({GREEDY, sp.WeightSparsity(mask="greedy"), W24}) == 2
    assert (str(W24), str(GREEDY)) == ("w24", "w24(mask=greedy)")


# Models


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(x).relu())


class Model(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(Mlp() for _ in range(depth))
        self.head = nn.Linear(8, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


IDS = torch.arange(6)


def compiled_report(
    function: Callable[..., Any],
    inputs: tuple[Any, ...],
    config: Mapping[str, Any],
    **options: Any,
) -> sp.Report:
    """Compile and run; what the backend reports."""
    backend = sp.sparse_backend(config, inner="aot_eager", **options)
    torch.compile(function, backend=backend)(*inputs)
    return backend.report


def named(report: sp.Report) -> dict[str, str]:
    """Site to the config key that named it."""
    return {site.fqn: site.pattern for site in report.sites}


def test_misspelt_name_with_model() -> None:
    """Refused before anything is captured."""
    with pytest.raises(ValueError, match=r"'blocks\.0\.fc3' names no linear weight of Model; closest names: ") as error:
        sp.sparse_backend({"head": None, "blocks.0.fc3": W24}, model=Model())
    closest = str(error.value).partition("closest names: ")[2]
    assert "'blocks.0.fc1'" in closest
    assert "'blocks.0.fc2'" in closest


@pytest.mark.parametrize("pattern", ["blocks.*.fc3", "re:blocks.fc1", "embed", "blocks", "blocks.0.fc1.bias"])
def test_pattern_that_names_nothing_with_model(pattern: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{pattern!r} names no linear weight of Model")):
        sp.sparse_backend({pattern: W24}, model=Model())


@pytest.mark.parametrize("pattern", ["blocks.*.fc1", "re:.*fc2", "blocks.1.fc1.weight", "_orig_mod.blocks.0.fc1"])
def test_pattern_that_names_something_with_model(pattern: str) -> None:
    report = compiled_report(model := Model(), (IDS,), {pattern: W24}, model=model)
    assert report.sites
    assert report.unmatched == ()


def test_misspelt_name_without_model() -> None:
    with pytest.warns(UserWarning, match="named no linear") as caught:
        report = compiled_report(Model(), (IDS,), {"blocks.0.fc3": W24, "blocks.*.fc1": W24})
    (message,) = (str(warning.message) for warning in caught if "sparse_pass" in str(warning.message))
    assert "'blocks.0.fc3'" in message
    assert "fc1" not in message
    assert report.unmatched == ("blocks.0.fc3",)
    assert named(report) == {"blocks.0.fc1": "blocks.*.fc1", "blocks.1.fc1": "blocks.*.fc1"}


def test_misspelt_name_warns_once() -> None:
    """However many graphs follow, and whether the warning filter would let the second one through."""
    backend = sp.sparse_backend({"fc3": W24, "fc1": W24}, inner="aot_eager")
    compiled = torch.compile(Mlp(), backend=backend, dynamic=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (4, 5, 6):
            compiled(torch.randn(rows, 8))
    assert backend.report.graphs == 3
    assert [warning.category for warning in caught if "fc3" in str(warning.message)] == [UserWarning]


def test_no_warning_where_all_is_named(recwarn: pytest.WarningsRecorder) -> None:
    compiled_report(Model(), (IDS,), {"blocks.*.fc1": W24, "head": None, "blocks.0.fc2.weight": None})
    assert [str(warning.message) for warning in recwarn if "sparse_pass" in str(warning.message)] == []


def test_graph_break_is_no_false_alarm(recwarn: pytest.WarningsRecorder) -> None:
    """What the first graph does not hold may be in the second."""

    class Broken(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            x = self.fc1(x)
            torch._dynamo.graph_break()
            return self.fc2(x)

    report = compiled_report(Broken(), (torch.randn(4, 8),), {"fc1": W24, "fc2": W24})
    assert report.graphs == 2
    assert report.unmatched == ()
    assert named(report) == {"fc1": "fc1", "fc2": "fc2"}
    assert [str(warning.message) for warning in recwarn if "sparse_pass" in str(warning.message)] == []


def test_graph_break_does_not_hide_a_misspelt_name() -> None:
    class Broken(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            x = self.fc1(x)
            torch._dynamo.graph_break()
            return self.fc2(x)

    with pytest.warns(UserWarning, match="'fc3' named no linear"):
        report = compiled_report(Broken(), (torch.randn(4, 8),), {"fc1": W24, "fc3": W24})
    assert report.unmatched == ("fc3",)


HEAD_RULE = r"the weight is \[10, 8\]: 2:4 masks need both dims to be multiples of 4"


def test_exact_name_of_a_bad_shape_with_model() -> None:
    with pytest.raises(ValueError, match=rf"'head' cannot be sparsified: {HEAD_RULE}"):
        sp.sparse_backend({"head": W24}, model=Model())


def test_exact_name_of_a_bad_shape_without_model() -> None:
    with pytest.raises(BackendCompilerFailed, match=rf"'head' \(named exactly\): {HEAD_RULE}") as error:
        compiled_report(Model(), (IDS,), {"head": W24})
    assert isinstance(error.value.inner_exception, ValueError)


@pytest.mark.parametrize("with_model", [True, False])
def test_bad_shape_reached_by_a_pattern(with_model: bool) -> None:
    model = Model()
    report = compiled_report(model, (IDS,), {"re:.*": W24}, **({"model": model} if with_model else {}))
    status = {site.fqn: site.status for site in report.sites}
    assert status.pop("head") == "skipped"
    assert set(status.values()) == {"masked_dense"}
    (head,) = (site for site in report.sites if site.fqn == "head")
    assert re.match(HEAD_RULE, head.reason)
    assert head.shape == (6, 10, 8)


def test_strict() -> None:
    with pytest.raises(BackendCompilerFailed, match=rf"'head' \(named by 're:\.\*'\): {HEAD_RULE}"):
        compiled_report(Model(), (IDS,), {"re:.*": W24}, strict=True)
    report = compiled_report(Model(), (IDS,), {"re:.*": W24, "head": None}, strict=True)
    assert "head" not in named(report)
    assert len(report.sites) == 4


# Ways to hold and compile a model


def test_sequential() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8)))
    report = compiled_report(model, (torch.randn(4, 8),), {"0": W24, "2.*": W24}, model=model)
    assert named(report) == {"0": "0", "2.0": "2.*"}


def test_module_dict() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleDict({"left-hand": nn.Linear(8, 8), "right hand": nn.Linear(8, 8)})

        def forward(self, x: Tensor) -> Tensor:
            return self.heads["left-hand"](x) + self.heads["right hand"](x)

    config = {"heads.left-hand": W24, "heads.right *": GREEDY}
    report = compiled_report(Heads(), (torch.randn(4, 8),), config)
    assert named(report) == {"heads.left-hand": "heads.left-hand", "heads.right hand": "heads.right *"}


def test_parameter_names() -> None:
    """Of modules that are no linears; attention's fused projection is the usual one."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 4, 8)
    config = {"in_proj_weight": W24, "out_proj": W24}
    report = compiled_report(attention, (x, x, x), config, model=attention)
    assert set(named(report)) == {"in_proj_weight", "out_proj"}


def test_function_over_a_module() -> None:
    """Names are relative to the module, whatever the function calls it."""
    net = Mlp()

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return (net(x) - target).square().mean()

    report = compiled_report(loss, (torch.randn(4, 8), torch.randn(4, 8)), {"fc1": W24})
    assert named(report) == {"fc1": "fc1"}


def test_function_of_a_module() -> None:
    report = compiled_report(lambda module, x: module(x), (Mlp(), torch.randn(4, 8)), {"fc2": W24})
    assert named(report) == {"fc2": "fc2"}


def test_other_models_in_the_graph() -> None:
    """With `model=`, names are those of that model: the teacher has an `fc1` too."""
    student, teacher = Mlp(), Mlp()

    def loss(x: Tensor) -> Tensor:
        return (student(x) - teacher(x)).square().mean()

    report = compiled_report(loss, (torch.randn(4, 8),), {"fc1": W24}, model=student)
    assert [site.fqn for site in report.sites] == ["fc1"]


def test_other_models_have_no_names() -> None:
    """Not even such as the model does not have."""
    student, teacher = Mlp(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def loss(x: Tensor) -> Tensor:
        return (student(x) - teacher(x)).square().mean()

    report = compiled_report(loss, (torch.randn(4, 8),), {"re:.*": W24}, model=student)
    assert set(named(report)) == {"fc1", "fc2"}


@pytest.mark.parametrize("with_model", [True, False])
def test_model_held_by_a_plain_object(with_model: bool) -> None:
    class Trainer:
        def __init__(self, net: nn.Module) -> None:
            self.net = net

        def step(self, x: Tensor) -> Tensor:
            return self.net(x).sum()

    model = Mlp()
    options = {"model": model} if with_model else {}
    report = compiled_report(Trainer(model).step, (torch.randn(4, 8),), {"fc1": W24}, **options)
    assert named(report) == {"fc1": "fc1"}


def test_model_held_by_a_list() -> None:
    report = compiled_report(lambda models, x: models[0](x), ([Mlp()], torch.randn(4, 8)), {"fc1": W24})
    assert named(report) == {"fc1": "fc1"}


def test_a_child_called_module() -> None:
    """Not every `module` is a wrapper's."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    report = compiled_report(model := Own(), (torch.randn(4, 8),), {"module": W24}, model=model)
    assert named(report) == {"module": "module"}


def test_a_linear_by_itself() -> None:
    linear = nn.Linear(8, 8)
    report = compiled_report(linear, (torch.randn(4, 8),), {"weight": W24}, model=linear)
    assert named(report) == {"weight": "weight"}


def test_compiled_inside_a_model() -> None:
    model = Model()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    report = compiled_report(model, (IDS,), {"blocks.*.fc1": W24}, model=model)
    assert set(named(report)) == {"blocks.0.fc1", "blocks.1.fc1"}


def test_data_parallel_prefix() -> None:
    """Names do not change when the model is wrapped; DDP and DataParallel call it `module`."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    for wrapped in (Wrapper(Mlp()), Wrapper(Wrapper(Mlp()))):
        report = compiled_report(wrapped, (torch.randn(4, 8),), {"fc1": W24, "module.fc2": W24}, model=wrapped)
        assert named(report) == {"fc1": "fc1", "fc2": "module.fc2"}


def test_regional_compile_has_absolute_names() -> None:
    model = Model(depth=3)
    backend = sp.sparse_backend({"blocks.*.fc1": W24}, model=model, inner="aot_eager")
    for block in model.blocks:
        block.compile(backend=backend)
    model(IDS)
    # One graph serves all blocks, as the config treats all alike; it bears the name of the first.
    assert named(backend.report) == {"blocks.0.fc1": "blocks.*.fc1"}
    assert backend.report.graphs == 1


def test_regional_compile_of_blocks_that_differ() -> None:
    """A graph is shared only among blocks that the config treats alike."""
    model = Model(depth=4)
    config = {"blocks.0.fc1": None, "blocks.3.fc1": GREEDY, "blocks.*.fc1": W24}
    backend = sp.sparse_backend(config, model=model, inner="aot_eager")
    for block in model.blocks:
        block.compile(backend=backend)
    model(IDS)
    assert named(backend.report) == {"blocks.1.fc1": "blocks.*.fc1", "blocks.3.fc1": "blocks.3.fc1"}
    assert backend.report.graphs == 3


def test_regional_compile_of_parts_that_share_a_weight() -> None:
    """Each goes by its own name, though all read one parameter: only the named one is sparse."""
    model = nn.Sequential(Mlp(), Mlp(), Mlp())
    for part in model:
        part.fc1.weight = model[0].fc1.weight
    x = torch.randn(4, 8)
    dense = model[2](x)
    backend = sp.sparse_backend({"1.fc1": W24}, model=model, inner="aot_eager")
    for part in model:
        part.compile(backend=backend)
    assert torch.equal(model[2](x), dense)
    assert not torch.equal(model[1](x), Mlp.forward(model[1], x))
    assert named(backend.report) == {"1.fc1": "1.fc1"}


@pytest.mark.parametrize("owner", [0, 1])
def test_regional_compile_of_parts_that_share_a_named_parameter(owner: int) -> None:
    """By the name of the parameter all that read it are named; the part that has another one like it is not."""
    model = nn.Sequential(Mlp(), Mlp(), Mlp())
    model[1].fc1.weight = model[0].fc1.weight
    x = torch.randn(4, 8)
    dense = [part(x) for part in model]
    backend = sp.sparse_backend({f"{owner}.fc1.weight": W24}, model=model, inner="aot_eager")
    for part in model:
        part.compile(backend=backend)
    assert [torch.equal(part(x), before) for part, before in zip(model, dense, strict=True)] == [False, False, True]


def test_regional_compile_of_parts_without_weights() -> None:
    class Sine(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin()

    model = nn.Sequential(Sine(), Mlp())
    backend = sp.sparse_backend({"1.fc1": W24}, model=model, inner="aot_eager")
    for part in model:
        part.compile(backend=backend)
    x = torch.randn(4, 8, requires_grad=True)
    model(x).sum().backward()
    assert named(backend.report) == {"1.fc1": "1.fc1"}
    assert backend.report.graphs == 2


def test_function_of_a_parameter_alone() -> None:
    """It is not reached by way of a module; it has its name in the model all the same."""
    model = Mlp()
    weight = model.fc1.weight
    report = compiled_report(lambda x: nn.functional.linear(x, weight), (torch.randn(4, 8),), {"fc1": W24}, model=model)
    assert named(report) == {"fc1": "fc1"}
    assert report.notes == ()


def test_regional_compile_of_one_block() -> None:
    model = Model()
    backend = sp.sparse_backend({"blocks.1.*": W24}, model=model, inner="aot_eager")
    for block in model.blocks:
        block.compile(backend=backend)
    model(IDS)
    assert set(named(backend.report)) == {"blocks.1.fc1", "blocks.1.fc2"}


# A table of embeddings that a linear shares


class Tied(nn.Module):
    def __init__(self, *, direct: bool = False) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.embed = nn.Embedding(12, 8)
        self.body.fc = nn.Linear(8, 8)
        if not direct:
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.body.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.body.fc(self.body.embed(ids))
        return self.head(x) if hasattr(self, "head") else nn.functional.linear(x, self.body.embed.weight)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({r"re:body\..*": W24}, {"body.fc"}),
        ({"re:(?!head).*": W24}, {"body.fc"}),
        ({"body.*": W24}, {"body.fc"}),
        ({"re:.*": W24}, {"body.fc", "head"}),
        ({"head": W24}, {"head"}),
        ({"re:.*": W24, "head": None}, {"body.fc"}),
    ],
)
@pytest.mark.parametrize("with_model", [True, False])
def test_name_of_an_embedding_is_no_name_of_the_head(
    config: Mapping[str, Any], expected: set[str], with_model: bool
) -> None:
    """The pass and `prune_` go by the same names: the pruned model computes what was trained."""
    model = Tied()
    backend = sp.sparse_backend(config, model=model if with_model else None, inner="aot_eager")
    trained = torch.compile(model, backend=backend)(IDS)
    assert set(named(backend.report)) == expected
    assert {site.fqn for site in sp.explain(model, config)(IDS).sites} == expected
    assert {site.fqn for site in sp.prune_(model, config).sites} == expected
    if "head" not in expected:  # else the embedding is pruned with it
        torch.testing.assert_close(model(IDS), trained)


@pytest.mark.parametrize("name", ["body.embed", "body.embed.weight"])
def test_exact_name_of_a_shared_embedding(name: str) -> None:
    for entry in (lambda config, model: sp.sparse_backend(config, model=model), lambda c, m: sp.prune_(m, c)):
        with pytest.raises(ValueError, match=f"'{name}' names no linear weight of Tied"):
            entry({name: W24}, Tied())
    with pytest.warns(UserWarning, match=f"'{name}' named no linear"):
        assert compiled_report(Tied(), (IDS,), {name: W24}).sites == ()


def test_embedding_that_is_multiplied_by_directly() -> None:
    """No linear owns it, so that a pattern means it nowhere: not in training, not in `prune_`."""
    model = Tied(direct=True)
    assert set(named(compiled_report(model, (IDS,), {"re:.*": W24}, model=model))) == {"body.fc"}
    assert [site.fqn for site in sp.prune_(model, {"re:.*": W24}).sites] == ["body.fc"]


def test_every_name_of_a_weight_that_two_linears_share() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    report = compiled_report(model, (torch.randn(4, 8),), {"1.weight": W24}, model=model)
    assert [site.fqn for site in report.sites] == [site.fqn for site in report.sites if site.pattern == "1.weight"]
    assert len(report.sites) == 2


# Dynamo's limit of graphs


def test_blocks_that_differ_have_a_limit_each() -> None:
    """Three treatments, in training and in eval, with dynamic sizes too: nine graphs of one code."""
    assert torch._dynamo.config.recompile_limit == 8
    model = Model(depth=6)
    backend = sp.sparse_backend(
        {"blocks.0.*": None, "blocks.1.fc1": None, "blocks.*.*": W24}, model=model, inner="aot_eager"
    )
    for block in model.blocks:
        block.compile(backend=backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "sparse_pass")
        for rows in (6, 5):
            model(torch.arange(rows))
        with torch.no_grad():
            evaluated = model(IDS)
    assert backend.report.graphs == 9
    sp.prune_(model, {"blocks.0.*": None, "blocks.1.fc1": None, "blocks.*.*": W24})
    for block in model.blocks:
        block._compiled_call_impl = None
    torch.testing.assert_close(model(IDS), evaluated)


def test_the_last_graph_that_dynamo_makes() -> None:
    """The next shape would run eagerly, and dense."""
    backend = sp.sparse_backend({"fc1": W24}, inner="aot_eager")
    compiled = torch.compile(Mlp(), backend=backend, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=3):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "sparse_pass")
            for rows in (4, 5):
                compiled(torch.randn(rows, 8))
        with pytest.warns(UserWarning, match=r"sparse_pass: .* torch\._dynamo\.config\.recompile_limit = 3 graphs"):
            compiled(torch.randn(6, 8))
        compiled(torch.randn(7, 8))
    (note,) = backend.report.notes
    assert "will run eagerly, with its named linears dense" in note
    assert (backend.report.graphs, backend.report.unmatched) == (3, ())


@pytest.mark.parametrize(
    ("config", "options", "dynamo"),
    [
        pytest.param({"fc1": W24, "fc2": None}, {"fullgraph": True}, {}, id="fullgraph"),
        pytest.param({"fc1": W24}, {}, {"fail_on_recompile_limit_hit": True}, id="fail_on_recompile_limit_hit"),
        pytest.param({"fc1": None, "fc2": None}, {}, {}, id="nothing is sparse"),
    ],
)
def test_the_last_graph_where_it_does_no_harm(
    config: Mapping[str, Any], options: dict[str, Any], dynamo: dict[str, Any]
) -> None:
    backend = sp.sparse_backend(config, inner="aot_eager")
    compiled = torch.compile(Mlp(), backend=backend, dynamic=False, **options)
    with torch._dynamo.config.patch(recompile_limit=2, **dynamo), warnings.catch_warnings():
        warnings.filterwarnings("error", "sparse_pass")
        for rows in (4, 5):
            compiled(torch.randn(rows, 8))
    assert backend.report.notes == ()


def test_no_graph_is_the_last_where_dynamo_makes_none() -> None:
    """A backend that is called by hand."""
    assert why_last() == ""


# Linears that no graph holds


class Disabled(Mlp):
    @torch.compiler.disable
    def second(self, x: Tensor) -> Tensor:
        return self.fc2(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.fc1(x).relu())


class TiedAndDisabled(Tied):
    @torch.compiler.disable
    def last(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.body.fc(self.body.embed(ids)))


def hooked() -> nn.Module:
    model = Mlp()
    model.fc2.register_full_backward_hook(lambda module, before, after: None)
    return model


@pytest.mark.parametrize(
    ("model", "x", "exact", "pattern", "missing"),
    [
        pytest.param(hooked, torch.randn(4, 8), {"fc1": W24, "fc2": W24}, "fc*", ("fc2",), id="hook"),
        pytest.param(Disabled, torch.randn(4, 8), {"fc1": W24, "fc2": W24}, "fc*", ("fc2",), id="disabled"),
        pytest.param(TiedAndDisabled, IDS, {"body.fc": W24, "head": W24}, "re:.*", ("head",), id="tied"),
    ],
)
def test_linear_that_dynamo_runs_eagerly(
    model: Callable[[], nn.Module], x: Tensor, exact: Mapping[str, Any], pattern: str, missing: tuple[str, ...]
) -> None:
    """It trains dense. The report says so, and a warning where it was named exactly."""
    module = model()
    with pytest.warns(UserWarning, match=rf"sparse_pass: '{missing[0]}': in no graph so far"):
        report = compiled_report(module, (x,), exact, model=module)
    assert report.uncaptured == missing
    assert f"uncaptured: {missing[0]!r} is in no graph so far" in str(report)
    assert sp.explain(module, exact)(x).uncaptured == missing
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "sparse_pass")
        report = compiled_report(module, (x,), {pattern: W24}, model=module)
    assert report.uncaptured == missing
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match=f"'{missing[0]}': in no graph"):
        compiled_report(module, (x,), {pattern: W24}, model=module, strict=True)


def test_model_of_which_dynamo_captures_nothing() -> None:
    class Eager(Mlp):
        @torch.compiler.disable
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model, x = Eager(), torch.randn(4, 8)
    report = compiled_report(model, (x,), {"fc1": W24}, model=model)
    assert (report.graphs, report.uncaptured) == (0, ("fc1",))
    assert sp.explain(model, {"fc1": W24})(x).uncaptured == ("fc1",)


def test_what_is_captured_later() -> None:
    """Parts one by one, and modes: until they run they are listed, without an alarm for patterns."""
    model = Model(depth=3)
    backend = sp.sparse_backend({"blocks.*.fc1": W24, "blocks.2.*": GREEDY}, model=model, inner="aot_eager")
    for block in model.blocks:
        block.compile(backend=backend)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "sparse_pass")
        assert backend.report.uncaptured == ("blocks.0.fc1", "blocks.1.fc1", "blocks.2.fc1", "blocks.2.fc2")
        x = torch.randn(4, 8)
        model.blocks[0](x)
        assert backend.report.uncaptured == ("blocks.1.fc1", "blocks.2.fc1", "blocks.2.fc2")
        model.blocks[1](x)  # by the graph of the first
        assert backend.report.uncaptured == ("blocks.2.fc1", "blocks.2.fc2")
        model(IDS)
        assert backend.report.uncaptured == ()
        assert backend.report.notes == ("the graph of blocks.0 also serves blocks.1",)


def test_captured_by_other_names() -> None:
    """Parametrized and shared weights count by whatever name they are read."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    model[1].weight = model[0].weight
    report = compiled_report(model, (torch.randn(4, 8),), {"1": W24, "2": W24}, model=model)
    assert (set(named(report)), report.uncaptured) == ({"1", "2"}, ())


def test_lazy_module_has_to_run_first() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    for entry in (lambda config: sp.sparse_backend(config, model=model), lambda config: sp.prune_(model, config)):
        for pattern in ("0", "0.weight", "re:.*"):
            with pytest.raises(ValueError, match=r"names '0\.weight', which has no shape yet: run the model once"):
                entry({pattern: W24})
    sp.sparse_backend({"1": W24}, model=model)
    model(torch.randn(4, 8))
    assert set(named(compiled_report(model, (torch.randn(4, 8),), {"*": W24}, model=model))) == {"0", "1"}


def test_count_of_linear_weights() -> None:
    with pytest.raises(ValueError, match=r"closest names: none; the model has 2 linear weight\(s\)"):
        sp.sparse_backend({"zzz": W24}, model=Mlp())


def test_parts_without_model() -> None:
    """Their names are relative; the warning says what makes them absolute."""
    model = Model()
    backend = sp.sparse_backend({"blocks.*.fc1": W24}, inner="aot_eager")
    for block in model.blocks:
        block.compile(backend=backend)
    with pytest.warns(UserWarning, match="model= checks names at once, and makes them absolute where parts"):
        model(IDS)
