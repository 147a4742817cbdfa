"""Linear, GELU, Linear: forward and backward, compiled dense against the pass, and the route without it.

The columns ``s24_inp_sparsify24`` and ``s24_inp_clone`` are the bounds of the original work: what a step costs
that only sparsifies both weights, and one that only clones them.
"""

from __future__ import annotations

import pandas as pd
import torch
from measure import arguments, microseconds, peak_gib, race, save
from torch import nn

import sparse_pass as sp

SHAPES = [
    (44160, 1024, 4096),
    (16384, 4096, 14336),
    (16384, 2048, 8192),
    (13008, 1024, 4096),
]
CONFIG = {"fc1": sp.WeightSparsity(), "fc2": sp.WeightSparsity()}


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Naive(torch.autograd.Function):
    """What a user would write with torch's own `_cslt_*` calls; the masked weight is made elsewhere."""

    @staticmethod
    def forward(ctx, x, weight, kept):
        packed, ctx.packed_t = torch._cslt_compress(kept), torch._cslt_compress(kept.T.contiguous())
        ctx.save_for_backward(x)
        return torch._cslt_sparse_mm(packed, x.T, transpose_result=True)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad = grad.contiguous()
        return torch._cslt_sparse_mm(ctx.packed_t, grad.T, transpose_result=True), grad.T @ x, None


def _naive(model: MLP, x: torch.Tensor) -> torch.Tensor:
    for linear in (model.fc1, model.fc2):
        kept = torch.where(sp.mask24(linear.weight), linear.weight.detach(), 0)
        x = _Naive.apply(x, linear.weight, kept) + linear.bias
        x = model.act(x) if linear is model.fc1 else x
    return x


def _step(run, model: nn.Module, x: torch.Tensor, grad: torch.Tensor):
    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        run(x).backward(grad)
        x.grad = None
        model.zero_grad(set_to_none=True)

    return step


def measure(rows: int, dim: int, hidden: int, dtype: torch.dtype, mode: str, seconds: float) -> dict[str, object]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = MLP(dim, hidden).to("cuda", dtype)
    x = torch.randn(rows, dim, device="cuda", dtype=dtype, requires_grad=True)
    grad = torch.randn(rows, dim, device="cuda", dtype=dtype)
    backend = sp.sparse_backend(CONFIG, model=model)
    dense = _step(torch.compile(model, mode=mode), model, x, grad)
    sparse = _step(torch.compile(model, backend=backend, mode=mode), model, x, grad)
    weights = (model.fc1.weight.detach(), model.fc2.weight.detach())
    result = {
        "M, dim, hidden": f"{rows}, {dim}, {hidden}",
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
    }
    times = race({"dense": dense, "w24": sparse}, seconds)
    # Twice: the spread shows what a difference is worth.
    again = race({"dense": dense, "w24": sparse}, seconds)
    result |= {
        "dense us": times["dense"],
        "w24 us": times["w24"],
        "speedup": times["dense"] / times["w24"],
        "speedup again": again["dense"] / again["w24"],
        "naive _cslt us": microseconds(_step(lambda x: _naive(model, x), model, x, grad), seconds / 4),
        "s24_inp_sparsify24 us": microseconds(
            lambda: [torch.ops.sparse_pass.sparsify(w, "optimal") for w in weights], seconds / 4
        ),
        "s24_inp_clone us": microseconds(lambda: [w.clone() for w in weights], seconds / 4),
        "peak dense GiB": peak_gib(dense),
        "peak w24 GiB": peak_gib(sparse),
        "kernels": " ".join(f"{s.fqn}:{s.output}/{s.grad_input}" for s in backend.report.sites),
    }
    print(result, flush=True)
    return result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--modes", nargs="+", default=["default", "reduce-overhead"])
    args = parser.parse_args()
    rows = [
        measure(*shape, getattr(torch, dtype), mode, args.seconds)
        for dtype in args.dtypes
        for mode in args.modes
        for shape in SHAPES
    ]
    table = pd.DataFrame(rows).round(3)
    save(
        table, "mlp", args.out, "MLP forward and backward, GPU microseconds a step (median), input needs its gradient."
    )


if __name__ == "__main__":
    main()
