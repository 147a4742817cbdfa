"""The weights that GEMMs read, prepared once a step from the live float32 parameters, outside of the compiled model.

So the compiled model is the same for every mask and scale, and a switch of recipe compiles nothing unless the gradients
or the float8 casts change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from config import Recipe
from estimators import FLOAT8, Cast, Linear, round8
from masks import find_mask, soften
from torch import Tensor, nn


@dataclass
class Operand:
    """What one GEMM reads of a stack: value [rows, K] in the compute dtype, mask bool [rows, K], beta [rows, 1]."""

    value: Tensor
    mask: Tensor | None = None
    beta: Tensor | None = None


class Stack:
    """Linears of one K, their weights below each other in one tensor [sum of N, K], of which the parameters are views.

    N of each is a multiple of 4, so that neither tiles nor groups of four cross from one layer to the next.
    """

    def __init__(self, linears: list[Linear], dtype: torch.dtype) -> None:
        self.linears = linears
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        rows = [linear.weight.shape[0] for linear in linears]
        self.layer = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(rows)).to(self.weight.device)
        self.output = Operand(torch.empty_like(self.weight, dtype=dtype))
        self.grad_input = Operand(torch.empty_like(self.weight, dtype=dtype))
        stacked = self.weight, self.output.value, self.grad_input.value
        for linear, *parts in zip(linears, *map(self.split, stacked), strict=True):
            linear.weight = nn.Parameter(parts[0])
            linear.for_output, linear.for_grad_input = parts[1:]

    def split(self, stacked: Tensor) -> tuple[Tensor, ...]:
        return stacked.split([linear.weight.shape[0] for linear in self.linears])

    def rounded(self, cast: Cast | None) -> Tensor:
        """The weights after float8, each layer with its own scales."""
        if cast is None:
            return self.weight
        return torch.cat([round8(weight, cast) for weight in self.split(self.weight)])

    def beta(self, sparse: Tensor, how: str) -> Tensor:
        """[rows, 1], one value a layer: |W| / |S|, or <W, S> / <S, S> for "mse"."""
        of_layer = [
            torch.zeros(len(self.linears), device=sparse.device).index_add_(0, self.layer, product.sum(1).float())
            for product in (self.weight * (sparse if how == "mse" else self.weight), sparse * sparse)
        ]
        ratio = of_layer[0] / of_layer[1]
        return (ratio if how == "mse" else ratio.sqrt())[self.layer, None].to(sparse.dtype)


def write(values: Tensor, mask: Tensor, beta: Tensor | float, out: Tensor) -> None:
    """out = beta * values where the mask keeps them, else 0; all [rows, K]."""
    out.copy_(torch.where(mask, values * beta, 0))


class Weights:
    """All linears of the blocks: `named` ones follow the recipe, the others are dense.

    dtype: the compute dtype; backend: of torch.compile, None for no compiling.
    """

    def __init__(
        self, named: Iterable[Linear], others: Iterable[Linear], dtype: torch.dtype, backend: str | None = None
    ) -> None:
        self.named, self.others = _stacks(named, dtype), _stacks(others, dtype)
        linears = [linear for stack in self.named + self.others for linear in stack.linears]
        self.seeds = torch.zeros(len(linears), 1, dtype=torch.int32, device=linears[0].weight.device)
        for linear, seed in zip(linears, self.seeds, strict=True):
            linear.seed = seed
        self.recipe, self.age = Recipe(), 0
        functions = find_mask, soften, write
        if backend:
            functions = tuple(torch.compile(function, backend=backend, dynamic=False) for function in functions)
        self._find_mask, self._soften, self._write = functions

    def begin(self, recipe: Recipe) -> None:
        """From the next `prepare` on, by this recipe."""
        self.recipe, self.age = recipe, 0
        for stack in self.named:
            for linear in stack.linears:
                linear.grad_input = "mvue" if recipe.grad_input == "mvue" else "plain"
                linear.grad_weight = "mvue" if recipe.grad_weight == "mvue" else "plain"
                linear.float8 = recipe.float8

    @torch.no_grad()
    def prepare(self) -> None:
        """Fill what the GEMMs of the next step read, and draw new seeds."""
        self.seeds.random_()
        for stack in self.others:
            stack.output.value.copy_(stack.weight)
            stack.grad_input.value.copy_(stack.weight)
        casts = FLOAT8[self.recipe.float8]
        for stack in self.named:
            values = stack.rounded(casts.weight)
            self._fill(stack, stack.output, self.recipe.mask, values)
            if self.recipe.grad_input == "same" and casts.weight == casts.weight_for_grad_input:
                stack.grad_input.value.copy_(stack.output.value)
            else:
                kind = {"same": self.recipe.mask, "dense": "none", "mvue": "none"}.get(
                    self.recipe.grad_input, self.recipe.grad_input
                )
                self._fill(stack, stack.grad_input, kind, stack.rounded(casts.weight_for_grad_input))
        self.age += 1

    def _fill(self, stack: Stack, operand: Operand, kind: str, values: Tensor) -> None:
        if kind == "none":
            operand.value.copy_(values)
            return
        if kind.startswith("soft"):
            values, operand.mask = self._soften(stack.weight, kind)
        elif self.age % self.recipe.refresh == 0:
            operand.mask = self._find_mask(stack.weight, kind)
        how = self.recipe.beta
        if isinstance(how, float | int):
            if self.age == 0:
                operand.beta = torch.full_like(stack.weight[:, :1], how)
        elif how == "dynamic" or self.age == 0:
            operand.beta = stack.beta(torch.where(operand.mask, values, 0), how)
        self._write(values, operand.mask, operand.beta, operand.value)

    @torch.no_grad()
    def process_gradients(self) -> None:
        """Between backward and the optimizer: what the recipe does to the gradients of named weights."""
        recipe = self.recipe
        plain = (recipe.decay, recipe.kept, recipe.dropped) == (0, 1, 1) and recipe.grad_weight != "masked"
        if recipe.mask == "none" or plain:
            return
        for stack in self.named:
            for linear, mask in zip(stack.linears, stack.split(stack.output.mask), strict=True):
                gradient = linear.weight.grad
                if recipe.grad_weight == "masked":
                    gradient.masked_fill_(~mask, 0)
                if (recipe.kept, recipe.dropped) != (1, 1):
                    gradient.mul_(torch.where(mask, recipe.kept, recipe.dropped))
                if recipe.decay:
                    gradient.add_(linear.weight.masked_fill(mask, 0), alpha=recipe.decay)

    def masks(self) -> list[Tensor]:
        return [stack.output.mask for stack in self.named] if self.recipe.mask != "none" else []

    @torch.no_grad()
    def measures(self, before: list[Tensor]) -> dict[str, Tensor]:
        """Shares over all named weights, after backward: `kept` of the magnitude, `dropped_gradient` of the magnitude
        of gradients at dropped weights, `flips` of masks since `before`."""
        sums = {"weight": 0, "kept": 0, "gradient": 0, "dropped": 0, "flips": 0, "count": 0}
        for stack, mask, old in zip(self.named, self.masks(), before, strict=True):
            magnitude = stack.weight.abs()
            gradient = torch.cat([linear.weight.grad for linear in stack.linears]).abs()
            sums["weight"] += magnitude.sum()
            sums["kept"] += magnitude.masked_fill(~mask, 0).sum()
            sums["gradient"] += gradient.sum()
            sums["dropped"] += gradient.masked_fill(mask, 0).sum()
            sums["flips"] += (mask != old).sum()
            sums["count"] += mask.numel()
        return {
            "kept": sums["kept"] / sums["weight"],
            "dropped_gradient": sums["dropped"] / sums["gradient"],
            "flips": sums["flips"] / sums["count"],
        }


def _stacks(linears: Iterable[Linear], dtype: torch.dtype) -> list[Stack]:
    by_inputs: dict[int, list[Linear]] = {}
    for linear in linears:
        by_inputs.setdefault(linear.weight.shape[1], []).append(linear)
    return [Stack(group, dtype) for group in by_inputs.values()]
