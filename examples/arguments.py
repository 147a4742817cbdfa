"""Types of arguments that the examples share: what cannot work ends in one sentence, before anything runs."""

from __future__ import annotations

import argparse

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
