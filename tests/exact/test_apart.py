"""S(W) and S(W)^T packed apart: where one is enough, and where many rows make two kernels as good as one."""

from __future__ import annotations

import pytest
import torch
from support import errors, fresh_compile, run, ste_reference, twins
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import sparse_pass as sp
from sparse_pass.vocabulary import packed_numel

KERNELS = sp.WeightSparsity(backend="cusparselt")
MANY = 16384
sparse = torch.ops.sparse_pass


class Twice(nn.Module):
    """One linear, called twice: the backward of the second call comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.fc(torch.relu(x))))


def leaf(rows: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(rows, 64, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_the_op_is_one_of_the_two(transposed: bool, dtype: torch.dtype | None) -> None:
    weight = torch.randn(64, 128) if dtype else torch.randn(64, 128).bfloat16()
    both = sparse.sparsify(weight, "greedy", dtype=dtype)
    assert torch.equal(sparse.sparsify_one(weight, "greedy", transposed, dtype=dtype), both[int(transposed)])
    torch.library.opcheck(sparse.sparsify_one.default, (weight, "greedy", transposed), {"dtype": dtype})
    with pytest.raises(ValueError, match=r"multiples of 64, not \[60, 64\]"):
        sparse.sparsify_one(torch.randn(60, 64).bfloat16(), "optimal", transposed)


def saved(model: nn.Module, rows: int, scheme: sp.WeightSparsity = KERNELS) -> tuple[int, int]:
    """Train a step right; bytes that the forward keeps, the parameters left out, and kernels that make both."""
    config = {"fc": scheme}
    reference = ste_reference(model, config)
    parameters = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes if tensor.untyped_storage().data_ptr() not in parameters else 0
        return tensor

    x = leaf(rows, model.fc.weight.dtype)
    with fresh_compile(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compiled = torch.compile(model, backend=sp.sparse_backend(config, model=model))
        actual, code = run_and_get_code(lambda: run(compiled, dict(model.named_parameters()), [x]))
    found = errors(actual, run(reference, twins(model, reference), [x]))
    assert max(found.values()) < 2e-2, found
    return kept, "\n".join(code).count("compiled.sparsify(")


def test_many_rows_keep_nothing_of_the_weight() -> None:
    torch.manual_seed(0)
    packed = 2 * packed_numel(64, 64)
    few, both = saved(Twice().bfloat16(), MANY - 8)
    assert both == 1
    many, both = saved(Twice().bfloat16(), MANY)
    assert both == 0
    assert few - packed == many - 2 * 2 * 8 * 64  # two inputs of eight rows more


@pytest.mark.parametrize(
    ("scheme", "rows"), [(KERNELS, 64), (sp.WeightSparsity(mask="greedy", backend="cusparselt"), MANY)], ids=str
)
def test_both_at_once(scheme: sp.WeightSparsity, rows: int) -> None:
    """With few rows the second kernel would be felt; the greedy mask takes long to choose."""
    torch.manual_seed(0)
    assert saved(Twice().bfloat16(), rows, scheme)[1] == 1


def test_an_unknown_number_of_rows_is_not_asked_for() -> None:
    """A comparison would be a guard: a graph for few rows and another one for many."""
    model = nn.Sequential(nn.Tanh(), nn.Linear(64, 64)).bfloat16()
    backend = sp.sparse_backend({"1": KERNELS}, model=model, inner="aot_eager")
    with fresh_compile():
        compiled = torch.compile(model, backend=backend, dynamic=True)
        for rows in (8, MANY):
            compiled(leaf(rows)).sum().backward()
    assert [site.output for site in backend.report.sites] == ["reference"]
