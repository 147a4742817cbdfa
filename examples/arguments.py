"""What the examples share: threads that wait asleep, and types of arguments.

What cannot work ends in one sentence, before anything runs.
"""

from __future__ import annotations

import argparse
import os

# Before torch loads OpenMP: waiting threads should sleep. Spinning ones cost a small model on a busy machine with few
# cores several times its step time. Hence the examples import this file before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch


def positive(text: str) -> int:
    """A whole number, at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return number


def device(text: str) -> str:
    """A device type of this machine."""
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("this torch finds no CUDA device")
    return text
