"""Linear, activation, Linear: forward and backward, compiled dense against the pass, and the route without it.

The columns ``s24_inp_sparsify24`` and ``s24_inp_clone`` are the bounds of the original work: what a step costs
that only sparsifies both weights, and one that only clones them.
"""

from __future__ import annotations

import itertools

import pandas as pd
import torch
import torch.nn.functional as F
from measure import arguments, bars, captured, microseconds, peak_gib, race, save
from naive import naive_linear
from torch import nn

import sparse_pass as sp

W24, MVUE, ACT24 = sp.WeightSparsity(), sp.WeightSparsity(grad_weight="mvue"), sp.ActivationSparsity()
VARIANTS = {
    "w24": {"fc1": W24, "fc2": W24},
    "w24+mvue": {"fc1": MVUE, "fc2": MVUE},
    "act24": {"fc2": ACT24},
    "w24+act24": {"fc1": W24, "fc2": (ACT24, W24)},
}
SHAPES = [
    (44160, 1024, 4096),
    (16384, 4096, 14336),
    (16384, 2048, 8192),
    (13008, 1024, 4096),
]


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


ACTIVATIONS = {"gelu": F.gelu, "squared_relu": squared_relu}


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = ACTIVATIONS[activation]
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


def _naive(model: MLP, x: torch.Tensor) -> torch.Tensor:
    hidden = model.act(naive_linear(x, model.fc1.weight, model.fc1.bias))
    return naive_linear(hidden, model.fc2.weight, model.fc2.bias)


def _step(run, model: nn.Module, x: torch.Tensor, grad: torch.Tensor):
    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        run(x).backward(grad)
        x.grad = None
        model.zero_grad(set_to_none=True)

    return step


def measure(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    mode: str,
    activation: str,
    variants: list[str],
    seconds: float,
    naive: bool,
) -> list[dict[str, object]]:
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    rows, dim, hidden = shape
    model = MLP(dim, hidden, activation).to("cuda", dtype)
    x = torch.randn(rows, dim, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(rows, dim, device="cuda", dtype=dtype)
    backends = {name: sp.sparse_backend(VARIANTS[name], model=model) for name in variants}
    steps = {"dense": _step(torch.compile(model, mode=mode), model, x, grad)}
    for name, backend in backends.items():
        steps[name] = _step(torch.compile(model, backend=backend, mode=mode), model, x, grad)
    times = race(steps, seconds)
    # Twice: the spread shows what a difference is worth.
    again = race(steps, seconds)
    # CUDA graphs keep their memory: what a step needs is not to be seen there.
    peaks = {name: peak_gib(step) if mode == "default" else float("nan") for name, step in steps.items()}
    weights = (model.fc1.weight.detach(), model.fc2.weight.detach())
    bounds = {
        "s24_inp_sparsify24 us": lambda: [torch.ops.sparse_pass.sparsify(w, "optimal") for w in weights],
        "s24_inp_clone us": lambda: [w.clone() for w in weights],
    }
    shared = {
        **(
            {"naive _cslt us, eager": microseconds(_step(lambda x: _naive(model, x), model, x, grad), seconds / 4)}
            if naive
            else {}
        ),
        **{name: microseconds(captured(step).replay, seconds / 4) for name, step in bounds.items()},
    }
    found = [
        {
            "M, dim, hidden": f"{rows}, {dim}, {hidden}",
            "dtype": str(dtype).removeprefix("torch."),
            "mode": mode,
            "activation": activation,
            "variant": name,
            "dense us": times["dense"],
            "us": times[name],
            "speedup": times["dense"] / times[name],
            "speedup again": again["dense"] / again[name],
            **shared,
            "peak dense GiB": peaks["dense"],
            "peak GiB": peaks[name],
            "kernels": " ".join(
                f"{s.fqn}:{s.output}/{s.grad_input}/{s.grad_weight}{f' of {s.fused}' if s.fused else ''}"
                for s in backend.report.sites
            ),
        }
        for name, backend in backends.items()
    ]
    print(pd.DataFrame(found).round(3).to_string(index=False), flush=True)
    return found


def original_table(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of 2:4 weights, with the columns of the original work, microseconds."""
    names = {
        "M, dim, hidden": "M, dim, hidden",
        "dtype": "dtype",
        "mode": "mode",
        "activation": "activation",
        "dense us": "dense",
        "us": "2:4 weights",
        "s24_inp_sparsify24 us": "s24_inp_sparsify24",
        "s24_inp_clone us": "s24_inp_clone",
    }
    return table[table["variant"] == "w24"].rename(columns=names)[list(names.values())]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--modes", nargs="+", default=["default", "reduce-overhead"])
    parser.add_argument("--activations", nargs="+", default=list(ACTIVATIONS), choices=list(ACTIVATIONS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--shapes", nargs="+", type=int, default=list(range(len(SHAPES))), help="numbers of SHAPES")
    parser.add_argument("--no-naive", dest="naive", action="store_false", help="without the route by torch._cslt_*")
    parser.add_argument("--name", default="mlp", help="name of the result files")
    args = parser.parse_args()
    about = (
        "MLP forward and backward, GPU microseconds a step (median), input needs its gradient; act24: the second layer."
    )
    rows: list[dict[str, object]] = []
    for dtype, mode, activation, shape in itertools.product(args.dtypes, args.modes, args.activations, args.shapes):
        of = SHAPES[shape], getattr(torch, dtype), mode, activation
        rows += measure(*of, args.variants, args.seconds, args.naive)
        table = pd.DataFrame(rows).round(3)
        save(table, args.name, args.out, about)  # after each: the last one may take long
        bars(table, ["M, dim, hidden", "dtype", "mode", "activation"], "variant", "speedup", args.name, args.out)
    if "w24" in args.variants:
        about = "GPU microseconds a step, in the columns of the original work: a row for a table of GPUs."
        save(original_table(table), f"{args.name}_original", args.out, about)


if __name__ == "__main__":
    main()
