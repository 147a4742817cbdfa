"""The reference of 2:4 inputs, plain torch on any device: masks, activation functions, packed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...vocabulary import MASKS as TILE_MASKS
from ...vocabulary import Layout, padded
from . import weights

MASKS = (*TILE_MASKS, "rowwise")

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu_gate": lambda x, gate: F.silu(x) * gate,
}
GATED = frozenset({"silu_gate"})


def input_mask24(input: Tensor, mask: str, tile_mask: Callable[[Tensor, str], Tensor] = weights.mask24) -> Tensor:
    """Choose the 2:4 mask of an input [..., K]: bool of its shape, contiguous. K is a multiple of 4.

    The leading dims are one, M. "optimal" and "greedy" are `weights.mask24` of [M, K], with rows of zeros added up to
    a multiple of 4. "rowwise" keeps the two largest magnitudes of every four along K, of equal ones the first: what is
    kept of a row depends on that row alone. NaN counts as +inf.

    Args:
        tile_mask: computes the masks of tiles, as `weights.mask24` does.
    """
    matrix = input.detach().reshape(-1, input.shape[-1]) if input.numel() else input.detach().new_empty(0, 4)
    if mask == "rowwise":
        kept = _rowwise(matrix)
    else:
        rows = matrix.shape[0]
        kept = tile_mask(F.pad(matrix, (0, 0, 0, -rows % 4)), mask)[:rows]
    return kept.reshape(input.shape)


def _rowwise(matrix: Tensor) -> Tensor:
    magnitude = matrix if matrix.dtype == torch.float64 else matrix.to(torch.float32)
    magnitude = magnitude.abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    groups = magnitude.reshape(matrix.shape[0], matrix.shape[1] // 4, 4)
    largest = groups.sort(dim=-1, descending=True, stable=True).indices[..., :2]
    kept = torch.zeros(groups.shape, dtype=torch.bool, device=matrix.device)
    return kept.scatter_(-1, largest, True).view(matrix.shape)


def activate(input: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """Apply an activation function in float32, and round once to input's dtype."""
    if activation == "none":
        return input
    arguments = [input.float()] if gate is None else [input.float(), gate.float()]
    return ACTIVATIONS[activation](*arguments).to(input.dtype)


def sparsify_input(
    input: Tensor, gate: Tensor | None, mask: str, activation: str, layout: Layout = "sm90"
) -> tuple[Tensor, Tensor]:
    """S(x) and S(x)^T packed, x [M, K] what the activation gives: `weights.pack` of [Mp, K] and of [K, Mp].

    Mp is M rounded up to a multiple of 64, and what is added counts as zeros.
    """
    x = activate(input.detach(), gate, activation)
    x = F.pad(x, (0, 0, 0, padded(x.shape[0]) - x.shape[0]))
    kept = weights.mask24(x, mask) if x.shape[0] else torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    return weights.pack(x, kept, layout), weights.pack(x.T, kept.T, layout)
