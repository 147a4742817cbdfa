"""Exactness: models compiled with the pass against `support.ste_reference`, forward and every gradient.

Widths are tiny, so most cases run op by op (``inner="aot_eager"``); a sample goes through Inductor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import TOLERANCE, Config, compare, fresh_compile, relative_error, ste_reference
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import sparse_pass as sp

W24 = sp.WeightSparsity()


# Models. Each takes `checkpointed`, whether its blocks are recomputed in the backward.


class Checkpointed(nn.Module):
    """Runs `body`, recomputed in the backward if it was asked for."""

    checkpointed: bool

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.body, *inputs, use_reentrant=False)
        return self.body(*inputs)


class MLP(Checkpointed):
    def __init__(self, checkpointed: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.fc1 = nn.Linear(16, 32, bias)
        self.fc2 = nn.Linear(32, 12, bias)

    def body(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(Checkpointed):
    """Pre-norm transformer block with fused QKV and SwiGLU."""

    def __init__(self, checkpointed: bool = False, dim: int = 32) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.gate_up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def body(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 4, dim // 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, dim))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class SelfAttention(Checkpointed):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.norm = nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def body(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.attn(x, x, x, need_weights=False)[0]


class CrossAttention(SelfAttention):
    """in_proj_weight is split in two: one part for the query, the other for key and value."""

    def body(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attn(self.norm(x), memory, memory, need_weights=True)[0]


class ThreeWayAttention(SelfAttention):
    """Query, key and value differ: in_proj_weight is split in three."""

    def body(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.attn(self.norm(x), memory, memory.tanh(), need_weights=False)[0]


def _of_transformers(kind: str, checkpointed: bool, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    model = getattr(transformers, kind)(getattr(transformers, config.pop("config"))(**config))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def llama(checkpointed: bool) -> nn.Module:
    return _of_transformers(
        "LlamaForCausalLM", checkpointed, config="LlamaConfig", hidden_size=32, intermediate_size=48,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=64, use_cache=False,
    )  # fmt: skip


def bert(checkpointed: bool) -> nn.Module:
    return _of_transformers(
        "BertModel", checkpointed, config="BertConfig", hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=4, vocab_size=64, max_position_embeddings=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def gpt2(checkpointed: bool) -> nn.Module:
    return _of_transformers(
        "GPT2LMHeadModel", checkpointed, config="GPT2Config", n_embd=32, n_layer=1, n_head=4, vocab_size=64,
        n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def vit(checkpointed: bool) -> nn.Module:
    return _of_transformers(
        "ViTForImageClassification", checkpointed, config="ViTConfig", hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8, num_labels=6,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def timm_vit(checkpointed: bool) -> nn.Module:
    models = pytest.importorskip("timm.models.vision_transformer")
    model = models.VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=6)
    model.set_grad_checkpointing(checkpointed)
    return model


def features(batch: int, *, length: int = 5, dim: int = 16) -> Tensor:
    return torch.randn(batch, length, dim, requires_grad=True)


def tokens(batch: int) -> Tensor:
    return torch.randint(64, (batch, 7))


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 16, 16, requires_grad=True)


@dataclass(frozen=True)
class Case:
    build: Callable[[bool], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    config: Config
    sites: int | None = None
    """GEMMs in the forward that the config names, where they are not one a weight."""


CASES = {
    "mlp": Case(MLP, lambda b: (features(b),), {"fc1": W24, "fc2": W24}),
    "block": Case(
        Block,
        lambda b: (features(b, dim=32),),
        {"qkv": W24, "proj": W24, "gate_up": W24, "down": W24},
    ),
    "self_attention": Case(SelfAttention, lambda b: (features(b),), {"attn.in_proj_weight": W24, "attn.out_proj": W24}),
    "cross_attention": Case(
        CrossAttention,
        lambda b: (features(b), features(b, length=3)),
        {"attn.in_proj_weight": W24, "attn.out_proj": W24},
        3,
    ),
    "three_way_attention": Case(
        ThreeWayAttention,
        lambda b: (features(b), features(b, length=3)),
        {"attn.in_proj_weight": W24, "attn.out_proj": W24},
        4,
    ),
    "llama": Case(
        llama,
        lambda b: (tokens(b),),
        {"model.layers.*.self_attn.*": W24, "model.layers.*.mlp.*": W24},
    ),
    "bert": Case(
        bert,
        lambda b: (tokens(b),),
        {
            "encoder.layer.*.attention.self.*": W24,
            "encoder.layer.*.attention.output.dense": W24,
            "encoder.layer.*.intermediate.dense": W24,
            "encoder.layer.*.output.dense": W24,
            "pooler.dense": W24,
        },
    ),
    "gpt2": Case(
        gpt2,
        lambda b: (tokens(b),),
        {"transformer.h.*.attn.*": W24, "transformer.h.*.mlp.*": W24},
    ),
    # Releases of transformers name the blocks of ViT in two ways.
    "vit": Case(vit, lambda b: (images(b),), {r"re:vit\.(encoder\.)?layers?\.\d+\..*": W24}),
    "timm_vit": Case(timm_vit, lambda b: (images(b),), {"blocks.*.attn.*": W24, "blocks.*.mlp.*": W24}),
}


INDUCTOR = {
    "mlp": (False, "batch"),
    "block": (True, "batch"),
    "cross_attention": (False, False),
    "gpt2": (True, "batch"),
}
"""Which of the four of a model goes through Inductor."""


@pytest.mark.parametrize("dynamic", [False, "batch"], ids=["static", "dynamic"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.loops] * (name == "block")) for name in CASES])
def test_model(name: str, checkpointed: bool, dynamic: bool | str) -> None:
    case = CASES[name]
    inner = "inductor" if INDUCTOR.get(name) == (checkpointed, dynamic) else "aot_eager"
    batches = [case.inputs(size) for size in ((2, 3) if dynamic else (2,))]
    compare(case.build(checkpointed), case.config, *batches, sites=case.sites, dynamic=dynamic, graphs=1, inner=inner)


def test_changed_batch_size_compiles_again() -> None:
    x = [(features(size),) for size in (2, 3, 2)]
    compare(MLP(), {"fc1": W24}, *x, dynamic=False, graphs=2)


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "all"])
def test_dynamic_as_torch_compile_decides(dynamic: bool | None) -> None:
    x = [(torch.randn(size, size + 1, 16),) for size in (2, 3, 5)]
    compare(MLP(), {"fc*": W24}, *x, dynamic=dynamic, graphs=1 if dynamic else 2)


# Modes and dtypes


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("name", ["mlp", "block", "cross_attention", "llama", "gpt2"])
def test_autocast(name: str) -> None:
    """The mask is chosen on the float32 parameter on both sides; what is left is bfloat16 noise."""
    case = CASES[name]
    compare(
        case.build(name == "block"), case.config, case.inputs(2),
        sites=case.sites, context=autocast, tolerance=TOLERANCE[torch.bfloat16],
    )  # fmt: skip


@pytest.mark.loops
def test_autocast_through_inductor() -> None:
    compare(
        MLP(), {"fc1": W24, "fc2": W24}, (features(2),),
        context=autocast, inner="inductor", tolerance=TOLERANCE[torch.bfloat16],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtype(dtype: torch.dtype) -> None:
    x = features(3, dim=32).detach().to(dtype).requires_grad_()
    compare(Block().to(dtype), CASES["block"].config, (x,), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("mode", "inner"),
    [(torch.no_grad, "aot_eager"), (torch.inference_mode, "aot_eager"), (torch.no_grad, "inductor")],
)
def test_inference(mode: Callable[[], Any], inner: str) -> None:
    compare(Block().eval(), CASES["block"].config, (features(2, dim=32).detach(),),
            context=mode, backward=False, inner=inner)  # fmt: skip


def test_eval_mode_with_gradients() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 8))
    compare(model.eval(), {"0": W24, "3": W24}, (torch.randn(6, 8, requires_grad=True),))


# What needs a gradient


def frozen(model: nn.Module, *names: str) -> nn.Module:
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


@pytest.mark.parametrize("needs_grad", [True, False], ids=["input_grad", "no_input_grad"])
@pytest.mark.parametrize(
    "names",
    [("fc1.weight",), ("fc2.weight",), ("fc1.weight", "fc1.bias"), ("fc1.bias", "fc2.bias")],
    ids="+".join,
)
def test_frozen(names: tuple[str, ...], needs_grad: bool) -> None:
    x = features(3).detach().requires_grad_(needs_grad)
    compare(frozen(MLP(), *names), {"fc1": W24, "fc2": W24}, (x,))


def test_all_frozen() -> None:
    model = MLP().requires_grad_(False)
    compare(model, {"fc1": W24, "fc2": W24}, (features(3),))


def test_first_layer_alone_has_two_gemms() -> None:
    """With inputs that need no gradient the mask is in the output only."""
    x = features(3).detach()
    compare(nn.Sequential(nn.Linear(16, 8)), {"0": W24}, (x,), same_gradients=True)


# Graphs


class Broken(MLP):
    def body(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        torch._dynamo.graph_break()
        return self.fc2(x)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_graph_break(inner: str) -> None:
    compare(Broken(), {"fc1": W24, "fc2": W24}, (features(2),), sites=1, graphs=2, inner=inner)


def test_graph_break_with_names_without_model() -> None:
    compare(Broken(), {"fc1": W24, "fc2": W24}, (features(2),), sites=1, graphs=2, named=None)


def test_nested_function() -> None:
    def entry(model: nn.Module) -> Callable[..., Any]:
        def step(x: Tensor) -> Tensor:
            return model(x).square().mean()

        return step

    for named in ("model", None):
        compare(MLP(), {"fc1": W24, "fc2": W24}, (features(2),), entry=entry, named=named)


def test_model_in_a_list_and_in_an_object() -> None:
    class Trainer:
        def __init__(self, model: nn.Module) -> None:
            self.models = [model]

        def step(self, x: Tensor) -> Tensor:
            return self.models[0](x)

    for named in ("model", None):
        compare(MLP(), {"fc1": W24}, (features(2),), entry=lambda m: Trainer(m).step, named=named)


def test_sequential_root() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 8)))
    for named in ("model", None):
        compare(model, {"0": W24, "2.0": W24}, (features(2),), named=named)


def test_linear_as_root() -> None:
    """A root has no module name; its parameter has."""
    for named in ("model", None):
        compare(nn.Linear(16, 8), {"weight": W24}, (features(2),), named=named)


# Weights


class Tied(nn.Module):
    """Two linears of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize(("name", "inner"), [("first", "aot_eager"), ("second", "aot_eager"), ("second", "inductor")])
