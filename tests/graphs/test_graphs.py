"""What the pass writes into a graph, line by line.

Graphs are those that Inductor would show to the pass (its decompositions included), captured on CPU.
Update the goldens with ``EXPECTTEST_ACCEPT=1 pytest tests/graphs``.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_printer import capture, capture_all, printed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_pass as sp

W24 = sp.WeightSparsity()
SPARSE = sp.WeightSparsity(backend="cusparselt")  # on a CPU: the reference kernels


class Up(nn.Module):
    """One linear, with something before it, so that the backward has all three GEMMs."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x.sin())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128, bias=False)
        self.down = nn.Linear(128, 64, bias=False)

    def mlp(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).sin())

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.mlp, x, use_reentrant=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64, bias=False)
        self.second = nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).sin())


class Conv1D(nn.Module):
    """As transformers has it in GPT-2: a linear with its weight stored [K, N]."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(k, n))
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.weight.size(1))
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Gpt2Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc = Conv1D(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_fc(x.sin())


class Autocast(Up):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def rows(*leading: int, width: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*leading, width, dtype=dtype, requires_grad=True)


def rewritten(model: nn.Module, x: Tensor, config: dict[str, Any]) -> str:
    """The printed graph, which must differ from the captured one and hold what every graph holds."""
    captured = capture(model.to(x.dtype), [x], config)
    captured.check_invariants()
    assert captured.text != printed(captured.before.graph)
    return captured.text


def test_linear() -> None:
    assert_expected_inline(
        rewritten(Up(), rows(8), {"up": W24}),
        """\
sin = aten.sin(primals_1)
mask24 = sparse_pass.mask24(primals_2, 'optimal')  # up
full = aten.full(0)  # up
where = aten.where(mask24, primals_2, full)  # up
permute = aten.permute(where, [1, 0])  # up
mm = aten.mm(sin, permute)  # up
permute_1 = aten.permute(tangents_1, [1, 0])  # up, backward
mm_1 = aten.mm(permute_1, sin)  # up, backward
permute_2 = aten.permute(mm_1, [1, 0])  # up, backward
permute_3 = aten.permute(permute, [1, 0])  # up, backward
mm_2 = aten.mm(tangents_1, permute_3)  # up, backward
permute_4 = aten.permute(permute_2, [1, 0])  # up, backward
cos = aten.cos(primals_1)  # backward
mul = aten.mul(mm_2, cos)  # backward
return mm, mul, permute_4""",
    )


def test_linear_sparse() -> None:
    assert_expected_inline(
        rewritten(Up(), rows(8), {"up": SPARSE}),
        """\
sin = aten.sin(primals_1)
sparsify = sparse_pass.sparsify(primals_2, 'optimal')  # up
getitem = sparsify[0]  # up
getitem_1 = sparsify[1]  # up
linear = sparse_pass.linear(sin, getitem, None, 128)  # up
permute = aten.permute(tangents_1, [1, 0])  # up, backward
mm = aten.mm(permute, sin)  # up, backward
permute_1 = aten.permute(mm, [1, 0])  # up, backward
linear_1 = sparse_pass.linear(tangents_1, getitem_1, None, 64)  # up, backward
permute_2 = aten.permute(permute_1, [1, 0])  # up, backward
cos = aten.cos(primals_1)  # backward
mul = aten.mul(linear_1, cos)  # backward
return linear, mul, permute_2""",
    )


def test_bias() -> None:
    assert_expected_inline(
        rewritten(Up(bias=True), rows(2, 8), {"up": W24}),
        """\
