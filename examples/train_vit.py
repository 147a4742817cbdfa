"""A tiny vision transformer on scikit-learn's digits: accuracy dense and 2:4 sparse.

    python examples/train_vit.py       # about half a minute on a CPU

The sparse model names its layers by a regular expression that also reaches the [10, 64] head, whose
10 outputs are not a multiple of 4: it stays dense, and the report says so.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence

import arguments
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import sparse_pass as sp


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Digits [batch, 8, 8] in 16 patches of 2x2 -> logits [batch, 10]."""

    def __init__(self, dim: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(4, dim)
        self.position = nn.Parameter(0.02 * torch.randn(16, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        x = self.blocks(self.embed(patches) + self.position)
        return self.head(self.norm(x).mean(1))


def train(
    name: str,
    model: ViT,
    forward: Callable[[Tensor], Tensor],
    data: Sequence[Tensor],
    args: argparse.Namespace,
) -> tuple[float, float]:
    """Train `model` through `forward`, its compiled callable; test accuracy and median step in ms."""
    train_images, test_images, train_labels, test_labels = data
    batches = len(train_images) // args.batch
    steps = args.epochs * batches
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=steps)
    generator = torch.Generator().manual_seed(args.seed)  # the same batches in every run
    seconds = []
    with tqdm(total=steps, desc=f"{name:>6}", unit="step", disable=None) as progress:
        for _ in range(args.epochs):
            order = torch.randperm(len(train_images), generator=generator)
            for chosen in order.split(args.batch)[:batches]:
                begin = time.perf_counter()
                loss = F.cross_entropy(forward(train_images[chosen]), train_labels[chosen])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                seconds.append(time.perf_counter() - begin)
                progress.update()
            progress.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    with torch.no_grad():
        predicted = torch.cat([forward(some).argmax(-1) for some in test_images.split(args.batch)])
    return (predicted == test_labels).float().mean().item(), 1e3 * statistics.median(seconds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=arguments.positive, default=20)
    parser.add_argument("--batch", type=arguments.positive, default=64)
    parser.add_argument("--depth", type=arguments.positive, default=2)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument(
        "--inner",
        choices=("inductor", "aot_eager"),
        default="inductor",
        help="compiler below the pass; aot_eager runs op by op and needs no C++ compiler",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    data = train_test_split(images, labels, test_size=320, random_state=0, stratify=labels)
    if args.batch > len(data[0]):
        parser.error(f"--batch {args.batch} is more than the {len(data[0])} training images")

    torch.manual_seed(args.seed)
    dense_model = ViT(depth=args.depth)
    sparse_model = copy.deepcopy(dense_model)

    config = {
        r"re:blocks\..*|head": sp.WeightSparsity(),  # every linear of the blocks, and the head
        "blocks.0.attn.in_proj_weight": None,  # but not this one: exact names beat patterns
    }
    backend = sp.sparse_backend(config, model=sparse_model, inner=args.inner)
    dense = torch.compile(dense_model, backend=args.inner)
    sparse = torch.compile(sparse_model, backend=backend)
    results = {
        "dense": train("dense", dense_model, dense, data, args),
        "sparse": train("sparse", sparse_model, sparse, data, args),
    }

    print(backend.report)
    table = Table(title=f"Digits, {args.epochs} epochs, {len(data[1])} test images")
    table.add_column("model")
    table.add_column("test accuracy", justify="right")
    table.add_column("median step", justify="right")
    for name, (accuracy, milliseconds) in results.items():
        table.add_row(name, f"{accuracy:.1%}", f"{milliseconds:.1f} ms")
    Console().print(table)


if __name__ == "__main__":
    main()
