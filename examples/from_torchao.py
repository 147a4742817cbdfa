"""From torchao's sparse training to sparse_pass.

    python examples/from_torchao.py    # about fifteen seconds on a CPU

torchao (to 0.18) swapped the modules of a model for sparse ones and back:

    swap_linear_with_semi_sparse_linear(model, {"0": SemiSparseLinear})
    ...  # train
    swap_semi_sparse_linear_with_linear(model)

Here the model is left alone and the scheme goes to the compiler; to go back there is nothing to do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import arguments
import torch
from torch import nn

import sparse_pass as sp


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", type=arguments.device, choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=arguments.positive, default=50)
    args = parser.parse_args(argv)
    dtype = torch.float16 if args.device == "cuda" else torch.float32

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))
    model.to(args.device)

    # A name that is not in the model was ignored there: nothing became sparse. Here it is an error.
    try:
        sp.sparse_backend({"seq.0": sp.WeightSparsity()}, model=model)
    except ValueError as error:
        print(f"ValueError: {error}\n")

    backend = sp.sparse_backend({"0": sp.WeightSparsity()}, model=model)
    sparse = torch.compile(model, backend=backend)

    # An ordinary training loop: learn a fixed random map.
    target = torch.randn(256, 256, device=args.device) / 16
    x = torch.randn(1024, 256, device=args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(args.steps):
        with torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32):
            loss = (sparse(x) - x @ target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % max(1, args.steps // 5) == 0 or step == args.steps - 1:
            print(f"step {step:3d}  loss {loss.item():.4f}")
    print(f"\n{backend.report}\n")

    # Back to dense: the modules, parameters and state_dict were never anything else.
    assert type(model[0]) is nn.Linear
    with torch.no_grad():
        y = x @ target
        print(f"dense again, the same parameters:  loss {(model(x) - y).square().mean():.4f}")
        sp.prune_(model, {"0": sp.WeightSparsity()})
        kept = (model[0].weight.view(-1, 4) != 0).sum(-1).max().item()
        print(f"pruned in place, for deployment:   loss {(model(x) - y).square().mean():.4f}")
        print(f"at most {kept} of any 4 weights in a row of layer 0 are not zero")


if __name__ == "__main__":
    main()