def test_tied_by_module(name: str, inner: str) -> None:
    """Of a shared weight only the named linear is sparse."""
    compare(Tied(), {name: W24}, (features(2),), inner=inner)


@pytest.mark.parametrize("scheme", [W24, sp.WeightSparsity(grad_weight="masked")], ids=str)
def test_tied_by_both_modules(scheme: sp.WeightSparsity) -> None:
    compare(Tied(), {"first": scheme, "second": scheme}, (features(2),))


def test_tied_by_modules_with_two_schemes() -> None:
    greedy = sp.WeightSparsity(mask="greedy", grad_weight="masked")
    compare(Tied(), {"first": W24, "second": greedy}, (features(2),))


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_tied_by_parameter(name: str) -> None:
    """The name of a parameter means every linear that reads it."""
    compare(Tied(), {name: W24}, (features(2),), masked={"first": W24, "second": W24})


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.fc(x)))


def test_one_linear_called_twice() -> None:
    compare(Twice(), {"fc": W24}, (features(2),), sites=2)


def test_one_linear_on_two_inputs() -> None:
    def entry(model: nn.Module) -> Callable[..., Any]:
        return lambda x, y: model(x) + model(y.mul(2))

    compare(MLP(), {"fc1": W24, "fc2": W24}, (features(2), features(2)), sites=4, entry=entry)


