"""What a device can do, as plain data, so that every rule can be tested on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..vocabulary import FLOAT8, FLOAT8_CAPABILITY, KERNEL_DTYPES, MIN_CAPABILITY


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a device can do."""

    device: str
    """Device type: ``"cuda"``, ``"cpu"``, ..."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None for other devices."""
    unavailable: str = ""
    """Why the sparse kernels cannot be used there although the capability would do; empty if they can."""
    layout: str = ""
    """The packed layout that its kernels read, if it was asked."""
    kernel: str = "cusparselt"
    """Whose kernels they are."""
    note: str = ""
    """What is told of that choice: why it is not the first layout."""

    @property
    def scaled_mm(self) -> bool:
        """Whether ``torch._scaled_mm`` multiplies float8_e4m3fn there."""
        has_float8 = self.capability is not None and self.capability >= FLOAT8_CAPABILITY
        return self.device == "cuda" and has_float8 and torch.version.hip is None


def device_limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Ask the device. The first call for a CUDA device verifies the kernels on a small matrix."""
    if device.type != "cuda":
        return Limits(device=device.type)
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None:
        return Limits(device="cuda", capability=capability, unavailable="ROCm has no cuSPARSELt kernels")
    if capability < MIN_CAPABILITY or dtype not in (*KERNEL_DTYPES, FLOAT8):
        return Limits(device="cuda", capability=capability)
    from ..kernels import probe

    unavailable = probe.availability(device, dtype)
    found = None if unavailable else probe.backend(device, dtype)
    if found is None or isinstance(found, str):
        return Limits(device="cuda", capability=capability, unavailable=unavailable)
    why = "; ".join(probe.reasons(device, dtype))
    note = f"{device} multiplies {dtype} by the layout {found.name!r} ({why})" if why else ""
    return Limits(device="cuda", capability=capability, layout=found.name, kernel=found.kernel, note=note)


AskLimits: TypeAlias = Callable[[torch.device, torch.dtype], Limits]
"""The limits of a device for GEMMs of a dtype."""
