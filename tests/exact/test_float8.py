"""``precision="float8"``: the numbers of a hand-written linear that rounds its operands to float8."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from float8_by_hand import rounded, scale_by_hand
from graph_printer import capture, device, printed, trains_as
from support import Result, errors, fresh_compile, invariants_checked, relative_error, run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_pass as sp
from sparse_pass.ops.reference import weights
from sparse_pass.plan.limits import Limits

FLOAT8 = sp.WeightSparsity(precision="float8")
NO_KERNEL = "no 2:4 kernels on cpu"
sparse = torch.ops.sparse_pass


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    with fresh_compile():
        yield


# The reference


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(x, kept)
        return rounded(x, scale_by_hand(x)) @ kept.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kept = ctx.saved_tensors
        return rounded(grad, scale_by_hand(grad)) @ kept, grad.T @ x, None


class Reference(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        weight = self.weight
        kept = torch.where(sp.mask24(weight), weight, 0).detach()
        kept = rounded(kept, scale_by_hand(weight)).to(dtype)
        y = Product.apply(x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype), kept)
        y = y if self.bias is None else y + self.bias.to(dtype)
        return y.view(*x.shape[:-1], -1)


def by_hand(model: nn.Module, *names: str) -> nn.Module:
    """A copy, of which these linears round their operands. The parameters keep their names."""
    reference = copy.deepcopy(model)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(reference.get_submodule(owner), leaf, Reference(reference.get_submodule(name)))
    return reference


class Attention(nn.Module):
    """Three linears read one input, and the output of the last is the input of another."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.o = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.o(mixed)


NAMES = ("q", "k", "v", "o")


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def both(
    model: nn.Module,
    names: tuple[str, ...],
    x: Tensor,
    *,
    scheme: sp.WeightSparsity = FLOAT8,
    inner: Any = "aot_eager",
    context: Callable[[], Any] = nullcontext,
    dynamic: bool | None = None,
) -> tuple[Result, Result, sp.Report]:
    backend = sp.sparse_backend(dict.fromkeys(names, scheme), model=model, inner=inner)
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    with invariants_checked():
        actual = run(compiled, dict(model.named_parameters()), [x], context=context)
    reference = by_hand(model, *names)
    expected = run(reference, dict(reference.named_parameters()), [x], context=context)
    return actual, expected, backend.report


# The numbers


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed(dtype: torch.dtype, inner: Any) -> None:
    """By the reference kernels: float8 products, multiplied by the inverse of the scales afterwards."""
    model, x = Attention(64).to(dtype), leaf(2, 6, 64, dtype=dtype)
    kernels = sp.WeightSparsity(precision="float8", backend="cusparselt")
    actual, expected, report = both(model, NAMES, x, scheme=kernels, inner=inner)
    assert max(errors(actual, expected).values()) < 2e-2
    assert {(site.status, site.output, site.grad_input, site.grad_weight, site.reason) for site in report.sites} == {
        ("sparse", "reference", "reference", "dense", "")
    }


def test_packed_under_autocast_and_scaled() -> None:
    """The values are those of the parameter, not of its cast."""
    model, x = nn.Sequential(nn.Linear(64, 128), nn.Tanh()), leaf(8, 64)

    def context() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    results = []
    for backend in ("cusparselt", "masked_dense"):
        scheme = sp.WeightSparsity(precision="float8", scale=1.5, backend=backend)  # type: ignore[arg-type]
        results.append(both(model, ("0",), x, scheme=scheme, context=context)[0])
    assert max(errors(*results).values()) < 2e-2


