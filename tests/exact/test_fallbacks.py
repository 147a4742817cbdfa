"""Every layout on a device for which it is the right one, and every step from one to the next after a fault.

The devices are fakes: a library that packs and multiplies in a layout of its own, and torch's calls.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fake_cusparselt import NOT_SUPPORTED, FakeCusparselt
from fake_gpu import CudaIsTheCpu, device_operators, install_kernels
from support import errors, run
from torch import Tensor, nn

import sparse_pass as sp
from sparse_pass.kernels import backends, cusparselt_library, probe
from sparse_pass.ops import cuda
from sparse_pass.plan.limits import Limits, device_limits
from sparse_pass.vocabulary import Layout

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the device itself is there")

BFLOAT16 = torch.bfloat16
CUDA = torch.device("cuda", 0)
WRONG = "wrong results"


@dataclass
class Fake:
    """A device, the layout of its library, and how it is made to fail."""

    library: FakeCusparselt
    monkeypatch: pytest.MonkeyPatch
    called: Counter[str]

    def is_(self, capability: tuple[int, int], layout: Layout) -> None:
        self.monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        self.library.layout = layout

    def ampere(self) -> None:
        self.is_((8, 0), "sm80")

    def blackwell(self) -> None:
        self.is_((12, 0), "cutlass")  # as good as any that neither of our packers writes

    def lose_the_library(self) -> None:
        def missing() -> Any:
            raise RuntimeError("libcusparseLt.so.0 was not found: install the wheel")

        self.monkeypatch.setattr(cusparselt_library, "_load", missing)

    def lose_triton(self) -> None:
        for name in ("sparsify", "mvue"):
            self.monkeypatch.setitem(sys.modules, f"sparse_pass.kernels.{name}", None)
            self.monkeypatch.delattr(f"sparse_pass.kernels.{name}")

    def lose_torch(self) -> None:
        def unsupported(*_: object, **__: object) -> Tensor:
            raise RuntimeError("cuSPARSELt not supported on your machine")

        self.monkeypatch.setattr(torch, "_cslt_compress", unsupported)

    def other_cutlass(self) -> None:
        """Kernels that read something else."""
        mm = torch._sparse_semi_structured_mm
        self.monkeypatch.setattr(torch, "_sparse_semi_structured_mm", lambda values, *rest: mm(-values, *rest))

    def other_tiles(self) -> None:
        self.ampere()
        self.library.layout = "cutlass"

    def refuse_to_pack(self) -> None:
        self.blackwell()
        self.library.statuses["SpMMACompress2"] = NOT_SUPPORTED

    def want_more_room(self) -> None:
        self.blackwell()
        self.library.excess_bytes = 512

    def old_library(self) -> None:
        self.ampere()
        self.library.version = (0, 6, 3)


@pytest.fixture
def fake(library: FakeCusparselt, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(probe, "_REASONS", {})
    found = Fake(library, monkeypatch, install_kernels(monkeypatch))
    probe._backend.cache_clear()
    with CudaIsTheCpu():
        yield found
    probe._backend.cache_clear()


CASES: dict[str, tuple[tuple[str, ...], str, dict[str, str]]] = {
    "Hopper": ((), "sm90", {}),
    "Ampere": (("ampere",), "sm80", {"sm90": WRONG}),
    "Ampere, another layout": (("other_tiles",), "cutlass", {"sm90": WRONG, "sm80": WRONG}),
    "Ampere, no library": (
        ("ampere", "lose_the_library"), "cutlass", {"sm90": "was not found", "sm80": "was not found"},
    ),
    "Ampere, old library": (("old_library",), "cutlass", {"sm90": "is older", "sm80": "is older"}),
    "Ampere, another layout and CUTLASS": (
        ("other_tiles", "other_cutlass"), "library", {"sm90": WRONG, "sm80": WRONG, "cutlass": WRONG},
    ),
    "Ampere, nothing but torch's cuSPARSELt": (
        ("ampere", "lose_the_library", "other_cutlass"),
        "compress",
        {"sm90": "was not found", "sm80": "was not found", "cutlass": WRONG, "library": "was not found"},
    ),
    "Blackwell": (("blackwell",), "library", {"sm90": WRONG, "sm80": WRONG, "cutlass": "compute capability 8.x"}),
    "Blackwell, refuses to pack": (
        ("refuse_to_pack",),
        "compress",
        {
            "sm90": WRONG,
            "sm80": "cusparseLtSpMMACompress2 returned status 10",
            "cutlass": "compute capability 8.x",
            "library": "cusparseLtSpMMACompress2 returned status 10",
        },
    ),
    "Blackwell, packs larger": (
        ("want_more_room",),
        "compress",
        {
            "sm90": "packs [128, 192] bfloat16 on cuda:-1 into 28160 bytes, more than the 27648",
            "sm80": "packs [256, 384] bfloat16",
            "cutlass": "compute capability 8.x",
            "library": "packs [128, 192] bfloat16",
        },
    ),
    "no Triton": (
        ("ampere", "lose_triton"),
        "compress",
        {"sm90": "NotFoundError", "sm80": "NotFoundError", "cutlass": "NotFoundError", "library": "NotFoundError"},
    ),
    "nothing": (
        ("blackwell", "lose_the_library", "lose_torch"),
        "",
        {
            "sm90": "was not found",
            "sm80": "was not found",
            "cutlass": "compute capability 8.x",
            "library": "was not found",
            "compress": "not supported on your machine",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_first_that_is_right_is_taken(fake: Fake, case: str) -> None:
    """And why those before it are not is told: to the probe's caller, to the report, to the compile caches' keys."""
    faults, expected, why = CASES[case]
    for fault in faults:
        getattr(fake, fault)()
    reasons = probe.reasons(CUDA, BFLOAT16)
    assert [one.partition(":")[0] for one in reasons] == list(why)
    assert all(text in one for one, text in zip(reasons, why.values(), strict=True)), reasons
    limits = device_limits(CUDA, BFLOAT16)
    if not expected:
        assert limits.unavailable == probe.availability(CUDA, BFLOAT16)
        assert all(one in limits.unavailable for one in reasons)
        return
    found = probe.backend(CUDA, BFLOAT16)
    assert isinstance(found, backends.Backend)
    assert (found.name, probe.availability(CUDA, BFLOAT16)) == (expected, "")
    assert (limits.layout, limits.kernel, limits.unavailable) == (expected, found.kernel, "")
    assert all(one in limits.note for one in reasons)
    assert bool(limits.note) == bool(reasons)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(128, 256)
        self.down = nn.Linear(256, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sin(self.up(x)))


LAYOUTS = ["Ampere", "Ampere, another layout", "Blackwell", "Ampere, nothing but torch's cuSPARSELt"]


@pytest.mark.parametrize("rows", [128, 13], ids=["whole tiles", "padded"])
@pytest.mark.parametrize("case", LAYOUTS)
def test_it_trains(fake: Fake, case: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with 2:4 weights, gradients and inputs, beside the same with dense matmuls."""
    for fault in CASES[case][0]:
        getattr(fake, fault)()
    found = probe.backend(CUDA, BFLOAT16)
    assert isinstance(found, backends.Backend)
    monkeypatch.setattr(cuda, "backend_of", lambda device, dtype: found)
    model = Mlp().bfloat16()
    x = torch.randn(rows, 128, dtype=BFLOAT16, requires_grad=True)
    parameters, results = dict(model.named_parameters()), []
    with device_operators():
        for backend in ("cusparselt", "masked_dense"):
            config: dict[str, Any] = {
                "up": sp.WeightSparsity(backend=backend, grad_weight="mvue"),
                "down": sp.ActivationSparsity(backend=backend),
            }
            torch._dynamo.reset()
            torch.manual_seed(1)
            compiled = torch.compile(model, backend=sp.sparse_backend(config, model=model, inner="aot_eager"))
            before = fake.called + Counter(launched=len(fake.library.launched))
            results.append(run(compiled, parameters, [x]))
            used = fake.called + Counter(launched=len(fake.library.launched)) - before
            products = sum(used[name] for name in PRODUCTS[found.name])
            assert products == (5 if backend == "cusparselt" else 0), used
    wrong = errors(*results)
    assert max(wrong.values()) < 2e-2, wrong