sin = aten.sin(primals_1)
view = aten.view(sin)  # up
mask24 = sparse_pass.mask24(primals_2, 'optimal')  # up
full = aten.full(0)  # up
where = aten.where(mask24, primals_2, full)  # up
permute = aten.permute(where, [1, 0])  # up
addmm = aten.addmm(primals_3, view, permute)  # up
view_1 = aten.view(addmm)  # up
view_2 = aten.view(tangents_1)  # up, backward
permute_1 = aten.permute(permute, [1, 0])  # up, backward
mm = aten.mm(view_2, permute_1)  # up, backward
permute_2 = aten.permute(view_2, [1, 0])  # up, backward
mm_1 = aten.mm(permute_2, view)  # up, backward
permute_3 = aten.permute(mm_1, [1, 0])  # up, backward
sum = aten.sum(view_2, [0], True)  # up, backward
view_3 = aten.view(sum)  # up, backward
permute_4 = aten.permute(permute_3, [1, 0])  # up, backward
view_4 = aten.view(mm)  # up, backward
cos = aten.cos(primals_1)  # backward
mul = aten.mul(view_4, cos)  # backward
return view_1, mul, permute_4, view_3""",
    )


def test_bias_sparse() -> None:
    assert_expected_inline(
        rewritten(Up(bias=True), rows(2, 8), {"up": SPARSE}),
        """\
sin = aten.sin(primals_1)
view = aten.view(sin)  # up
sparsify = sparse_pass.sparsify(primals_2, 'optimal')  # up
getitem = sparsify[0]  # up
getitem_1 = sparsify[1]  # up
linear = sparse_pass.linear(view, getitem, primals_3, 128)  # up
view_1 = aten.view(linear)  # up
view_2 = aten.view(tangents_1)  # up, backward
linear_1 = sparse_pass.linear(view_2, getitem_1, None, 64)  # up, backward
permute = aten.permute(view_2, [1, 0])  # up, backward
mm = aten.mm(permute, view)  # up, backward
permute_1 = aten.permute(mm, [1, 0])  # up, backward
sum = aten.sum(view_2, [0], True)  # up, backward
view_3 = aten.view(sum)  # up, backward
permute_2 = aten.permute(permute_1, [1, 0])  # up, backward
view_4 = aten.view(linear_1)  # up, backward
cos = aten.cos(primals_1)  # backward
mul = aten.mul(view_4, cos)  # backward
return view_1, mul, permute_2, view_3""",
    )


def test_checkpointed_block() -> None:
    assert_expected_inline(
        rewritten(Block(), rows(8), {"up": W24}),
        """\
mask24 = sparse_pass.mask24(primals_2, 'optimal')  # up, recompute
full = aten.full(0)  # up, recompute
where = aten.where(mask24, primals_2, full)  # up, recompute
permute = aten.permute(where, [1, 0])  # up, recompute
mm = aten.mm(primals_1, permute)  # up, recompute
sin = aten.sin(mm)  # recompute
permute_1 = aten.permute(primals_3, [1, 0])  # down, recompute
mm_1 = aten.mm(sin, permute_1)  # down, recompute
permute_2 = aten.permute(tangents_1, [1, 0])  # down, backward
mm_2 = aten.mm(permute_2, sin)  # down, backward
permute_3 = aten.permute(mm_2, [1, 0])  # down, backward
permute_4 = aten.permute(permute_1, [1, 0])  # down, backward
mm_3 = aten.mm(tangents_1, permute_4)  # down, backward
permute_5 = aten.permute(permute_3, [1, 0])  # down, backward
cos = aten.cos(mm)  # backward
mul = aten.mul(mm_3, cos)  # backward
permute_6 = aten.permute(mul, [1, 0])  # up, backward
mm_4 = aten.mm(permute_6, primals_1)  # up, backward
permute_7 = aten.permute(mm_4, [1, 0])  # up, backward
permute_8 = aten.permute(permute, [1, 0])  # up, backward
mm_5 = aten.mm(mul, permute_8)  # up, backward
permute_9 = aten.permute(permute_7, [1, 0])  # up, backward
return mm_1, mm_5, permute_9, permute_5""",
    )


def test_checkpointed_block_sparse() -> None:
    assert_expected_inline(
        rewritten(Block(), rows(8), {"up": SPARSE, "down": SPARSE}),
        """\