@pytest.mark.parametrize(
    ("autocast", "inner"),
    [
        (False, "aot_eager"),
        (True, "aot_eager"),
        # In loops Inductor keeps float32 between what it fuses, and converts to float8 itself.
        pytest.param(False, "inductor", marks=pytest.mark.loops),
        (True, "inductor"),
    ],
)
def test_output_and_gradients(inner: Any, autocast: bool) -> None:
    model, x = Attention(), leaf(2, 6, 32)
    context = (lambda: torch.autocast("cpu", torch.bfloat16)) if autocast else nullcontext
    actual, expected, report = both(model, NAMES, x, inner=inner, context=context)
    # A value next to the middle of two numbers of e4m3 rounds to either, where what made it is rounded otherwise.
    assert max(errors(actual, expected).values()) < (2e-2 if autocast else 1e-5 if inner == "aot_eager" else 5e-3)
    assert {(site.status, site.output, site.grad_input, site.grad_weight, site.reason) for site in report.sites} == {
        ("masked_dense", "masked_dense", "masked_dense", "dense", NO_KERNEL)
    }
    captured = by_hand_dense(model, x, context)
    assert errors(captured, expected)["output 0"] > 0.02


def by_hand_dense(model: nn.Module, x: Tensor, context: Callable[[], Any]) -> Result:
    """With 2:4 weights in the captured precision."""
    pruned = copy.deepcopy(model)
    sp.prune_(pruned, {"*": FLOAT8})
    return run(pruned, dict(pruned.named_parameters()), [x], context=context)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).to(dtype)
    actual, expected, _ = both(model, ("0", "2"), leaf(8, 16, dtype=dtype))
    assert max(errors(actual, expected).values()) < {torch.float64: 1e-12}.get(dtype, 2e-2)


def test_checkpointed_and_of_several_sizes() -> None:
    """Recomputed operands are rounded as they were, and with a batch whose size is not known."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            def body(x: Tensor) -> Tensor:
                return self.fc2(self.fc1(x).tanh())

            return checkpoint(body, x.sin(), use_reentrant=False)

    model = Checkpointed()
    backend = sp.sparse_backend({"*": FLOAT8}, model=model, inner="aot_eager")
    compiled, reference = torch.compile(model, backend=backend, dynamic=True), by_hand(model, "fc1", "fc2")
    for rows in (6, 9):
        x = leaf(rows, 16)
        actual = run(compiled, dict(model.named_parameters()), [x])
        expected = run(reference, dict(reference.named_parameters()), [x])
        assert max(errors(actual, expected).values()) < 1e-5
    assert backend.report.graphs == 1


@pytest.mark.parametrize("shape", [(16,), (0, 16), (1, 16), (2, 3, 16)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    """A vector is multiplied by a product and a sum; of an input without rows there is nothing to round."""
    model = nn.Sequential(nn.Linear(16, 8))
    x = leaf(*shape)
    backend = sp.sparse_backend({"0": FLOAT8}, model=model)
    actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x])
    if 0 in shape:
        assert actual.outputs[0].shape == (0, 8)
        return
    reference = by_hand(model, "0")
    assert max(errors(actual, run(reference, dict(reference.named_parameters()), [x])).values()) < 1e-5


def test_other_fields() -> None:
    """Masks, decay and masked gradients are of the weight as it is stored."""
    model, x = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Tanh()), leaf(8, 16)
    scheme = sp.WeightSparsity(precision="float8", grad_weight="masked", decay=0.25)
    actual, expected, _ = both(model, ("0",), x, scheme=scheme)
    weight, gradient = model[0].weight.detach(), expected.gradients["0.weight"]
    assert gradient is not None
    mask = sp.mask24(weight)
    expected.gradients["0.weight"] = torch.where(mask, gradient, 0) + 0.25 * torch.where(mask, 0, weight)
    assert max(errors(actual, expected).values()) < 1e-5


@pytest.mark.parametrize("backend", ["masked_dense", "cusparselt"])
@pytest.mark.parametrize("rows", [64, 40])
def test_mvue_is_rounded_too(backend: Any, rows: int) -> None:
    """q(MVUE(dY))^T q(X), with half the scale of dY: MVUE may be twice as large."""
    dtype = torch.bfloat16
    model, x = nn.Sequential(nn.Tanh(), nn.Linear(64, 128)).to(dtype), leaf(2, rows // 2, 64, dtype=dtype)
    scheme = sp.WeightSparsity(precision="float8", grad_weight="mvue", backend=backend)
    actual, expected, report = both(model, ("1",), x, scheme=scheme)
    gradient, dense = actual.gradients["1.weight"], expected.gradients["1.weight"]
    assert gradient is not None
    assert dense is not None
    assert 0.1 < relative_error(gradient, dense) < 1.2
    expected.gradients["1.weight"] = gradient
    assert max(errors(actual, expected).values()) < 2e-2
    kernel = {"masked_dense": "masked_dense", "cusparselt": "reference"}[backend]
    assert [site.grad_weight for site in report.sites] == [kernel]


class DenseReference(Reference):
    """The same with all of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        kept = rounded(self.weight, scale_by_hand(self.weight))
        y = Product.apply(x.reshape(-1, x.shape[-1]), self.weight, kept)
        return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("backend", ["masked_dense", "cusparselt"])
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_dense_weights(backend: Any, inner: Any) -> None:
    """`GradientSparsity`: output and grad_input as dense float8 training has them, grad_weight estimated."""
    dtype = torch.bfloat16
    model, x = nn.Sequential(nn.Tanh(), nn.Linear(64, 128), nn.Tanh()).to(dtype), leaf(2, 24, 64, dtype=dtype)
    scheme = sp.GradientSparsity(precision="float8", backend=backend)
    built = sp.sparse_backend({"1": scheme}, model=model, inner=inner)
    reference = copy.deepcopy(model)
    reference[1] = DenseReference(reference[1])  # type: ignore[arg-type]
    actual = run(torch.compile(model, backend=built), dict(model.named_parameters()), [x])
    expected = run(reference, dict(reference.named_parameters()), [x])
    gradient, exact = actual.gradients["1.weight"], expected.gradients["1.weight"]
    assert gradient is not None
    assert exact is not None
    assert 0.1 < relative_error(gradient, exact) < 1.2
    expected.gradients["1.weight"] = gradient
    assert max(errors(actual, expected).values()) < 2e-2
    (site,) = built.report.sites
    kernel = {"masked_dense": "masked_dense", "cusparselt": "reference"}[backend]
    assert (site.output, site.grad_input, site.grad_weight) == ("dense", "dense", kernel)
    assert "no float8 matmul there: dense ones of the same numbers" in site.reason