PRODUCTS = {
    "sm80": ["launched"],
    "library": ["launched"],
    "cutlass": ["_sparse_semi_structured_mm", "_sparse_semi_structured_addmm"],
    "compress": ["_cslt_sparse_mm"],
}
"""Functions that multiply."""


def test_a_layout_that_is_asked_for(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has a better one, for tests."""
    monkeypatch.setenv(probe.LAYOUT_VARIABLE, "library")
    assert probe.backend(CUDA, BFLOAT16) is backends.LIBRARY
    assert probe.reasons(CUDA, BFLOAT16) == ()
    assert device_limits(CUDA, BFLOAT16) == Limits(device="cuda", capability=(9, 0), layout="library")
    probe._backend.cache_clear()
    monkeypatch.setenv(probe.LAYOUT_VARIABLE, "hopper")
    reason = "SPARSE_PASS_LAYOUT='hopper' names no layout of torch.bfloat16: expected one of sm90, sm80, cutlass, "
    assert probe.availability(CUDA, BFLOAT16).startswith(reason)


def test_the_report_names_the_layout_where_it_is_not_the_first(fake: Fake) -> None:
    from graph_printer import trains_as

    fake.ampere()
    limits = device_limits(CUDA, BFLOAT16)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(64, 64)).bfloat16()
    backend, reports = trains_as(limits, model, {"0": sp.WeightSparsity(backend="masked_dense")})
    torch.compile(model, backend=backend)(torch.randn(8, 64).bfloat16()).sum().backward()
    (note,) = reports[0].notes
    assert note == f"cuda:0 multiplies torch.bfloat16 by the layout 'sm80' ({probe.reasons(CUDA, BFLOAT16)[0]})"
    assert f"note: {note}" in str(reports[0])


def test_reasons_of_a_device_without_kernels(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.reasons(torch.device("cpu"), BFLOAT16) == ("no 2:4 kernels on cpu",)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert probe.reasons(CUDA, BFLOAT16) == ("SM 7.5 has no 2:4 tensor cores; they begin with SM 8.0",)
