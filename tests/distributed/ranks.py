"""Programs of several ranks on CPUs: how they start, the network that they train, and the reference they are held to.

A test file that is also the program of its ranks ends in::

    if __name__ == "__main__":
        main({"name": function, ...})

Its arguments are numbers of ranks, each followed by the compositions that so many ranks run. One process imports torch
and forks the ranks; each runs its compositions one after the other, in one process group. Starting N processes that
import torch would take longer than all that they compute.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from compile_time import quick_dynamo, rare_collections
from support import TOLERANCE, original_name, python_environment, relative_error, ste_reference
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_pass as sp
from sparse_pass.backend import SparseBackend

DIM, TOKENS, BATCH = 16, 8, 4
W24 = sp.WeightSparsity()
CONFIG = {"blocks.*.fc1": W24, "blocks.1.fc2": W24}
NAMED = ["blocks.0.fc1", "blocks.1.fc1", "blocks.1.fc2"]
STEPS = 2


class Block(nn.Module):
    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 2 * dim)
        self.fc2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


class Network(nn.Module):
    """Two blocks and a head of as many classes as features."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(2))
        self.head = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def network(dim: int = DIM) -> Network:
    """The same on all ranks."""
    torch.manual_seed(0)
    return Network(dim)


def batch(step: int, dim: int = DIM) -> tuple[Tensor, Tensor]:
    """Input [BATCH, TOKENS, dim] and classes [BATCH, TOKENS] of a step, of all ranks together."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, TOKENS, dim, generator=generator)
    return x, torch.randint(dim, (BATCH, TOKENS), generator=generator)


def loss_of(logits: Tensor, classes: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), classes.flatten())


def own(tensor: Tensor, dim: int = 0) -> Tensor:
    """The part of a batch that is this rank's, where each has another one."""
    return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which ranks may hold parts."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """By the names of the parameters in `Network`, those of wrappers left out."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            plain = name.replace("module.", "").replace("_orig_mod.", "").replace("_checkpoint_wrapped_", "")
            found[original_name(plain)] = whole(parameter.grad).detach()
    return found


@dataclass
class Reference:
    """One process that trains with straight-through masks, written by hand."""

    model: nn.Module = field(default_factory=lambda: ste_reference(network(), CONFIG))
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = lambda parameters: torch.optim.AdamW(
        parameters, lr=1e-2
    )
    clip: float | None = None
    tolerance: float = TOLERANCE[torch.float32]

    def steps(self) -> list[tuple[float, dict[str, Tensor]]]:
        """Loss and gradients of each step."""
        optimizer, found = self.optimizer(self.model.parameters()), []
        for step in range(STEPS):
            x, classes = batch(step)
            optimizer.zero_grad()
            loss = loss_of(self.model(x), classes)
            loss.backward()
            found.append((loss.item(), copy.deepcopy(gradients_of(self.model))))
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            optimizer.step()
        return found


def check(
    model: nn.Module,
    backend: SparseBackend,
    step: Callable[[int], Tensor],
    reference: Reference | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    before_step: Callable[[], None] = lambda: None,
    named: list[str] = NAMED,
) -> None:
    """Train, and compare each step's loss and gradients with the reference's; then read the report.

    Args:
        step: computes forward and backward of a step; returns the loss of what this rank has of the batch.
        before_step: after the gradients are compared, such as clipping them.
    """
    reference = reference or Reference()
    optimizer = optimizer or reference.optimizer(model.parameters())
    for number, (loss, gradients) in enumerate(reference.steps()):
        optimizer.zero_grad()
        mine = step(number).detach().clone()
        dist.all_reduce(mine)
        assert abs(float(mine) / dist.get_world_size() - loss) < 10 * reference.tolerance, (number, float(mine), loss)
        actual = gradients_of(model)
        assert actual.keys() == gradients.keys()
        errors = {name: relative_error(actual[name], one) for name, one in gradients.items()}
        assert max(errors.values()) < 10 * reference.tolerance, (number, errors)
        before_step()
        optimizer.step()
    check_report(backend, named)


def check_report(backend: SparseBackend, named: list[str]) -> None:
    report = backend.report
    served = {name for site in report.sites for name in (site.fqn, *site.serves)}
    assert sorted(served) == named, str(report)
    assert {site.status for site in report.sites} == {"masked_dense"}, str(report)
    assert (report.unmatched, report.uncaptured) == ((), ()), str(report)


# Starting them


def main(compositions: Mapping[str, Callable[[], None]]) -> None:
    """The program: one group of ranks after the other."""
    groups: dict[int, list[str]] = {}
    for argument in sys.argv[1:]:
        if argument.isdecimal():
            names = groups.setdefault(int(argument), [])
        else:
            names.append(argument)
    with torch.no_grad():  # imports what all ranks would import each by itself; a backward would bar autograd from them
        sp.explain(network(), CONFIG)(batch(0)[0])
    rare_collections()
    for count, names in groups.items():
        store = tempfile.mktemp()
        children = []
        for rank in range(count):
            child = os.fork()
            if child == 0:
                os._exit(_rank(rank, count, store, {name: compositions[name] for name in names}))
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        Path(store).unlink(missing_ok=True)  # the last rank to leave removes it, too
        if any(codes):
            sys.exit(1)


def _rank(rank: int, count: int, store: str, compositions: Mapping[str, Callable[[], None]]) -> int:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    for name, composition in compositions.items():
        torch._dynamo.reset()
        try:
            with quick_dynamo():
                composition()
        except BaseException:  # the others wait for this rank in vain: no later composition can run
            traceback.print_exc()
            print(f"wrong: {name} on rank {rank}", file=sys.stderr, flush=True)
            return 1
        os.write(1, f"right: {name}.\n".encode())  # in one piece: the other ranks write, too
        dist.barrier()
    dist.destroy_process_group()
    return 0


def launch(file: str, groups: Mapping[int, Iterable[str]], **variables: str) -> str:
    """Run a program of ranks, and see that each of them found each composition right. Returns what it printed.

    groups: compositions, by the number of their ranks.
    """
    done: Any = subprocess.run(
        [sys.executable, file, *(word for count, names in groups.items() for word in (str(count), *names))],
        env=python_environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    for count, names in groups.items():
        for name in names:
            assert done.stdout.count(f"right: {name}.\n") == count, output
    return str(output)
