"""The pass on a GPU: compiled modules through cuSPARSELt against masked-dense in float32."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse_pass as sp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16]
# Error of the sparse path over that of torch's dense matmul of the same dtype on the masked weight.
MAX_ERROR_RATIO = 1.5


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def masked(weight: torch.Tensor, mask: str = "optimal") -> torch.Tensor:
    return torch.where(sp.mask24(weight, mask), weight, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("mask", ["optimal", "greedy"])
@pytest.mark.parametrize(
    ("rows", "k", "n", "bias"),
    [
        (1024, 256, 512, True),
        (4096, 1024, 4096, False),
        (13, 64, 64, True),
        (1001, 192, 320, True),
        (8, 1024, 128, True),
    ],
)
def test_linear_error_is_that_of_dense(dtype, mask, rows, k, n, bias):
    linear = nn.Linear(k, n, bias=bias, device="cuda", dtype=dtype)
    x = torch.randn(rows, k, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(rows, n, device="cuda", dtype=dtype)
    weight = masked(linear.weight.detach(), mask)

    dense = [F.linear(x, weight, linear.bias), grad @ weight, grad.T @ x]
    w64, x64, g64 = weight.double(), x.detach().double(), grad.double()
    b64 = linear.bias.double() if bias else None
    exact = [F.linear(x64, w64, b64), g64 @ w64, g64.T @ x64]

    backend = sp.sparse_backend({"weight": sp.WeightSparsity(mask=mask)}, model=linear, tune="off")
    out = torch.compile(linear, backend=backend)(x)
    out.backward(grad)
    site = backend.report.sites[0]
    assert (site.status, site.output, site.grad_input) == ("sparse", "cusparselt", "cusparselt"), str(backend.report)

    for name, ours, theirs, truth in zip(
        ("output", "grad_input", "grad_weight"), (out, x.grad, linear.weight.grad), dense, exact, strict=True
    ):
        ratio = relative_error(ours, truth) / relative_error(theirs, truth)
        assert ratio <= MAX_ERROR_RATIO, f"{name}: error ratio {ratio:.2f}"


class Block(nn.Module):
    """Pre-norm MLP with residual; ``checkpointed`` recomputes it in the backward."""

    def __init__(self, dim: int, hidden: int, checkpointed: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.checkpointed = checkpointed

    def body(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.checkpointed:
            return checkpoint(self.body, x, use_reentrant=False)
        return self.body(x)


CONFIG = {"*.fc1": sp.WeightSparsity(), "*.fc2": sp.WeightSparsity()}


def _gradients(model: nn.Module, run, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    (out.float() * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    return {
        "output": out.detach(),
        "input": x.grad,
        **{name: p.grad.clone() for name, p in model.named_parameters()},
    }


def _masked_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    reference = copy.deepcopy(model)
    sp.prune_(reference, CONFIG)
    return reference.to(dtype)


def _check_against_masked(model: nn.Module, run, x: torch.Tensor, dense_dtype: torch.dtype) -> None:
    """Straight-through gradients are those of the model that holds the masked weights."""
    exact_model = _masked_copy(model, torch.float64)
    exact = _gradients(exact_model, exact_model, x.double())
    dense_model = _masked_copy(model, dense_dtype)
    dense = _gradients(dense_model, dense_model, x.to(dense_dtype))
    ours = _gradients(model, run, x)
    for name in exact:
        ratio = relative_error(ours[name], exact[name]) / relative_error(dense[name], exact[name])
        assert ratio <= MAX_ERROR_RATIO, f"{name}: error ratio {ratio:.2f}"


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["saved", "checkpointed"])
@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_blocks(dtype, checkpointed, inner):
    model = nn.Sequential(*(Block(128, 512, checkpointed) for _ in range(2))).to("cuda", dtype)
    backend = sp.sparse_backend(CONFIG, model=model, inner=inner, tune="off")
    run = torch.compile(model, backend=backend)
    _check_against_masked(model, run, torch.randn(4, 50, 128, device="cuda", dtype=dtype), dtype)
    sites = backend.report.sites
    assert len(sites) == 4
    assert all(s.status == "sparse" for s in sites), str(backend.report)


def test_dynamic_batch():
    model = nn.Sequential(Block(128, 256), Block(128, 256)).to("cuda", torch.bfloat16)
    backend = sp.sparse_backend(CONFIG, model=model, tune="off")
    run = torch.compile(model, backend=backend, dynamic=True)
    for batch in (3, 16, 5, 33):
        _check_against_masked(
            model, run, torch.randn(batch, 7, 128, device="cuda", dtype=torch.bfloat16), torch.bfloat16
        )


def test_autocast_masks_the_stored_weight():
    model = nn.Sequential(Block(128, 256), Block(128, 256)).cuda()
    backend = sp.sparse_backend(CONFIG, model=model, tune="off")
    compiled = torch.compile(model, backend=backend)
    reference = _masked_copy(model, torch.float32)

    def autocast(run):
        def call(x):
            with torch.autocast("cuda", torch.bfloat16):
                return run(x)

        return call

    x = torch.randn(64, 128, device="cuda")
    ours = _gradients(model, autocast(compiled), x)
    theirs = _gradients(reference, autocast(reference), x)
    exact_model = _masked_copy(model, torch.float64)
    exact = _gradients(exact_model, exact_model, x.double())
    assert all(s.status == "sparse" for s in backend.report.sites), str(backend.report)
    for name in exact:
        ratio = relative_error(ours[name], exact[name]) / relative_error(theirs[name], exact[name])
        assert ratio <= MAX_ERROR_RATIO, f"{name}: error ratio {ratio:.2f}"


def test_reduce_overhead_trains():
    """CUDA graphs: several steps with an optimizer, equal to the run without them."""
    torch.manual_seed(1)
    start = nn.Sequential(Block(128, 256), Block(128, 256)).to("cuda", torch.bfloat16)
    x = torch.randn(8, 16, 128, device="cuda", dtype=torch.bfloat16)
    losses = {}
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        model = copy.deepcopy(start)
        run = torch.compile(model, backend=sp.sparse_backend(CONFIG, model=model, tune="off"), mode=mode)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[mode] = []
        for _ in range(6):
            loss = run(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[mode].append(loss.item())
    assert losses["default"][-1] < losses["default"][0]
    assert losses["reduce-overhead"] == pytest.approx(losses["default"], rel=2e-2)


def test_float32_and_odd_dims_go_masked_dense():
    model = nn.Sequential(nn.Linear(64, 100), nn.Linear(100, 64)).to("cuda", torch.bfloat16)
    config = {"0": sp.WeightSparsity(), "1": sp.WeightSparsity()}
    backend = sp.sparse_backend(config, model=model)
    torch.compile(model, backend=backend)(torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)).sum().backward()
    assert {site.status for site in backend.report.sites} == {"masked_dense"}
    assert all("multiples of 64" in site.reason for site in backend.report.sites)

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 128)).cuda()
    backend = sp.sparse_backend({"0": sp.WeightSparsity()}, model=model)
    x = torch.randn(32, 64, device="cuda")
    out = torch.compile(model, backend=backend)(x)
    torch.testing.assert_close(out, F.linear(x, masked(model[0].weight), model[0].bias), rtol=1e-3, atol=1e-3)
    assert "float32" in backend.report.sites[0].reason


@pytest.mark.parametrize("strict", [False, True])
def test_a_job_that_insists_on_sparse_kernels(strict):
    """`require="sparse"`: odd dims are an error, a small layer that measures slower is none."""
    x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    for width, refused in ((100, True), (128, False)):
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(64, width), nn.Linear(width, 64)).to("cuda", torch.bfloat16)
        backend = sp.sparse_backend({"*": sp.WeightSparsity()}, model=model, require="sparse", strict=strict)
        run = torch.compile(model, backend=backend)
        if refused:
            with pytest.raises(RuntimeError, match=r"require='sparse': no 2:4 kernel for '0' is masked_dense: .*of 64"):
                run(x)
        else:
            run(x).sum().backward()
            assert all(site.status == "sparse" or site.measured for site in backend.report.sites)


def test_mask_follows_the_live_weight():
    linear = nn.Linear(128, 128, bias=False, device="cuda", dtype=torch.bfloat16)
    run = torch.compile(linear, backend=sp.sparse_backend({"weight": sp.WeightSparsity()}, model=linear, tune="off"))
    x = torch.randn(16, 128, device="cuda", dtype=torch.bfloat16)
    run(x)
    with torch.no_grad():
        linear.weight.copy_(torch.randn_like(linear.weight))
    expected = F.linear(x, masked(linear.weight.detach()))
    assert relative_error(run(x), expected) < 1e-2


def test_tuning_measures_once_and_changes_nothing_but_speed(tuning_folder, monkeypatch):
    from sparse_pass.kernels import measure, timings, tuner

    model = nn.Sequential(Block(1024, 4096)).to("cuda", torch.bfloat16)
    x = torch.randn(8192, 1024, device="cuda", dtype=torch.bfloat16)
    backend = sp.sparse_backend(CONFIG, model=model, tune="auto")
    _check_against_masked(model, torch.compile(model, backend=backend), x, torch.bfloat16)
    (file,) = tuning_folder.glob("*.json")
    known = timings._read(file)
    assert len(known) == 6  # two linears, output with bias, grad_input without, and the masks of two weights
    for site in backend.report.sites:
        assert site.status == "sparse" or "measured slower" in site.reason

    # A second process: nothing in memory, all on disk.
    timings._KNOWN.clear()
    tuner._CHOSEN.clear()
    monkeypatch.setattr(measure, "_measured", lambda file, name, *_: pytest.fail(f"measured {name} again"))
    torch._dynamo.reset()
    again = sp.sparse_backend(CONFIG, model=model, tune="auto")
    _check_against_masked(model, torch.compile(model, backend=again), x, torch.bfloat16)
    assert [s.status for s in again.report.sites] == [s.status for s in backend.report.sites]


def test_tuning_a_shape_that_loses_goes_masked_dense(tuning_folder):
    model = nn.Sequential(Block(128, 128)).to("cuda", torch.bfloat16)
    backend = sp.sparse_backend(CONFIG, model=model)
    x = torch.randn(16, 128, device="cuda", dtype=torch.bfloat16)
    _check_against_masked(model, torch.compile(model, backend=backend), x, torch.bfloat16)
    for site in backend.report.sites:
        assert (site.status == "masked_dense") == ("measured slower" in site.reason), str(backend.report)


def test_tuning_with_dynamic_rows_measures_at_the_first_call(tuning_folder):
    model = nn.Sequential(Block(128, 256)).to("cuda", torch.bfloat16)
    backend = sp.sparse_backend(CONFIG, model=model)
    run = torch.compile(model, backend=backend, dynamic=True)
    for batch in (100, 120, 1000):
        x = torch.randn(batch, 128, device="cuda", dtype=torch.bfloat16)
        _check_against_masked(model, run, x, torch.bfloat16)
    (file,) = tuning_folder.glob("*.json")
    text = file.read_text()
    assert "M=128 " in text
    assert "M=1024 " in text
    assert "M=104 " not in text  # a coarse grid, not every size


def test_masks_agree_with_the_cpu():
    for dtype in (torch.float32, *DTYPES):
        weight = torch.randn(256, 512).to(dtype)
        for mask in ("optimal", "greedy"):
            assert torch.equal(sp.mask24(weight.cuda(), mask).cpu(), sp.mask24(weight, mask))


def test_pruned_model_is_the_trained_function():
    model = nn.Sequential(Block(128, 256)).to("cuda", torch.bfloat16)
    config = {"0.fc1": sp.WeightSparsity(), "0.fc2": sp.WeightSparsity()}
    x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        ours = torch.compile(model, backend=sp.sparse_backend(config, model=model, tune="off"))(x)
        sp.prune_(model, config)
        assert relative_error(ours, model(x)) < 1e-2