sparsify = sparse_pass.sparsify(primals_2, 'optimal')  # up, recompute
getitem = sparsify[0]  # up, recompute
getitem_1 = sparsify[1]  # up, recompute
linear = sparse_pass.linear(primals_1, getitem, None, 128)  # up, recompute
sin = aten.sin(linear)  # recompute
sparsify_1 = sparse_pass.sparsify(primals_3, 'optimal')  # down, recompute
getitem_2 = sparsify_1[0]  # down, recompute
getitem_3 = sparsify_1[1]  # down, recompute
linear_1 = sparse_pass.linear(sin, getitem_2, None, 64)  # down, recompute
permute = aten.permute(tangents_1, [1, 0])  # down, backward
mm = aten.mm(permute, sin)  # down, backward
permute_1 = aten.permute(mm, [1, 0])  # down, backward
linear_2 = sparse_pass.linear(tangents_1, getitem_3, None, 128)  # down, backward
permute_2 = aten.permute(permute_1, [1, 0])  # down, backward
cos = aten.cos(linear)  # backward
mul = aten.mul(linear_2, cos)  # backward
permute_3 = aten.permute(mul, [1, 0])  # up, backward
mm_1 = aten.mm(permute_3, primals_1)  # up, backward
permute_4 = aten.permute(mm_1, [1, 0])  # up, backward
linear_3 = sparse_pass.linear(mul, getitem_1, None, 64)  # up, backward
permute_5 = aten.permute(permute_4, [1, 0])  # up, backward
return linear_1, linear_3, permute_5, permute_2""",
    )


def test_shared_weight_one_named() -> None:
    assert_expected_inline(
        rewritten(Tied(), rows(8), {"second": W24}),
        """\
permute = aten.permute(primals_1, [1, 0])  # first
mm = aten.mm(primals_2, permute)  # first
sin = aten.sin(mm)
mask24 = sparse_pass.mask24(primals_1, 'optimal')  # second
full = aten.full(0)  # second
where = aten.where(mask24, primals_1, full)  # second
permute_1 = aten.permute(where, [1, 0])  # second
mm_1 = aten.mm(sin, permute_1)  # second
permute_2 = aten.permute(tangents_1, [1, 0])  # second, backward
mm_2 = aten.mm(permute_2, sin)  # second, backward
permute_3 = aten.permute(mm_2, [1, 0])  # second, backward
permute_4 = aten.permute(permute_1, [1, 0])  # second, backward
mm_3 = aten.mm(tangents_1, permute_4)  # second, backward
permute_5 = aten.permute(permute_3, [1, 0])  # second, backward
cos = aten.cos(mm)  # backward
mul = aten.mul(mm_3, cos)  # backward
permute_6 = aten.permute(mul, [1, 0])  # first, backward
mm_4 = aten.mm(permute_6, primals_2)  # first, backward
permute_7 = aten.permute(mm_4, [1, 0])  # first, backward
permute_8 = aten.permute(permute, [1, 0])  # first, backward
mm_5 = aten.mm(mul, permute_8)  # first, backward
permute_9 = aten.permute(permute_7, [1, 0])  # first, backward
add = aten.add(permute_5, permute_9)  # backward
return mm_1, add, mm_5""",
    )


def test_shared_weight_one_named_sparse() -> None:
    assert_expected_inline(
        rewritten(Tied(), rows(8), {"second": SPARSE}),
        """\
