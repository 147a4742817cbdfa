"""The text: Python source that is there on every machine with Python, byte by byte.

All *.py files of the standard library and of installed packages, without copies, in the order of a hash of their
contents: so the order is the same on every machine, says nothing of names, and mixes packages. Every 20th file is held
out, until the limit in bytes is reached. Which packages are installed decides what the text is: results carry its size
and a digest, and losses of two texts are not to be compared. Packages copy from each other, so that some of the
held-out text is also, with small changes, in the other: all runs have the same advantage.
"""

from __future__ import annotations

import hashlib
import json
import os
import site
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 20
"""One file of so many."""


@dataclass(frozen=True)
class Text:
    train: Tensor
    """uint8, 1-D."""
    held_out: Tensor
    digest: str

    def to(self, device: torch.device) -> Text:
        return Text(self.train.to(device), self.held_out.to(device), self.digest)


def load(cache: Path, megabytes: float) -> Text:
    """From `cache`, a folder, or from the source files, of which the cache is then made."""
    folder = cache / f"text-{megabytes:g}"
    if not (folder / "about.json").exists():
        _gather(folder, int(megabytes * 1e6))
    digest = json.loads((folder / "about.json").read_text())["digest"]
    train, held_out = (_bytes(folder / name) for name in ("train", "held_out"))
    return Text(train, held_out, digest)


def windows(text: Tensor, starts: Tensor, context: int) -> Tensor:
    """Tokens int64 [len(starts), context + 1]."""
    return text[starts[:, None] + torch.arange(context + 1, device=text.device)].long()


def _bytes(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def _gather(folder: Path, limit: int) -> None:
    files = {}
    for root in _roots():
        for path in root.rglob("*.py"):
            if path.is_file():
                content = path.read_bytes()
                files[hashlib.sha256(content).hexdigest()] = content
    parts: dict[str, list[bytes]] = {"train": [], "held_out": []}
    taken, digest = 0, hashlib.sha256()
    for number, name in enumerate(sorted(files)):
        if taken >= limit:
            break
        parts["train" if number % HELD_OUT else "held_out"].append(files[name])
        taken += len(files[name])
        digest.update(name.encode())
    folder.mkdir(parents=True, exist_ok=True)
    for part, contents in parts.items():
        _write(folder / part, b"".join(contents))
    about = {"digest": digest.hexdigest()[:12], "bytes": taken, "files": len(files)}
    _write(folder / "about.json", json.dumps(about).encode())


def _roots() -> list[Path]:
    paths = sysconfig.get_paths()
    found = {paths["stdlib"], paths["purelib"], paths["platlib"], *site.getsitepackages()}
    found = {Path(path).resolve() for path in found if Path(path).is_dir()}
    return sorted(path for path in found if not any(other in path.parents for other in found))


def _write(path: Path, content: bytes) -> None:
    """At once, so that another process sees all of it or nothing."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)
