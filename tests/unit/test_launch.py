"""Triton kernels are launched past Triton's binder where that changes nothing: on fake kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_pass.kernels import launch as module
from sparse_pass.kernels import recent
from sparse_pass.kernels.launch import launch


class Kernel:
    """Notes each launch, and whether Triton bound its arguments."""

    def __init__(self, compiles: bool = True) -> None:
        self.calls: list[tuple[str, Any, tuple[Any, ...]]] = []
        self.compiles = compiles

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., Compiled | None]:
        def run(*args: Any, num_warps: int) -> Compiled | None:
            self.calls.append(("bound", grid, args))
            return Compiled(self) if self.compiles else None

        return run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args: self.kernel.calls.append(("runner", grid, args))


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RUNNERS", {})


def ways(kernel: Kernel) -> list[str]:
    return [way for way, _, _ in kernel.calls]


def test_the_second_call_is_not_bound_again() -> None:
    kernel, one, two = Kernel(), torch.zeros(64), torch.ones(64)
    launch(kernel, (2, 3), (one,), (64, 1), (True,), 4)
    launch(kernel, (2, 3), (two,), (64, 1), (True,), 4)
    assert ways(kernel) == ["bound", "runner"]
    grid, args = kernel.calls[1][1:]
    assert grid == (2, 3, 1)
    assert args == (two.data_ptr(), 64, 1, True)  # the tensor of this call


@pytest.mark.parametrize(
    "other",
    [
        ((torch.zeros(64, dtype=torch.float16),), (64, 1), (True,), 4),
        ((torch.zeros(64),), (64, 2), (True,), 4),
        ((torch.zeros(64),), (64, 1), (False,), 4),
        ((torch.zeros(64),), (64, 1), (True,), 2),
    ],
    ids=["dtype", "numbers", "constants", "warps"],
)
def test_what_compiles_to_something_else_is_bound(other: Any) -> None:
    kernel = Kernel()
    launch(kernel, (2, 3), (torch.zeros(64),), (64, 1), (True,), 4)
    launch(kernel, (2, 3), *other)
    assert ways(kernel) == ["bound", "bound"]


def test_pointers_that_triton_does_not_take_for_aligned() -> None:
    kernel, whole = Kernel(), torch.zeros(65)
    for tensor in (whole[1:], whole[:64], whole[1:], whole[:64]):
        launch(kernel, (2, 3), (torch.zeros(1), tensor), (64,), (), 4)
    assert ways(kernel) == ["bound", "bound", "bound", "runner"]


def test_in_the_interpreter_nothing_is_compiled() -> None:
    kernel = Kernel(compiles=False)
    for _ in range(2):
        launch(kernel, (2, 3), (torch.zeros(64),), (64,), (), 4)
    assert ways(kernel) == ["bound", "bound"]


def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent, "LIMIT", 2)
    kernel, x = Kernel(), torch.zeros(64)
    for rows in (1, 2, 3, 1, 3):
        launch(kernel, (2, 3), (x,), (rows,), (), 4)
    assert ways(kernel) == ["bound"] * 4 + ["runner"]
    assert len(module._RUNNERS) == 2
