"""Schedules in the trainers of transformers and of Lightning: the trainer's own count of steps, resumed too."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from scheduled import CONFIG, FC1, straight_through
from stack import Stack
from torch import Tensor, nn

import sparse_pass as sp

MASKED = {**dict.fromkeys(FC1, "optimal"), "blocks.1.fc2": "greedy"}
SPARSE_STEPS = {1, 2}
LAST = 4
"""Steps of a whole run. It is also made in two, with a checkpoint in the midst of the sparse steps."""


class WithLoss(nn.Module):
    """As transformers' Trainer takes it; keeps what it was called with, and what it gave."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stack = Stack()
        self.seen: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.stack(x)
        self.remember(x, out)
        return {"loss": out.square().mean()}

    @torch.compiler.disable
    def remember(self, x: Tensor, out: Tensor) -> None:
        before = {name: tensor.clone() for name, tensor in self.stack.state_dict().items()}
        self.seen.append((x.detach(), out.detach(), before))


def scheduled(model: WithLoss) -> sp.Schedule:
    config = {f"stack.{key}": scheme for key, scheme in CONFIG.items()}
    backend = sp.sparse_backend(config, model=model, inner="aot_eager", strict=True)
    model.stack.compile(backend=backend)
    return sp.Schedule(backend, min(SPARSE_STEPS), max(SPARSE_STEPS) + 1)


def check(model: WithLoss, first: int, micro_steps: int) -> None:
    """Each call was sparse in the sparse steps and dense in the others."""
    assert len(model.seen) == (LAST - first) * micro_steps or first == 0
    other = Stack()
    for call, (x, out, weights) in enumerate(model.seen):
        other.load_state_dict(weights)
        masked = MASKED if first + call // micro_steps in SPARSE_STEPS else {}
        torch.testing.assert_close(out, straight_through(other, x, masked), msg=f"call {call}")


def batches() -> list[Tensor]:
    return [torch.randn(16, generator=torch.Generator().manual_seed(i)) for i in range(64)]


def test_transformers(tmp_path: Path) -> None:
    """Two micro-steps to a step: the switch is between steps."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def train(steps: int, resume: bool = False) -> tuple[WithLoss, Any]:
        model = WithLoss()
        schedule = scheduled(model)
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            save_steps=2, report_to=[], disable_tqdm=True, logging_strategy="no", use_cpu=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=[{"x": x} for x in batches()], callbacks=[schedule.transformers_callback()]
        )
        trainer.train(resume_from_checkpoint=resume)
        assert schedule.count == steps - 1  # evaluation after the last step is of what was trained
        return model, schedule

    model, _ = train(2)
    check(model, 0, 2)
    model, _ = train(LAST, resume=True)
    check(model, 2, 2)
    assert len(model.seen) == 4


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = WithLoss()

        def training_step(self, batch: Tensor) -> Tensor:
            return self.model(batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train(steps: int, resume: Path | None = None) -> WithLoss:
        module = Module()
        schedule = scheduled(module.model)
        loader = torch.utils.data.DataLoader(batches(), batch_size=4)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(num_workers|litlogger|GPU|log_every_n_steps|LeafSpec).*")
            trainer = lightning.Trainer(
                accelerator="cpu", devices=1, max_steps=steps, accumulate_grad_batches=2, logger=False,
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                callbacks=[schedule.lightning_callback()],
            )  # fmt: skip
            trainer.fit(module, loader, ckpt_path=resume)
            trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module.model

    check(train(2), 0, 2)
    model = train(LAST, tmp_path / "last.ckpt")
    check(model, 2, 2)
    assert len(model.seen) == 4
