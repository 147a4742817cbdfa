"""examples/train_fsdp.py: under torchrun, stopped, and resumed on another layout and number of ranks."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from support import python_environment

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = "--layers 2 --dim 64 --heads 2 --context 32 --batch 4 --save-every 2 --inner aot_eager"


def losses(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+)  loss ([\d.]+)", output)}


def test_train_fsdp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    program = [str(EXAMPLES / "train_fsdp.py"), *TINY.split(), "--out", str(tmp_path)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, *program, "--steps", "4", "--tp", "2", "--checkpoint-activations"],
        env=python_environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first = losses(done.stdout)
    assert list(first) == [1, 2, 3, 4]
    assert first[4] < first[1]
    assert "blocks.0.fc1  w24     128, 128, 64" in done.stdout, done.stdout
    assert "[256, 64], rows in 2 over mesh dim 'tp'" in done.stdout
    assert "sparse_pass: '" not in done.stderr  # no warning of a dense step

    # As if it had been killed after the third step: the last checkpoint is not whole.
    (tmp_path / "step-000004" / ".metadata").unlink()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr("sys.argv", [*program, "--steps", "5"])
    runpy.run_path(program[0], run_name="__main__")
    output = capsys.readouterr().out
    assert "resumed after step 2" in output
    second = losses(output)
    assert list(second) == [3, 4, 5]
    assert [second[step] for step in (3, 4)] == pytest.approx([first[step] for step in (3, 4)], rel=1e-5)