def test_tied_embedding_stays_dense() -> None:
    """GPT-2's head shares the token table: the head is sparse, the lookup is not."""
    compare(gpt2(False), {"lm_head": W24}, (tokens(2),))


class OwnParameter(nn.Module):
    """F.linear with parameters of a bigger module."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(32, 16) / 4)
        self.down = nn.ParameterList([torch.randn(12, 32) / 4, torch.zeros(12)])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.up)), self.down[0], self.down[1])


def test_own_parameter() -> None:
    for named in ("model", None):
        compare(OwnParameter(), {"up": W24, "down.0": W24}, (features(2),), named=named)


class LoRALinear(nn.Linear):
    """A subclass whose forward has more GEMMs than its weight's."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.weight.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(4, 16) / 4)
        self.lora_b = nn.Parameter(torch.randn(16, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a), self.lora_b)


def test_linear_subclass_with_more_weights() -> None:
    """The module's name means its weight; the others have names of their own."""
    model = nn.Sequential(LoRALinear(), nn.Tanh(), LoRALinear())
    for named in ("model", None):
        compare(model, {"0": W24, "2": W24}, (features(2),), named=named)
    compare(model, {"0.lora_a": W24}, (features(2),))


def test_linear_subclass_with_more_weights_and_no_names() -> None:
    """SparsePass alone cannot tell the weights of one module apart, and says so."""
    options = {"joint_custom_pre_pass": sp.SparsePass({"0": W24})}
    with pytest.raises(Exception, match="multiplies by 3 weights and their names are not visible"):
        torch.compile(nn.Sequential(LoRALinear()), options=options)(features(2))


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("named", [None, "model"])
def test_parametrized_weight(parametrize: Callable[[nn.Module], Any], named: str | None) -> None:
    """The mask is that of the weight that the parametrization computed."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    parametrize(model[0])
    compare(model, {"0": W24, "2": W24}, (features(2),), named=named)


def test_gradient_of_a_parametrized_weight_stays_dense() -> None:
    """Asked for another, the pass refuses."""
    model = nn.Sequential(nn.Tanh(), parametrizations.weight_norm(nn.Linear(16, 32)))
    with pytest.raises(Exception, match=r"'1'.*changes grad_weight, but .* a weight which the graph computes"):
        compare(model, {"1": sp.WeightSparsity(grad_weight="masked")}, (features(2),), named=None)


def test_functional_call() -> None:
    def entry(model: nn.Module) -> Callable[..., Any]:
        def call(x: Tensor) -> Tensor:
            return torch.func.functional_call(model, dict(model.named_parameters()), (x,))

        return call

    compare(MLP(), {"fc1": W24, "fc2": W24}, (features(2),), entry=entry)


# Wrappers and copies


class Wrapper(nn.Module):
    """Names as DistributedDataParallel makes them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.module(*inputs)