permute = aten.permute(primals_1, [1, 0])  # first
mm = aten.mm(primals_2, permute)  # first
sin = aten.sin(mm)
sparsify = sparse_pass.sparsify(primals_1, 'optimal')  # second
getitem = sparsify[0]  # second
getitem_1 = sparsify[1]  # second
linear = sparse_pass.linear(sin, getitem, None, 64)  # second
permute_1 = aten.permute(tangents_1, [1, 0])  # second, backward
mm_1 = aten.mm(permute_1, sin)  # second, backward
permute_2 = aten.permute(mm_1, [1, 0])  # second, backward
linear_1 = sparse_pass.linear(tangents_1, getitem_1, None, 64)  # second, backward
permute_3 = aten.permute(permute_2, [1, 0])  # second, backward
cos = aten.cos(mm)  # backward
mul = aten.mul(linear_1, cos)  # backward
permute_4 = aten.permute(mul, [1, 0])  # first, backward
mm_2 = aten.mm(permute_4, primals_2)  # first, backward
permute_5 = aten.permute(mm_2, [1, 0])  # first, backward
permute_6 = aten.permute(permute, [1, 0])  # first, backward
mm_3 = aten.mm(mul, permute_6)  # first, backward
permute_7 = aten.permute(permute_5, [1, 0])  # first, backward
add = aten.add(permute_3, permute_7)  # backward
return linear, add, mm_3""",
    )


def test_shared_weight_both_named_sparse() -> None:
    assert_expected_inline(
        rewritten(Tied(), rows(8), {"*": SPARSE}),
        """\
sparsify = sparse_pass.sparsify(primals_1, 'optimal')  # first
getitem = sparsify[0]  # first
getitem_1 = sparsify[1]  # first
linear = sparse_pass.linear(primals_2, getitem, None, 64)  # first
sin = aten.sin(linear)
linear_1 = sparse_pass.linear(sin, getitem, None, 64)  # second
permute = aten.permute(tangents_1, [1, 0])  # second, backward
mm = aten.mm(permute, sin)  # second, backward
permute_1 = aten.permute(mm, [1, 0])  # second, backward
linear_2 = sparse_pass.linear(tangents_1, getitem_1, None, 64)  # second, backward
permute_2 = aten.permute(permute_1, [1, 0])  # second, backward
cos = aten.cos(linear)  # backward
mul = aten.mul(linear_2, cos)  # backward
permute_3 = aten.permute(mul, [1, 0])  # first, backward
mm_1 = aten.mm(permute_3, primals_2)  # first, backward
permute_4 = aten.permute(mm_1, [1, 0])  # first, backward
linear_3 = sparse_pass.linear(mul, getitem_1, None, 64)  # first, backward
permute_5 = aten.permute(permute_4, [1, 0])  # first, backward
add = aten.add(permute_2, permute_5)  # backward
return linear_1, add, linear_3""",
    )


class Probed(Up):
    """Called under no_grad before it is called to be trained, or after."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        trained = None if self.first else self.up(x)
        with torch.no_grad():
            probed = self.up(x.cos())
        return (self.up(x) if trained is None else trained) * probed


def test_weight_read_under_no_grad_first() -> None:
    """S(W) is made once, for all calls, whichever comes first."""
    assert_expected_inline(
        rewritten(Probed(True), rows(8), {"up": SPARSE}),
        """\
sin = aten.sin(primals_1)
cos = aten.cos(sin)
sparsify = sparse_pass.sparsify(primals_2, 'optimal')  # up
getitem = sparsify[0]  # up
getitem_1 = sparsify[1]  # up
linear = sparse_pass.linear(cos, getitem, None, 128)  # up
linear_1 = sparse_pass.linear(sin, getitem, None, 128)  # up
mul = aten.mul(linear_1, linear)
mul_1 = aten.mul(tangents_1, linear)  # backward
permute = aten.permute(mul_1, [1, 0])  # up, backward
mm = aten.mm(permute, sin)  # up, backward
permute_1 = aten.permute(mm, [1, 0])  # up, backward
linear_2 = sparse_pass.linear(mul_1, getitem_1, None, 64)  # up, backward
permute_2 = aten.permute(permute_1, [1, 0])  # up, backward
cos_1 = aten.cos(primals_1)  # backward
mul_2 = aten.mul(linear_2, cos_1)  # backward
return mul, mul_2, permute_2""",
    )