SCALED_MM = Limits(device="cuda", capability=(9, 0), unavailable="no library")
"""A device with float8 matmuls and no 2:4 kernels."""


class Strides(nn.Module):
    """Operands of a linear that are not stored row by row, or not stored at all."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.case, self.fc = case, nn.Linear(64, 32, dtype=torch.bfloat16)
        if case == "weight by columns":
            self.fc.weight = nn.Parameter(self.fc.weight.detach().t().contiguous().t())

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x.t() if self.case == "input by columns" else x)
        return y.sum() if self.case == "sum" else y.t() if self.case == "transposed" else y


CASES = ["plain", "weight by columns", "sum", "transposed"]


@pytest.mark.parametrize(
    ("case", "dense"), [*((case, False) for case in [*CASES, "input by columns"]), *((case, True) for case in CASES)]
)
def test_scaled_mm(case: str, dense: bool) -> None:
    """What `torch._scaled_mm` wants of its operands, by its CPU kernel: the numbers of the reference."""
    model = Strides(case)
    x = leaf(*((64, 48) if case == "input by columns" else (48, 64)), dtype=torch.bfloat16)
    scheme = sp.GradientSparsity(precision="float8") if dense else FLOAT8
    backend, reports = trains_as(SCALED_MM, model, {"fc": scheme})
    reference = copy.deepcopy(model)
    reference.fc = (DenseReference if dense else Reference)(reference.fc)  # type: ignore[assignment]
    torch._dynamo.reset()
    actual = run(torch.compile(model, backend=backend), dict(model.named_parameters()), [x])
    expected = run(reference, dict(reference.named_parameters()), [x])
    if dense:
        expected.gradients["fc.weight"] = actual.gradients["fc.weight"]
    assert max(errors(actual, expected).values()) < 2e-2
    (site,) = reports[-1].sites
    assert site.output == ("float8" if dense else "masked_dense")


@pytest.mark.parametrize("scheme", [FLOAT8, sp.GradientSparsity(precision="float8")], ids=str)
def test_scaled_mm_is_in_the_graph(scheme: Any) -> None:
    """Of output and grad_input, but where dense matmuls were asked for."""
    x = leaf(48, 64, dtype=torch.bfloat16)
    for backend, count in (("auto", 2), ("masked_dense", 0)):
        config = {"fc": replace(scheme, backend=backend)}
        captured = capture(Strides("plain"), [x], config, limits=device(SCALED_MM))
        targets = [node.target for node in captured.after.graph.nodes]
        assert targets.count(torch.ops.aten._scaled_mm.default) == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_estimate_by_hand(dtype: torch.dtype) -> None:
    grad, x = torch.randn(96, 128).to(dtype), torch.randn(96, 64).to(dtype)
    seed = torch.tensor([11])
    half = scale_by_hand(grad) / 2
    kept = sparse.mvue24(grad, seed).float()
    assert float(kept.abs().max()) * half <= 448
    q, qx = (kept * half).to(torch.float8_e4m3fn), (x.float() * 8).to(torch.float8_e4m3fn)
    packed, quantized = sparse.sparsify_mvue_float8(grad, seed, torch.tensor(half * 2))
    assert packed.dtype == torch.float8_e4m3fn
    assert torch.equal(quantized.float(), (grad.float() * half * 2).to(torch.float8_e4m3fn).float())
    made = sparse.grad_weight_t(packed, qx.T.contiguous(), 128)
    assert torch.equal(made, (q.float().T @ qx.float()).bfloat16())


def test_packed_and_dense_estimates_agree() -> None:
    """From one seed, by the reference kernels and by dense matmuls."""
    model = nn.Sequential(nn.Tanh(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).bfloat16()
    x = leaf(48, 64, dtype=torch.bfloat16)
    found = []
    for backend in ("masked_dense", "cusparselt"):
        scheme = sp.WeightSparsity(precision="float8", grad_weight="mvue", backend=backend)  # type: ignore[arg-type]
        compiled = torch.compile(model, backend=sp.sparse_backend({"*": scheme}, model=model, inner="aot_eager"))
        torch.manual_seed(3)
        found.append(run(compiled, dict(model.named_parameters()), [x]))
    assert max(errors(*found).values()) < 2e-2


def test_not_finite() -> None:
    """A loss scaler has to see it: all that is multiplied by it is NaN."""
    model = nn.Sequential(nn.Linear(16, 32))
    compiled = torch.compile(model, backend=sp.sparse_backend({"0": FLOAT8}, model=model, inner="aot_eager"))
    for value in (float("inf"), float("nan")):
        x = torch.randn(8, 16)
        x[3, 5] = value
        assert compiled(x).isnan().all()


def test_no_worse_than_float8_of_torchao() -> None:
    """Both of the same masked weights, against float32."""
    utils = pytest.importorskip("torchao.float8.float8_utils")
    config = pytest.importorskip("torchao.float8.config")
    x, w = torch.randn(256, 512), torch.randn(384, 512)
    kept = torch.where(sp.mask24(w), w, 0)

    def by_torchao(tensor: Tensor) -> Tensor:
        scale = utils.tensor_to_scale(
            tensor, torch.float8_e4m3fn, scaling_granularity=config.ScalingGranularity.TENSORWISE
        )
        return utils.to_fp8_saturated(tensor.float() * scale, torch.float8_e4m3fn).float() / scale

    exact = x @ kept.T
    theirs = relative_error(by_torchao(x) @ by_torchao(kept).T, exact)
    ours = relative_error(rounded(x, scale_by_hand(x)) @ rounded(kept, scale_by_hand(w)).T, exact)
    assert ours < 1.1 * theirs


# The operators


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bits_of_torchao(dtype: torch.dtype) -> None:
    """Its scales of powers of two, and its casts."""
    utils = pytest.importorskip("torchao.float8.float8_utils")
    generator = torch.Generator().manual_seed(0)
    for exponent in (-20, -3, 0, 5):
        tensor = (torch.randn(64, 48, generator=generator) * 2.0**exponent).to(dtype)
        amax = tensor.abs().amax()
        theirs = utils.amax_to_scale(amax, torch.float8_e4m3fn, round_scales_to_power_of_2=True)
        scale = sparse.float8_scale(tensor)
        assert (scale.dtype, scale.shape) == (torch.float32, ())
        if dtype == torch.float16 and theirs == 2.0**15:
            continue  # as large as float16 has them
        assert scale == theirs.float() == scale_by_hand(tensor)
        cast = utils.to_fp8_saturated(tensor.float() * theirs, torch.float8_e4m3fn)
        assert torch.equal(sparse.round_float8(tensor, scale), (cast.float() / theirs).to(dtype))


@pytest.mark.parametrize("largest", [448.0, 447.9, 449.0, 3.5, 7.0, 1.0, 2.0**-40, 1e-30, 0.0, 3e38], ids=str)
def test_scale(largest: float) -> None:
    """The largest one at which nothing is cut off; of zeros some number."""
    scale = float(sparse.float8_scale(torch.tensor([[largest, 0.0]])))
    assert torch.frexp(torch.tensor(scale)).mantissa == 0.5
    assert largest * scale <= 448
    if largest >= 1e-12:
        assert largest * scale * 2 > 448


@pytest.mark.parametrize(
    "tensor", [torch.randn(4, 6), torch.randn(6, 4).T, torch.randn(3).expand(2, 3), torch.randn(8)]
)
def test_operators(tensor: Tensor) -> None:
    torch.library.opcheck(sparse.float8_scale.default, (tensor,))
    torch.library.opcheck(sparse.round_float8.default, (tensor, sparse.float8_scale(tensor)))


@pytest.mark.parametrize(
    ("op", "arguments", "words"),
    [
        ("float8_scale", (torch.zeros(4, dtype=torch.int32),), "not torch.int32"),
        ("float8_scale", (torch.zeros(0, 4),), r"an empty tensor \[0, 4\]"),
        ("round_float8", (torch.zeros(4, dtype=torch.int8), torch.ones(())), "not torch.int8"),
        ("round_float8", (torch.zeros(4), torch.ones(1)), r"one float32 without dims"),
        ("round_float8", (torch.zeros(4), torch.ones((), dtype=torch.float64)), "scale is torch.float64"),
    ],
)
def test_operators_refuse(op: str, arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        getattr(sparse, op)(*arguments)


def test_metadata_of_8_bits() -> None:
    """Each bit of a group's row and column has its place in the position of the nibble."""
    rows, cols = 128, 192
    index = torch.randint(6, (rows, cols // 4), generator=torch.Generator().manual_seed(0))
    pairs = torch.tensor([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)])[index]
    mask = torch.zeros(rows, cols // 4, 4, dtype=torch.bool).scatter_(2, pairs, True).view(rows, cols)
    values = torch.randn(rows, cols).to(torch.float8_e4m3fn)
    packed = weights.pack(values, mask)
    assert (packed.dtype, packed.numel()) == (torch.float8_e4m3fn, rows * cols * 5 // 8)
    metadata = packed.view(torch.uint8)[rows * cols // 2 :]
    for r, g in ((0, 0), (1, 0), (2, 5), (37, 9), (63, 15), (64, 16), (127, 47), (90, 31)):
        in_tile = [
            r & 1,
            r >> 1 & 1,
            r >> 2 & 1,
            r >> 3 & 1,
            r >> 4 & 1,
            r >> 5 & 1,
            *(g >> bit & 1 for bit in range(4)),
        ]
        places = (32, 64, 128, 2, 256, 512, 1, 8, 16, 4)
        tile = (r // 64) * (cols // 64) + g // 16
        position = tile * 1024 + sum(bit * place for bit, place in zip(in_tile, places, strict=True))
        byte = int(metadata[position // 2])
        first, second = pairs[r, g].tolist()
        assert (byte >> 4 if position % 2 else byte & 15) == first | second << 2
    kept = torch.where(mask, values.float(), 0)
    assert torch.equal(weights.unpack(packed, rows, cols).float(), kept)


def test_operators_of_packed_weights() -> None:
    weight, x = torch.randn(64, 128).bfloat16(), torch.randn(9, 128).bfloat16()
    scale = sparse.float8_scale(weight)
    tests = ("test_faketensor", "test_aot_dispatch_static")  # the others multiply in float8, which torch does not
    torch.library.opcheck(sparse.quantize_float8.default, (x, sparse.float8_scale(x)), test_utils=tests)
    torch.library.opcheck(sparse.sparsify_float8.default, (weight, scale, "optimal", 1.5), test_utils=tests)
    packed, packed_t = sparse.sparsify_float8(weight, scale, "greedy")
    q = sparse.quantize_float8(x, sparse.float8_scale(x))
    torch.library.opcheck(sparse.linear.default, (q, packed, None, 64), test_utils=tests)
    kept = torch.where(sp.mask24(weight, "greedy"), sparse.quantize_float8(weight, scale).float(), 0)
    assert torch.equal(sparse.linear(q, packed, None, 64), (q.float() @ kept.T).bfloat16())
    assert torch.equal(weights.unpack(packed_t, 128, 64).float(), kept.T)
    with pytest.raises(ValueError, match=r"linear of float8 with a bias: .*: add it afterwards, or take bfloat16"):
        sparse.linear(q, packed, torch.zeros(64, dtype=q.dtype), 64)
    with pytest.raises(ValueError, match="both must be float16 or both bfloat16"):
        sparse.linear(x, packed, None, 64)


# The graph


class OneInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 32, bias=False), nn.Linear(16, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) * self.up(x)


def test_graph() -> None:
    """Both operands, each by a scale of its own."""
    captured = capture(nn.Linear(16, 32, bias=False), [leaf(2, 4, 16)], {"weight": FLOAT8})
    assert_expected_inline(
        printed(captured.after.graph),
        """\
view = aten.view(primals_2)
mask24 = sparse_pass.mask24(primals_1, 'optimal')
full = aten.full(0)
where = aten.where(mask24, primals_1, full)
float8_scale = sparse_pass.float8_scale(primals_1)
round_float8 = sparse_pass.round_float8(where, float8_scale)
permute = aten.permute(round_float8, [1, 0])
float8_scale_1 = sparse_pass.float8_scale(primals_2)
round_float8_1 = sparse_pass.round_float8(primals_2, float8_scale_1)
view_1 = aten.view(round_float8_1)
mm = aten.mm(view_1, permute)
view_2 = aten.view(mm)
view_3 = aten.view(tangents_1)  # backward
permute_1 = aten.permute(view_3, [1, 0])  # backward
mm_1 = aten.mm(permute_1, view)  # backward
permute_2 = aten.permute(mm_1, [1, 0])  # backward
permute_3 = aten.permute(permute, [1, 0])  # backward
float8_scale_2 = sparse_pass.float8_scale(tangents_1)  # backward
round_float8_2 = sparse_pass.round_float8(tangents_1, float8_scale_2)  # backward
view_4 = aten.view(round_float8_2)  # backward
mm_2 = aten.mm(view_4, permute_3)  # backward
view_5 = aten.view(mm_2)  # backward
permute_4 = aten.permute(permute_2, [1, 0])  # backward
return view_2, permute_4, view_5""",
    )


def test_packed_graph() -> None:
    """The product of scaled values, of which the backward has the transpose."""
    kernels = sp.WeightSparsity(precision="float8", backend="cusparselt")
    x = leaf(8, 64, dtype=torch.bfloat16)
    captured = capture(nn.Linear(64, 128, dtype=torch.bfloat16), [x], {"weight": kernels})
    assert_expected_inline(
        printed(captured.after.graph),
        """\
float8_scale = sparse_pass.float8_scale(primals_1)
sparsify_float8 = sparse_pass.sparsify_float8(primals_1, float8_scale, 'optimal')
getitem = sparsify_float8[0]
getitem_1 = sparsify_float8[1]
float8_scale_1 = sparse_pass.float8_scale(primals_3)
quantize_float8 = sparse_pass.quantize_float8(primals_3, float8_scale_1)
linear = sparse_pass.linear(quantize_float8, getitem, None, 128)
float8_inverse = sparse_pass.float8_inverse(float8_scale_1, float8_scale)
convert_element_type = prims.convert_element_type(linear, float32)
mul = aten.mul(convert_element_type, float8_inverse)
add = aten.add(mul, primals_2)
convert_element_type_1 = prims.convert_element_type(add, bfloat16)
float8_scale_2 = sparse_pass.float8_scale(tangents_1)  # backward
quantize_float8_1 = sparse_pass.quantize_float8(tangents_1, float8_scale_2)  # backward
linear_1 = sparse_pass.linear(quantize_float8_1, getitem_1, None, 64)  # backward
float8_inverse_1 = sparse_pass.float8_inverse(float8_scale_2, float8_scale)  # backward
convert_element_type_2 = prims.convert_element_type(linear_1, float32)  # backward
mul_1 = aten.mul(convert_element_type_2, float8_inverse_1)  # backward
convert_element_type_3 = prims.convert_element_type(mul_1, bfloat16)  # backward
permute = aten.permute(tangents_1, [1, 0])  # backward
mm = aten.mm(permute, primals_3)  # backward
permute_1 = aten.permute(mm, [1, 0])  # backward
sum = aten.sum(tangents_1, [0], True)  # backward
view = aten.view(sum)  # backward
permute_2 = aten.permute(permute_1, [1, 0])  # backward
return convert_element_type_1, permute_2, view, convert_element_type_3""",
    )


def test_what_several_read_is_rounded_once() -> None:
    """Of two linears of one input: two weights, the input, and the two of grad_output."""
    captured = capture(OneInput(), [leaf(2, 4, 16)], {"gate": FLOAT8, "up": FLOAT8})
    counted = [node.target for node in captured.after.graph.nodes].count(sparse.round_float8.default)
    assert counted == 5


def test_packed_estimate_graph() -> None:
    """One kernel draws the estimate and quantizes grad_output; both products of the backward read what it makes."""
    scheme = sp.WeightSparsity(precision="float8", grad_weight="mvue", backend="cusparselt")
    x = leaf(2, 64, 64, dtype=torch.bfloat16)
    captured = capture(nn.Linear(64, 128, bias=False, dtype=torch.bfloat16), [x], {"weight": scheme})
    assert_expected_inline(
        printed(captured.after.graph),
        """\
float8_scale = sparse_pass.float8_scale(primals_1)
sparsify_float8 = sparse_pass.sparsify_float8(primals_1, float8_scale, 'optimal')
getitem = sparsify_float8[0]
getitem_1 = sparsify_float8[1]
float8_scale_1 = sparse_pass.float8_scale(primals_2)
quantize_float8 = sparse_pass.quantize_float8(primals_2, float8_scale_1)
view = aten.view(quantize_float8)
linear = sparse_pass.linear(view, getitem, None, 128)
float8_inverse = sparse_pass.float8_inverse(float8_scale_1, float8_scale)
convert_element_type = prims.convert_element_type(linear, float32)
mul = aten.mul(convert_element_type, float8_inverse)
convert_element_type_1 = prims.convert_element_type(mul, bfloat16)
view_1 = aten.view(convert_element_type_1)
float8_scale_2 = sparse_pass.float8_scale(tangents_1)  # backward
view_2 = aten.view(tangents_1)  # backward
randint = aten.randint(0, 4611686018427387904, [1], dtype=int64)  # backward
sparsify_mvue_float8 = sparse_pass.sparsify_mvue_float8(view_2, randint, float8_scale_2)  # backward
getitem_2 = sparsify_mvue_float8[1]  # backward
reshape = aten.reshape(getitem_2)  # backward
getitem_3 = sparsify_mvue_float8[0]  # backward
view_3 = aten.view(quantize_float8)
permute = aten.permute(view_3, [1, 0])  # backward
clone = aten.clone(permute, memory_format=torch.contiguous_format)  # backward
grad_weight_t = sparse_pass.grad_weight_t(getitem_3, clone, 128)  # backward
mul_1 = aten.mul(float8_scale_2, 0.5)  # backward
float8_inverse_1 = sparse_pass.float8_inverse(float8_scale_1, mul_1)  # backward
convert_element_type_2 = prims.convert_element_type(grad_weight_t, float32)  # backward
mul_2 = aten.mul(convert_element_type_2, float8_inverse_1)  # backward
convert_element_type_3 = prims.convert_element_type(mul_2, bfloat16)  # backward
permute_1 = aten.permute(convert_element_type_3, [1, 0])  # backward
view_4 = aten.view(reshape)  # backward
linear_1 = sparse_pass.linear(view_4, getitem_1, None, 64)  # backward
float8_inverse_2 = sparse_pass.float8_inverse(float8_scale_2, float8_scale)  # backward
convert_element_type_4 = prims.convert_element_type(linear_1, float32)  # backward
mul_3 = aten.mul(convert_element_type_4, float8_inverse_2)  # backward
convert_element_type_5 = prims.convert_element_type(mul_3, bfloat16)  # backward
view_5 = aten.view(convert_element_type_5)  # backward
permute_2 = aten.permute(permute_1, [1, 0])  # backward
return view_1, permute_2, view_5""",
    )


# What is declined


def test_a_weight_that_is_quantized_already() -> None:
    class Quantized(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, (self.weight * 4).round() / 4)

    model = nn.Sequential(Quantized(16, 16))
    backend = sp.sparse_backend({"*": FLOAT8}, model=model, inner="aot_eager")
    x = leaf(8, 16)
    assert torch.equal(torch.compile(model, backend=backend)(x), model(x))
    (site,) = backend.report.sites
    assert site.status == "skipped"
    assert site.reason == (
        "precision='float8' rounds the weight, but the graph computes something else from it; use precision='captured'"
    )


def test_fields_and_pairs() -> None:
    with pytest.raises(ValueError, match=r"precision='fp8'.*'captured', 'float8'"):
        sp.WeightSparsity(precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'fc'.*precision='float8' is for one scheme alone"):
        sp.sparse_backend({"fc": (FLOAT8, sp.ActivationSparsity())})
    with pytest.raises(ValueError, match=r"'fc'.*precision='float8' is for one scheme alone"):
        sp.sparse_backend({"fc": (sp.GradientSparsity(precision="float8"), sp.ActivationSparsity())})
    with pytest.raises(ValueError, match=r"precision='float8', grad_input='mvue'.*use grad_input='dense'"):
        sp.GradientSparsity(precision="float8", grad_input="mvue")
    assert str(FLOAT8) == "w24(precision=float8)"
    assert str(sp.GradientSparsity(precision="float8")) == "grad24(precision=float8)"
