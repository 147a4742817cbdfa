"""float8 on a GPU: the packer against the reference bit for bit, and products against float32."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support import assert_same_packed
from torch import Tensor, nn

import sparse_pass as sp
from sparse_pass.ops import definitions as ops  # noqa: F401  (registers torch.ops.sparse_pass)
from sparse_pass.ops.reference import float8, weights
from sparse_pass.plan import dense_float8
from sparse_pass.plan import weights as plan_weights
from sparse_pass.vocabulary import FLOAT8

sparse = torch.ops.sparse_pass


def _has_float8() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _has_float8(), reason="needs a CUDA device with float8 (SM 8.9 or newer)"),
]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    random = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=random).to(dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("mask", ["optimal", "greedy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 1.105])
def test_sparsify_is_the_reference(dtype, mask, factor):
    for rows, cols in ((64, 64), (192, 320), (1024, 448)):
        weight = normal(rows, cols, dtype=dtype)
        weight[:8, :8] = 0
        weight[8:16, :64] *= 1e-4  # below the smallest number of float8, and on both sides of half of it
        scale = sparse.float8_scale(weight, factor)
        found = sparse.sparsify_float8(weight, scale, mask, factor)
        expected = float8.sparsify(weight.cpu(), scale.cpu(), mask, factor)
        for one, other in zip(found, expected, strict=True):
            assert_same_packed(one.cpu(), other, (rows, cols))


def test_scale_and_casts_are_those_of_a_cpu():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = normal(96, 160, dtype=dtype)
        scale = sparse.float8_scale(x)
        assert torch.equal(scale.cpu(), sparse.float8_scale(x.cpu()))
        quantized = sparse.quantize_float8(x, scale)
        expected = sparse.quantize_float8(x.cpu(), scale.cpu())
        assert torch.equal(quantized.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("rows", [1, 16, 40, 512, 2048])
def test_linear_is_the_product_of_the_rounded_values(rows):
    for n, k in ((64, 64), (192, 320), (1024, 576)):
        weight, x = normal(n, k, dtype=torch.bfloat16), normal(rows, k, dtype=torch.bfloat16, seed=1)
        scale, scale_x = sparse.float8_scale(weight), sparse.float8_scale(x)
        packed = sparse.sparsify_float8(weight, scale, "optimal")
        kept = float8.quantize(weight, scale).float() * weights.mask24(weight, "optimal")
        for made, matrix in zip(packed, (kept, kept.T), strict=True):
            operand = x if matrix is kept else normal(rows, n, dtype=torch.bfloat16, seed=2)
            quantized = sparse.quantize_float8(operand, scale_x)
            expected = quantized.double() @ matrix.double().T
            one = torch.ones((), device="cuda")
            dense = torch._scaled_mm(quantized, matrix.to(FLOAT8).contiguous().T, one, one, out_dtype=torch.bfloat16)
            for tuned in (False, True):
                found = sparse.linear(quantized, made, None, matrix.shape[0], tuned=tuned)
                assert found.dtype == torch.bfloat16
                # Tensor cores add float8 in fewer bits than float32 has.
                assert relative_error(found, expected) <= 1.2 * relative_error(dense, expected) + 1e-4, (tuned, n, k)


def test_the_probe_has_kernels():
    from sparse_pass.kernels import probe

    assert probe.availability(torch.device("cuda"), FLOAT8) == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_estimate_is_the_reference(dtype):
    for rows, cols in ((64, 64), (192, 320), (1000, 192)):
        grad = normal(rows, cols, dtype=dtype)
        grad[:8, :8], grad[8:16] = 0, grad[8:16] * 1e-4
        seed, scale = torch.tensor([7], device="cuda"), sparse.float8_scale(grad)
        found, quantized = sparse.sparsify_mvue_float8(grad, seed, scale)
        expected, rounded = float8.sparsify_mvue(grad.cpu(), seed.cpu(), scale.cpu())
        assert torch.equal(quantized.cpu().view(torch.uint8), rounded.view(torch.uint8))
        assert_same_packed(found.cpu(), expected, (rows, cols))
        x = sparse.quantize_float8(normal(rows, 64, dtype=dtype), scale)
        estimate = float8.quantize(sparse.mvue24(grad, seed), scale * 0.5).double()
        for tuned in (False, True):
            made = sparse.grad_weight_t(found, x.T.contiguous(), cols, tuned=tuned)
            assert relative_error(made, estimate.T @ x.double()) < 4e-3


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(256, 512), nn.Linear(512, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


@pytest.mark.parametrize("autocast", [False, True])
def test_dense_weights_in_float8(autocast):
    """By torch._scaled_mm and a 2:4 estimate, against dense matmuls of the same numbers."""
    torch.manual_seed(0)
    model = Mlp().cuda() if autocast else Mlp().cuda().bfloat16()
    x = torch.randn(2, 128, 256, device="cuda", dtype=next(model.parameters()).dtype, requires_grad=True)
    results = []
    for has_scaled_mm in (True, False):
        torch._dynamo.reset()
        backend = sp.sparse_backend({"re:fc.": sp.GradientSparsity(precision="float8")}, model=model, tune="off")
        with (
            mock.patch.object(dense_float8, "has_scaled_mm", return_value=has_scaled_mm),
            torch._inductor.config.patch(force_disable_caches=True),
            torch.autocast("cuda", torch.bfloat16, enabled=autocast),
        ):
            torch.manual_seed(1)
            y = torch.compile(model, backend=backend)(x)
        y.float().square().mean().backward()
        found = {"y": y, "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
        results.append({name: value.detach().double().clone() for name, value in found.items()})
        kernels = {(site.output, site.grad_input, site.grad_weight) for site in backend.report.sites}
        assert kernels == {("float8", "float8", "cusparselt") if has_scaled_mm else ("dense", "dense", "cusparselt")}
        x.grad = None
        model.zero_grad()
    for name, value in results[0].items():
        assert relative_error(value, results[1][name]) < (0.2 if name == "fc1.weight" else 5e-2), name


@pytest.mark.parametrize("grad_weight", ["dense", "mvue"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rows", [256, 200])
def test_compiled_is_masked_dense(grad_weight, autocast, rows):
    """By 2:4 kernels, by torch._scaled_mm and by dense matmuls of rounded operands, from one seed."""
    torch.manual_seed(0)
    model = Mlp().cuda() if autocast else Mlp().cuda().bfloat16()
    x = torch.randn(2, rows // 2, 256, device="cuda", dtype=next(model.parameters()).dtype, requires_grad=True)
    results, kernels, why_slower = {}, {}, plan_weights._why_slower
    for way in ("cusparselt", "scaled_mm", "masked_dense"):
        scheme = sp.WeightSparsity(
            precision="float8", grad_weight=grad_weight, backend="auto" if way == "scaled_mm" else way
        )
        torch._dynamo.reset()
        slower = {"return_value": "measured slower: for the test"} if way == "scaled_mm" else {"wraps": why_slower}
        backend = sp.sparse_backend({"re:fc.": scheme}, model=model, tune="off")
        with (
            mock.patch.object(plan_weights, "_why_slower", **slower),
            torch._inductor.config.patch(force_disable_caches=True),
            torch.autocast("cuda", torch.bfloat16, enabled=autocast),
        ):
            torch.manual_seed(1)
            y = torch.compile(model, backend=backend)(x)
        y.float().square().mean().backward()
        found = {"y": y, "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}
        results[way] = {name: value.detach().double().clone() for name, value in found.items()}
        kernels[way] = {site.output for site in backend.report.sites}
        x.grad = None
        model.zero_grad()
    assert kernels["cusparselt"] == {"cusparselt"}
    assert kernels["masked_dense"] == {"masked_dense"}
    for way in ("cusparselt", "scaled_mm"):
        for name, value in results[way].items():
            # What is next to the middle of two numbers of float8 rounds to either, as it is rounded to bfloat16 before.
            # An estimate of a gradient that differs by so little keeps another element once in a hundred times.
            bound = 0.2 if (grad_weight, name) == ("mvue", "fc1.weight") else 5e-2
            assert relative_error(value, results["masked_dense"][name]) < bound, (way, name)