def test_weight_read_under_no_grad_last() -> None:
    assert_expected_inline(
        rewritten(Probed(False), rows(8), {"up": SPARSE}),
        """\
sin = aten.sin(primals_1)
sparsify = sparse_pass.sparsify(primals_2, 'optimal')  # up
getitem = sparsify[0]  # up
getitem_1 = sparsify[1]  # up
linear = sparse_pass.linear(sin, getitem, None, 128)  # up
cos = aten.cos(sin)
linear_1 = sparse_pass.linear(cos, getitem, None, 128)  # up
mul = aten.mul(linear, linear_1)
mul_1 = aten.mul(tangents_1, linear_1)  # backward
permute = aten.permute(mul_1, [1, 0])  # up, backward
mm = aten.mm(permute, sin)  # up, backward
permute_1 = aten.permute(mm, [1, 0])  # up, backward
linear_2 = sparse_pass.linear(mul_1, getitem_1, None, 64)  # up, backward
permute_2 = aten.permute(permute_1, [1, 0])  # up, backward
cos_1 = aten.cos(primals_1)  # backward
mul_2 = aten.mul(linear_2, cos_1)  # backward
return mul, mul_2, permute_2""",
    )


def test_conv1d() -> None:
    assert_expected_inline(
        rewritten(Gpt2Mlp(), rows(2, 8), {"c_fc": W24}),
        """\
sin = aten.sin(primals_1)
view = aten.view(sin)  # c_fc
mask24 = sparse_pass.mask24(primals_2, 'optimal')  # c_fc
full = aten.full(0)  # c_fc
where = aten.where(mask24, primals_2, full)  # c_fc
addmm = aten.addmm(primals_3, view, where)  # c_fc
view_1 = aten.view(addmm)  # c_fc
view_2 = aten.view(tangents_1)  # c_fc, backward
permute = aten.permute(where, [1, 0])  # c_fc, backward
mm = aten.mm(view_2, permute)  # c_fc, backward
permute_1 = aten.permute(view, [1, 0])  # c_fc, backward
mm_1 = aten.mm(permute_1, view_2)  # c_fc, backward
sum = aten.sum(view_2, [0], True)  # c_fc, backward
view_3 = aten.view(sum)  # c_fc, backward
view_4 = aten.view(mm)  # c_fc, backward
cos = aten.cos(primals_1)  # backward
mul = aten.mul(view_4, cos)  # backward
return view_1, mul, mm_1, view_3""",
    )


def test_conv1d_sparse() -> None:
    assert_expected_inline(
        rewritten(Gpt2Mlp(), rows(2, 8), {"c_fc": SPARSE}),
        """\
sin = aten.sin(primals_1)
view = aten.view(sin)  # c_fc
sparsify = sparse_pass.sparsify(primals_2, 'optimal')  # c_fc
getitem = sparsify[1]  # c_fc
getitem_1 = sparsify[0]  # c_fc
linear = sparse_pass.linear(view, getitem, primals_3, 128)  # c_fc
view_1 = aten.view(linear)  # c_fc
view_2 = aten.view(tangents_1)  # c_fc, backward
linear_1 = sparse_pass.linear(view_2, getitem_1, None, 64)  # c_fc, backward
permute = aten.permute(view, [1, 0])  # c_fc, backward
mm = aten.mm(permute, view_2)  # c_fc, backward
sum = aten.sum(view_2, [0], True)  # c_fc, backward
view_3 = aten.view(sum)  # c_fc, backward
view_4 = aten.view(linear_1)  # c_fc, backward
cos = aten.cos(primals_1)  # backward
mul = aten.mul(view_4, cos)  # backward
return view_1, mul, mm, view_3""",
    )