@pytest.mark.parametrize("named", ["model", None])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_is_no_part_of_a_name(prefix: str, named: str | None) -> None:
    wrap = {
        "module.": Wrapper,
        "_orig_mod.": lambda model: torch.compile(model, backend="eager"),
        "module._orig_mod.": lambda model: Wrapper(torch.compile(model, backend="eager")),
    }
    masked = {f"{prefix}fc1": W24, f"{prefix}fc2": W24}
    compare(wrap[prefix](MLP()), {"fc1": W24, "fc2": W24}, (features(2),), named=named, masked=masked)


def test_unwrapped_model_gives_the_names() -> None:
    model = MLP()
    masked = {"module.fc1": W24, "module.fc2": W24}
    compare(Wrapper(model), {"fc1": W24, "fc2": W24}, (features(2),), masked=masked, named=model)


def test_copies_keep_apart() -> None:
    """A model, a copy compiled for another layer, and a copy of the compiled model: each computes its own."""
    model, x = MLP(), features(2)
    first, second = {"fc1": W24}, {"fc2": W24}
    other = copy.deepcopy(model)
    with fresh_compile():
        compiled = torch.compile(model, backend=sp.sparse_backend(first, model=model, inner="aot_eager"))
        compiled(x)
        of_other = torch.compile(other, backend=sp.sparse_backend(second, model=other, inner="aot_eager"))
        copied = copy.deepcopy(compiled)
        with torch.no_grad():
            copied.fc1.weight.mul_(-1)
        for _ in range(2):
            for actual, dense, config in (
                (compiled, model, first),
                (of_other, other, second),
                (copied, copied._orig_mod, first),
            ):
                expected = ste_reference(dense, config)(x)
                assert relative_error(actual(x), expected) < TOLERANCE[torch.float32]
                assert relative_error(dense(x), expected) > 0.1


def test_regions_of_a_model() -> None:
    """Blocks compiled one by one, two of three named."""
    model = nn.Sequential(*(Twice() for _ in range(3)))
    config = {"0.fc": W24, "2.fc": W24}
    reference, x = ste_reference(model, config), features(2)
    with fresh_compile():
        backend = sp.sparse_backend(config, model=model, inner="aot_eager")
        for block in model:
            block.compile(backend=backend)
        assert relative_error(model(x), reference(x)) < TOLERANCE[torch.float32]
