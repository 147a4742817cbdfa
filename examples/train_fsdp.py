"""Train a language model 2:4 sparse on several GPUs, or CPUs, and go on where it stopped, on any number of them.

    torchrun --nproc-per-node 2 examples/train_fsdp.py                     # CPUs, half a minute
    torchrun --nproc-per-node 4 examples/train_fsdp.py --device cuda --tp 2 --checkpoint-activations \
        --layers 24 --dim 2048 --heads 16 --context 2048 --batch 16 --lr 3e-4 --peak-tflops 989

FSDP2 shards each block, tensor parallelism (--tp) splits its linears first, and each block is compiled by itself. The
only lines about sparsity are the config and the backend. Checkpoints are those of torch.distributed.checkpoint: dense,
with the names of the model. The same command again goes on from the last one in --out; delete the folder to start anew.
The text is the source files of Python's standard library, byte by byte. A batch is a function of the step alone.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path
from typing import Any

import arguments
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sparse_pass as sp

CONFIG = {"blocks.*.fc1": sp.WeightSparsity(), "blocks.*.fc2": sp.WeightSparsity()}
# Rows of the first layers and columns of the second ones go to different ranks: each pair needs one reduction.
PLAN = dict.fromkeys(("q", "k", "v", "fc1"), ColwiseParallel) | dict.fromkeys(("proj", "fc2"), RowwiseParallel)

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # by parameter: any layout reads that of any other


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        # As many heads as this rank has.
        q, k, v = (one(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for one in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class Model(nn.Module):
    def __init__(self, layers: int, dim: int, heads: int, context: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(256, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def distributed(model: Model, mesh: DeviceMesh, args: argparse.Namespace) -> sp.backend.SparseBackend:
    """Split, compile and shard the model, in this order."""
    backend = sp.sparse_backend(CONFIG, model=model, inner=args.inner)
    for place, block in enumerate(model.blocks):
        if args.tp > 1:
            parallelize_module(block, mesh["tp"], {name: kind() for name, kind in PLAN.items()})
        block.compile(backend=backend)
        if args.checkpoint_activations:  # around the compiled block: torch 2.13 compiles no --tp in a checkpoint
            model.blocks[place] = checkpoint_wrapper(block)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if args.device == "cuda" else None)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh["dp"], mp_policy=policy)
    return backend


def batch(data: Tensor, step: int, mesh: DeviceMesh, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """This rank's part of the batch of a step, however many ranks there are."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(data) - args.context - 1, (args.batch,), generator=generator)
    mine = starts.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]
    rows = torch.stack([data[start : start + args.context + 1] for start in mine.tolist()]).long().to(args.device)
    return rows[:, :-1], rows[:, 1:]


def by_mesh(model: nn.Module) -> list[list[nn.Parameter]]:
    """Tensor parallelism leaves norms and embeddings on another mesh, and no one call takes tensors of two."""
    groups: dict[DeviceMesh, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        groups.setdefault(parameter.device_mesh, []).append(parameter)
    return list(groups.values())


def clip(groups: list[list[nn.Parameter]], largest: float) -> None:
    norms = [torch.nn.utils.get_total_norm([one.grad for one in group]).full_tensor() for group in groups]
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, largest, torch.stack(norms).norm())


class Checkpoints:
    """Model, optimizer and step, in folders that torch.distributed.checkpoint fills."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.folder, self.model, self.optimizer = folder, model, optimizer

    def _state(self, step: int) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=FLAT)
        return {"model": model, "optimizer": optimizer, "step": step}

    def save(self, step: int) -> None:
        dcp.save(self._state(step), checkpoint_id=self.folder / f"step-{step:06}")

    def load(self) -> int:
        """Returns how many steps are done: 0 if there is no checkpoint."""
        complete = sorted(self.folder.glob("step-*/.metadata"))  # written last
        if not complete:
            return 0
        state = self._state(0)
        dcp.load(state, checkpoint_id=complete[-1].parent)
        loaded = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **loaded, options=FLAT)
        return int(state["step"])


def main() -> None:
    args = parsed()
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if args.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    if ranks % args.tp or args.batch % (ranks // args.tp):
        raise SystemExit(f"{ranks} ranks and a batch of {args.batch} do not divide: ranks by --tp, --batch by the rest")
    mesh = init_device_mesh(args.device, (ranks // args.tp, args.tp), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)  # the same weights on all ranks
    model = Model(args.layers, args.dim, args.heads, args.context).to(args.device)
    backend = distributed(model, mesh, args)
    weights = sum(one.numel() for block in model.blocks for one in block.parameters() if one.dim() == 2)
    groups = by_mesh(model)
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=args.lr, fused=args.device == "cuda")
    text = b"".join(file.read_bytes() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    checkpoints, data = Checkpoints(args.out, model, optimizer), torch.frombuffer(bytearray(text), dtype=torch.uint8)
    first = checkpoints.load()
    if rank == 0 and first:
        print(f"resumed after step {first}", flush=True)
    since = time.perf_counter()
    for step in range(first + 1, args.steps + 1):
        tokens, targets = batch(data, step, mesh, args)
        loss = F.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten())
        loss.backward()
        clip(groups, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        value, now = float(mean) / ranks, time.perf_counter()
        if rank == 0:
            rate = args.batch * args.context / (now - since)
            told = f"step {step}  loss {value:.6f}  {rate:,.0f} tokens/s"
            if args.peak_tflops:  # six operations for each weight and token, of the dense matmuls
                told += f"  MFU {6 * weights * rate / ranks / args.peak_tflops / 1e12:.1%}"
            if args.device == "cuda":
                told += f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
            print(told, flush=True)
        since = now
        if step % args.save_every == 0 or step == args.steps:
            checkpoints.save(step)
    if rank == 0 and first < args.steps:
        print(backend.report)
    dist.destroy_process_group()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=arguments.device, default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tp", type=arguments.positive, default=1, help="ranks that share each linear")
    parser.add_argument("--checkpoint-activations", action="store_true", help="compute blocks again in the backward")
    sizes = {"layers": 4, "dim": 128, "heads": 4, "context": 64, "batch": 8, "steps": 30, "save-every": 10}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=arguments.positive, default=default)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--peak-tflops", type=float, default=0.0, help="dense, of one device, to print the MFU")
    parser.add_argument("--inner", choices=["inductor", "aot_eager"], default="inductor")
    parser.add_argument("--out", type=Path, default=Path("train_fsdp_out"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