def test_inference() -> None:
    with torch.no_grad():
        assert_expected_inline(
            rewritten(Up(bias=True), rows(2, 8), {"up": W24}),
            """\
sin = aten.sin(arg0_1)
view = aten.view(sin)  # up
mask24 = sparse_pass.mask24(arg1_1, 'optimal')  # up
full = aten.full(0)  # up
where = aten.where(mask24, arg1_1, full)  # up
permute = aten.permute(where, [1, 0])  # up
addmm = aten.addmm(arg2_1, view, permute)  # up
view_1 = aten.view(addmm)  # up
return view_1""",
        )


def test_inference_sparse() -> None:
    with torch.no_grad():
        assert_expected_inline(
            rewritten(Up(bias=True), rows(2, 8), {"up": SPARSE}),
            """\
sin = aten.sin(arg0_1)
view = aten.view(sin)  # up
sparsify_one = sparse_pass.sparsify_one(arg1_1, 'optimal', False)  # up
linear = sparse_pass.linear(view, sparsify_one, arg2_1, 128)  # up
view_1 = aten.view(linear)  # up
return view_1""",
        )


def test_autocast() -> None:
    """The mask is chosen on the float32 parameter, not on its rounded copy."""
    x = rows(8, dtype=torch.float32)
    assert_expected_inline(
        rewritten(Autocast(), x, {"up": W24}),
        """\
sin = aten.sin(primals_1)
convert_element_type = prims.convert_element_type(sin, bfloat16)  # up
mask24 = sparse_pass.mask24(primals_2, 'optimal')  # up
full = aten.full(0)  # up
where = aten.where(mask24, primals_2, full)  # up
convert_element_type_1 = prims.convert_element_type(where, bfloat16)  # up
permute = aten.permute(convert_element_type_1, [1, 0])  # up
mm = aten.mm(convert_element_type, permute)  # up
permute_1 = aten.permute(tangents_1, [1, 0])  # up, backward
mm_1 = aten.mm(permute_1, convert_element_type)  # up, backward
permute_2 = aten.permute(mm_1, [1, 0])  # up, backward
permute_3 = aten.permute(permute, [1, 0])  # up, backward
mm_2 = aten.mm(tangents_1, permute_3)  # up, backward
permute_4 = aten.permute(permute_2, [1, 0])  # up, backward
convert_element_type_2 = prims.convert_element_type(mm_2, float32)  # up, backward
convert_element_type_3 = prims.convert_element_type(permute_4, float32)  # up, backward
cos = aten.cos(primals_1)  # backward
mul = aten.mul(convert_element_type_2, cos)  # backward
return mm, mul, convert_element_type_3""",
    )


def test_autocast_sparse() -> None:
    x = rows(8, dtype=torch.float32)
    assert_expected_inline(
        rewritten(Autocast(), x, {"up": SPARSE}),
        """\
sin = aten.sin(primals_1)
convert_element_type = prims.convert_element_type(sin, bfloat16)  # up
sparsify = sparse_pass.sparsify(primals_2, 'optimal', dtype=bfloat16)  # up
getitem = sparsify[0]  # up
getitem_1 = sparsify[1]  # up
linear = sparse_pass.linear(convert_element_type, getitem, None, 128)  # up
permute = aten.permute(tangents_1, [1, 0])  # up, backward
mm = aten.mm(permute, convert_element_type)  # up, backward
permute_1 = aten.permute(mm, [1, 0])  # up, backward
linear_1 = sparse_pass.linear(tangents_1, getitem_1, None, 64)  # up, backward
permute_2 = aten.permute(permute_1, [1, 0])  # up, backward
convert_element_type_1 = prims.convert_element_type(linear_1, float32)  # up, backward
convert_element_type_2 = prims.convert_element_type(permute_2, float32)  # up, backward
cos = aten.cos(primals_1)  # backward
mul = aten.mul(convert_element_type_1, cos)  # backward
return linear, mul, convert_element_type_2""",
    )


