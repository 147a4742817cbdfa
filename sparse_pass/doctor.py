"""What of this machine can be accelerated, and if nothing can, what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .vocabulary import FLOAT8, KERNEL_DTYPES, MIN_CAPABILITY


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """The 2:4 kernels for one dtype on one GPU."""

    dtype: str
    layout: str
    """Of the packed weight: ``"sm90"`` or ``"compress"``; empty where there are no kernels."""
    verified: bool
    """Whether a small matrix was packed and multiplied in it, and the product was right."""
    about: str
    """Which kernels these are, or why there are none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One CUDA device."""

    index: int
    name: str
    capability: tuple[int, int]
    kernels: tuple[Kernels, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """What :func:`diagnose` found."""

    python: str
    torch: str
    cuda: str
    """The version that torch is built for, or why there is none."""
    triton: str
    cusparselt: str
    cache: str
    """The folder with measured times."""
    cache_about: str
    """How many files it has, or why nothing can be remembered there."""
    devices: tuple[Device, ...]
    remedy: str
    """What to do where nothing can be accelerated; empty where something can."""

    @property
    def accelerated(self) -> bool:
        """Whether there are 2:4 kernels for some device and dtype."""
        return any(kernels.layout for device in self.devices for kernels in device.kernels)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data, for JSON, and ``accelerated``."""
        return {"accelerated": self.accelerated, **asdict(self)}


def diagnose() -> Diagnosis:
    """Look at this machine. It opens a CUDA context on each GPU and multiplies a small matrix there."""
    from .kernels import timings

    folder = timings.directory()
    devices = tuple(_device(index) for index in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
    found = Diagnosis(
        python=platform.python_version(),
        torch=str(torch.__version__),
        cuda=_cuda(),
        triton=_version_of("triton"),
        cusparselt=_cusparselt(),
        cache=str(folder),
        cache_about=_cache(folder),
        devices=devices,
        remedy="",
    )
    return found if found.accelerated else Diagnosis(**{**_fields(found), "remedy": _remedy(found)})


def _fields(found: Diagnosis) -> dict[str, Any]:
    return {name: getattr(found, name) for name in Diagnosis.__dataclass_fields__}


def _device(index: int) -> Device:
    device = torch.device("cuda", index)
    capability = torch.cuda.get_device_capability(device)
    kernels = tuple(_kernels(device, dtype) for dtype in (*KERNEL_DTYPES, FLOAT8))
    return Device(index=index, name=torch.cuda.get_device_name(device), capability=capability, kernels=kernels)


def _kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    from .kernels import probe

    name = str(dtype).removeprefix("torch.")
    why_not = probe.availability(device, dtype)
    if why_not:
        return Kernels(dtype=name, layout="", verified=False, about=why_not)
    backend = probe.backend(device, dtype)
    assert not isinstance(backend, str)
    measured = (
        "cuSPARSELt, the fastest algorithm by measurement" if backend.is_measured else "torch's own cuSPARSELt calls"
    )
    return Kernels(dtype=name, layout=backend.name, verified=True, about=measured)


def _cuda() -> str:
    if torch.version.hip:
        return f"none: this torch is built for ROCm {torch.version.hip}"
    if torch.version.cuda is None:
        return "none: this torch is built for CPUs"
    return torch.version.cuda


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cusparselt() -> str:
    from .kernels import cusparselt_library

    try:
        return ".".join(map(str, cusparselt_library.version()))
    except RuntimeError as error:
        return f"none: {error}"


def _cache(folder: Path) -> str:
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    if not os.access(existing, os.W_OK):
        return f"{existing} cannot be written: times last as long as a process; set SPARSE_PASS_CACHE_DIR"
    files = len(list(folder.glob("*.json"))) if folder.exists() else 0
    return f"{files} file(s) of measured times"


def _remedy(found: Diagnosis) -> str:
    if torch.version.cuda is None:
        return (
            "install a torch that is built for CUDA (https://pytorch.org/get-started/locally); without one everything"
            " is computed all the same, by dense matmuls of the masked weights"
        )
    if not found.devices:
        return "torch sees no CUDA device: check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
    if all(device.capability < MIN_CAPABILITY for device in found.devices):
        needed = ".".join(map(str, MIN_CAPABILITY))
        return f"no GPU here has sparse tensor cores: compute capability {needed} (A100) or newer is needed"
    if found.cusparselt.startswith("none"):
        return found.cusparselt.removeprefix("none: ")
    if found.triton == "not installed":
        return "install triton, which comes with a torch that is built for CUDA: pip install triton"
    return "no kernels gave right results, see the reasons above: update torch and its cuSPARSELt wheel"
