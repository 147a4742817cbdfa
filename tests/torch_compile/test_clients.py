"""The loops that people train with: PEFT, Lightning Fabric, timm, and what torchtitan does in its order. Who refuses.

The shortest code for each of them is in docs/clients.md, which tests/test_docs.py runs."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from stack import Stack
from support import relative_error
from torch import Tensor, nn
from torch._dynamo.backends import registry
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import sparse_pass as sp
from sparse_pass import registered
from sparse_pass.registered import RegisteredBackend

W24 = sp.WeightSparsity()


@contextmanager
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*sparse_pass")
        yield


def layers(report: sp.Report) -> set[str]:
    return {name for site in report.sites for name in (site.fqn, *site.serves)}


def pruned(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    copied = copy.deepcopy(model)
    sp.prune_(copied, config)
    return copied


# PEFT


def lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    lora = peft.LoraConfig(target_modules=["q_proj"], r=4, lora_dropout=0.0, init_lora_weights=False)
    return peft.get_peft_model(LlamaForCausalLM(config), lora)


LLAMA = "base_model.model.model.layers"


@pytest.mark.parametrize("with_model", [True, False])
@pytest.mark.parametrize(
    ("config", "names"),
    [
        pytest.param(
            {
                f"{LLAMA}.*.mlp.gate_proj": W24,
                f"{LLAMA}.0.self_attn.q_proj.base_layer": W24,
                f"{LLAMA}.1.self_attn.q_proj.base_layer.weight": W24,
            },
            {f"{LLAMA}.{i}.{leaf}" for i in (0, 1) for leaf in ("mlp.gate_proj", "self_attn.q_proj.base_layer")},
            id="names",
        ),
        pytest.param(
            {r"re:.*\.mlp\.(gate|up|down)_proj|.*base_layer": W24},
            {
                f"{LLAMA}.{i}.{leaf}"
                for i in (0, 1)
                for leaf in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj.base_layer")
            },
            id="expression",
        ),
    ],
)
def test_peft(config: Mapping[str, Any], names: set[str], with_model: bool) -> None:
    """The frozen base is masked, in output and grad_input; the adapters learn what they learn beside a pruned base."""
    model = lora()
    ids = torch.randint(0, 128, (2, 16))
    reference = pruned(model, config)
    backend = sp.sparse_backend(config, model=model if with_model else None, inner="aot_eager", strict=True)
    with silence():
        loss = torch.compile(model, backend=backend)(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0).step()
        report = backend.report
    wanted = reference(input_ids=ids, labels=ids).loss
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    adapters = [(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True) if p.requires_grad]
    assert len(adapters) == 4
    for one, other in adapters:
        assert relative_error(one.grad, other.grad) < 1e-4
    assert layers(report) == names
    assert report.uncaptured == ()


# Lightning Fabric


def compiled_first(fabric: Any, model: nn.Module, optimizer: Any, backend: Any) -> tuple[nn.Module, Any]:
    return fabric.setup(torch.compile(model, backend=backend), optimizer)


def compiled_once(fabric: Any, model: nn.Module, optimizer: Any, backend: Any) -> tuple[nn.Module, Any]:
    return fabric.setup(torch.compile(model, backend=backend), optimizer, _reapply_compile=False)


def compiled_last(fabric: Any, model: nn.Module, optimizer: Any, backend: Any) -> tuple[nn.Module, Any]:
    model, optimizer = fabric.setup(model, optimizer)
    return torch.compile(model, backend=backend), optimizer


@pytest.mark.parametrize("order", [compiled_first, compiled_once, compiled_last])
def test_fabric(order: Callable[..., Any]) -> None:
    """It wraps the module in one with its own `__getattr__`, and copies the backend to compile again."""
    lightning = pytest.importorskip("lightning")
    config = {"blocks.*.fc1": W24}
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = Stack()
    reference = pruned(model, config)
    backend = sp.sparse_backend(config, model=model, inner="aot_eager", strict=True)
    forward, optimizer = order(fabric, model, torch.optim.SGD(model.parameters(), lr=0.0), backend)
    x = torch.randn(8, 16)
    with silence():
        output = forward(x)
        fabric.backward(output.sum())
        optimizer.step()
        report = backend.report
    torch.testing.assert_close(output, reference(x))
    assert layers(report) == {f"blocks.{i}.fc1" for i in range(3)}
    assert report.uncaptured == ()


# torchtitan's order: activation checkpointing, compiled blocks, sharding


@pytest.mark.parametrize("when", ["first", "after the wrappers", "last"])
@pytest.mark.parametrize(
    ("dense", "graphs"), [({}, 2), ({"blocks.1.fc1": None}, 3)], ids=["all alike", "one of them dense"]
)
@pytest.mark.usefixtures("one_process")
def test_checkpointed_compiled_and_sharded(when: str, dense: dict[str, None], graphs: int) -> None:
    config = {"blocks.*.fc1": W24, **dense}
    model, x = Stack(), torch.randn(8, 16)
    reference = pruned(model, config)

    def made() -> Any:
        return sp.sparse_backend(config, model=model, inner="aot_eager", strict=True)

    backend = made() if when == "first" else None
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    if when == "after the wrappers":
        backend = made()
    if backend is not None:
        for block in model.blocks:
            block.compile(backend=backend, fullgraph=True)
    for part in (*model.blocks, model):
        fully_shard(part)
    if backend is None:
        backend = made()
        for block in model.blocks:
            block.compile(backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    with silence():
        output = model(x)
        output.sum().backward()
        optimizer.step()
        report = backend.report
    torch.testing.assert_close(output, reference(x))
    assert layers(report) == {f"blocks.{i}.fc1" for i in range(3) if f"blocks.{i}.fc1" not in dense}
    assert (report.uncaptured, report.graphs) == ((), graphs)


@pytest.mark.parametrize("when", ["before it is wrapped", "afterwards"])
@pytest.mark.usefixtures("one_process")
def test_fsdp1(when: str) -> None:
    """It takes the parameters out of the modules and puts views in their place. Shards: test_two_ranks.py."""
    config = {"blocks.*.fc1": W24}
    model, x = Stack(), torch.randn(8, 16)
    reference = pruned(model, config)

    def backend_for(module: nn.Module) -> Any:
        return sp.sparse_backend(config, model=module, inner="aot_eager", strict=True)

    backend = backend_for(model) if when == "before it is wrapped" else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP is switching to use `NO_SHARD`")
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    backend = backend or backend_for(wrapped)
    with silence():
        output: Tensor = torch.compile(wrapped, backend=backend)(x)
        output.sum().backward()
        torch.optim.SGD(wrapped.parameters(), lr=0.0).step()
        report = backend.report
    torch.testing.assert_close(output, reference(x))
    assert layers(report) == {f"blocks.{i}.fc1" for i in range(3)}
    assert (report.uncaptured, report.unmatched) == ((), ())


# By the name of the backend


def test_lists_of_backends() -> None:
    """transformers and accelerate take the backends of a list of their own, as the page says."""
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate.utils")
    with pytest.raises(ValueError, match="'SPARSE_PASS' is not a valid DynamoBackend"):
        accelerate.TorchDynamoPlugin(backend="sparse_pass")
    arguments = transformers.TrainingArguments(torch_compile_backend="sparse_pass", use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="'SPARSE_PASS' is not a valid DynamoBackend"):
        transformers.Trainer(Stack(), arguments)


def test_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its train script does with `--torchcompile sparse_pass`: a name and a mode, no options."""
    for name in ("torchvision", "timm"):
        pytest.importorskip(name)
    import timm
    from timm.task import ClassificationTask

    names = {f"blocks.{i}.mlp.fc{j}" for i in range(12) for j in (1, 2)}
    path = tmp_path / "sparse.json"
    path.write_text(json.dumps(sp.config_to_dict({"blocks.*.mlp.fc*": W24})))
    monkeypatch.setenv("SPARSE_PASS_CONFIG", str(path))
    monkeypatch.setitem(registry._BACKENDS, "sparse_pass", None)
    monkeypatch.setitem(registry._COMPILER_FNS, "sparse_pass", by_name := RegisteredBackend())
    monkeypatch.setattr(by_name, "_tags", (), raising=False)
    monkeypatch.setattr(registered, "sparse_backend", functools.partial(sp.sparse_backend, inner="aot_eager"))
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10)
    reference = pruned(model, {"blocks.*.mlp.fc*": W24})
    task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    task.compile(backend="sparse_pass", mode=None)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    with silence():
        result = task(images, labels)
        result["loss"].backward()
    torch.testing.assert_close(result["output"], reference(images))
    assert layers(by_name.report) == names