def test_grad_weight_masked() -> None:
    scheme = sp.WeightSparsity(grad_weight="masked")
    assert_expected_inline(
        rewritten(Up(), rows(8), {"up": scheme}),
        """\
sin = aten.sin(primals_1)
mask24 = sparse_pass.mask24(primals_2, 'optimal')  # up
permute = aten.permute(mask24, [1, 0])  # up
full = aten.full(0)  # up
where = aten.where(mask24, primals_2, full)  # up
permute_1 = aten.permute(where, [1, 0])  # up
mm = aten.mm(sin, permute_1)  # up
permute_2 = aten.permute(tangents_1, [1, 0])  # up, backward
mm_1 = aten.mm(permute_2, sin)  # up, backward
permute_3 = aten.permute(mm_1, [1, 0])  # up, backward
full_1 = aten.full(0)  # up, backward
where_1 = aten.where(permute, permute_3, full_1)  # up, backward
permute_4 = aten.permute(permute_1, [1, 0])  # up, backward
mm_2 = aten.mm(tangents_1, permute_4)  # up, backward
permute_5 = aten.permute(where_1, [1, 0])  # up, backward
cos = aten.cos(primals_1)  # backward
mul = aten.mul(mm_2, cos)  # backward
return mm, mul, permute_5""",
    )


def test_grad_weight_masked_sparse() -> None:
    scheme = sp.WeightSparsity(grad_weight="masked", backend="cusparselt")
    assert_expected_inline(
        rewritten(Up(), rows(8), {"up": scheme}),
        """\
sin = aten.sin(primals_1)
mask24 = sparse_pass.mask24(primals_2, 'optimal')  # up
permute = aten.permute(mask24, [1, 0])  # up
sparsify = sparse_pass.sparsify(primals_2, 'optimal')  # up
getitem = sparsify[0]  # up
getitem_1 = sparsify[1]  # up
linear = sparse_pass.linear(sin, getitem, None, 128)  # up
permute_1 = aten.permute(tangents_1, [1, 0])  # up, backward
mm = aten.mm(permute_1, sin)  # up, backward
permute_2 = aten.permute(mm, [1, 0])  # up, backward
full = aten.full(0)  # up, backward
where = aten.where(permute, permute_2, full)  # up, backward
linear_1 = sparse_pass.linear(tangents_1, getitem_1, None, 64)  # up, backward
permute_3 = aten.permute(where, [1, 0])  # up, backward
cos = aten.cos(primals_1)  # backward
mul = aten.mul(linear_1, cos)  # backward
return linear, mul, permute_3""",
    )


def test_decay() -> None:
    scheme = sp.WeightSparsity(decay=0.5)
    assert_expected_inline(
        rewritten(Up(), rows(8), {"up": scheme}),
        """\
sin = aten.sin(primals_1)
mask24 = sparse_pass.mask24(primals_2, 'optimal')  # up
full = aten.full(0)  # up
where = aten.where(mask24, primals_2, full)  # up
permute = aten.permute(where, [1, 0])  # up
mm = aten.mm(sin, permute)  # up
permute_1 = aten.permute(tangents_1, [1, 0])  # up, backward
mm_1 = aten.mm(permute_1, sin)  # up, backward
permute_2 = aten.permute(mm_1, [1, 0])  # up, backward
permute_3 = aten.permute(permute, [1, 0])  # up, backward
mm_2 = aten.mm(tangents_1, permute_3)  # up, backward
permute_4 = aten.permute(permute_2, [1, 0])  # up, backward
cos = aten.cos(primals_1)  # backward
mul = aten.mul(mm_2, cos)  # backward
full_1 = aten.full(0)  # up, backward
where_1 = aten.where(mask24, full_1, primals_2)  # up, backward
mul_1 = aten.mul(where_1, 0.5)  # up, backward
add = aten.add(permute_4, mul_1)  # up, backward
return mm, mul, add""",
    )


def test_decay_sparse() -> None:
    scheme = sp.WeightSparsity(decay=0.5, backend="cusparselt")
    assert_expected_inline(
        rewritten(Up(), rows(8), {"up": scheme}),
        """\
sin = aten.sin(primals_1)
mask24 = sparse_pass.mask24(primals_2, 'optimal')  # up
sparsify = sparse_pass.sparsify(primals_2, 'optimal')  # up
getitem = sparsify[0]  # up
getitem_1 = sparsify[1]  # up
linear = sparse_pass.linear(sin, getitem, None, 128)  # up
permute = aten.permute(tangents_1, [1, 0])  # up, backward
mm = aten.mm(permute, sin)  # up, backward
permute_1 = aten.permute(mm, [1, 0])  # up, backward
linear_1 = sparse_pass.linear(tangents_1, getitem_1, None, 64)  # up, backward
permute_2 = aten.permute(permute_1, [1, 0])  # up, backward
cos = aten.cos(primals_1)  # backward
mul = aten.mul(linear_1, cos)  # backward
full = aten.full(0)  # up, backward
where = aten.where(mask24, full, primals_2)  # up, backward
mul_1 = aten.mul(where, 0.5)  # up, backward
add = aten.add(permute_2, mul_1)  # up, backward
return linear, mul, add""",
    )


def test_export() -> None:
    """torch.export keeps `aten.linear`, and names parameters itself."""
    module = torch.export.export(Up(bias=True).eval(), (torch.randn(2, 8, 64),)).module()
    sp.rewrite(module, {"up": W24})
    assert_expected_inline(
        printed(module.graph),
        """\
sin = aten.sin(x)
mask24 = sparse_pass.mask24(up_weight, 'optimal')  # up
full = aten.full(0)  # up
where = aten.where(mask24, up_weight, full)  # up
linear = aten.linear(sin, where, up_bias)  # up
return linear""",
    )


def test_export_sparse() -> None:
    model = Up(bias=True).to(torch.bfloat16)
    module = torch.export.export(model, (torch.randn(2, 8, 64, dtype=torch.bfloat16),)).module()
    sp.rewrite(module, {"up": SPARSE})
    assert_expected_inline(
        printed(module.graph),
        """\
sin = aten.sin(x)
sparsify_one = sparse_pass.sparsify_one(up_weight, 'optimal', False)  # up
reshape = aten.reshape(sin)  # up
linear = sparse_pass.linear(reshape, sparsify_one, up_bias, 128)  # up
reshape_1 = aten.reshape(linear)  # up
return reshape_1""",
    )


def test_dynamic_batch() -> None:
    captured = capture(
        Up(bias=True).to(torch.bfloat16),
        [torch.randn(3, 8, 64, dtype=torch.bfloat16)],
        {"up": SPARSE},
        dynamic=True,
    )
    captured.check_invariants()
    (site,) = captured.report.sites
    assert isinstance(site.shape[0], str)
    assert site.shape[1:] == (128, 64)
    assert (site.output, site.grad_weight) == ("reference", "dense")


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_invariants_know_strides(rows: int) -> None:
    """Of one row, or none, those of rows and of columns are the same; of more they are not."""
    captured = capture(Up(), [torch.randn(rows, 64, requires_grad=True)], {"up": sp.ActivationSparsity()})
    captured.check_invariants()
    (masked,) = [node for node in captured.after.graph.nodes if node.target is torch.ops.aten.where.self]
    masked.meta["val"] = masked.meta["val"].new_empty_strided((rows, 64), (1, max(rows, 1)))
    with nullcontext() if rows < 2 else pytest.raises(AssertionError, match=r"where.*against meta.*\(64, 1\) against"):
        captured.check_invariants()


def test_graph_break_gives_two_graphs() -> None:
    class Broken(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x)
            torch._dynamo.graph_break()
            return self.down(x.relu())

    first, second = capture_all(Broken(), [torch.randn(8, 64)], {"up": W24, "down": W24})
    for captured, name, other in ((first, "up", "down"), (second, "down", "up")):
        captured.check_invariants()
        assert [site.fqn for site in captured.report.sites] == [name]
        assert captured.report.unmatched == (other,)
