"""Every packed layout on this GPU: whether it is right, and what packing and a product cost by it.

``ratio`` is S(W) and S(W)^T over two calls of the library's compress, of the masked weight and of its transpose, which
are there already. Host times are of launches that the GPU does not wait for.
"""

from __future__ import annotations

import pandas as pd
import torch
from kernels import WEIGHTS, host, normal, replayed
from measure import arguments, bars, microseconds, save
from torch import Tensor

from sparse_pass.kernels import backends, compressor, probe, sparsify
from sparse_pass.kernels.backends import Backend

DEVICE = torch.device("cuda")


def choice(dtype: torch.dtype) -> pd.DataFrame:
    """What the probe says of each layout, and which it takes."""
    taken = probe.backend(DEVICE, dtype)
    why = {text.partition(":")[0]: text.partition(": ")[2] for text in probe.reasons(DEVICE, dtype)}
    rows = []
    for one in backends.BACKENDS:
        state = "taken" if one is taken else why.get(one.name, "right or not asked")
        rows.append({"layout": one.name, "dtype": str(dtype).removeprefix("torch."), "probe": state})
    return pd.DataFrame(rows)


def right(dtype: torch.dtype) -> list[Backend]:
    """The layouts that are right here, each tried by itself."""
    index = torch.cuda.current_device()
    return [one for one in backends.BACKENDS if probe._first_right([one], index, dtype)[0] is not None]


def compress_both(masked: Tensor, masked_t: Tensor) -> object:
    return compressor.pack(masked), compressor.pack(masked_t)


def packing(seconds: float, dtype: torch.dtype, layouts: list[Backend]) -> pd.DataFrame:
    rows = []
    for n, k in WEIGHTS:
        weight = normal(n, k, dtype=dtype)
        masked = weight * sparsify.mask24(weight, "optimal")
        masked_t = masked.T.contiguous()
        # Not from a graph: nobody promises that the library's compress can be captured.
        alone = microseconds(lambda m=masked, t=masked_t: compress_both(m, t), seconds)
        for one in layouts:
            pack = one.packer("sparsify", dtype)
            if pack is None:
                us = microseconds(lambda m=masked, t=masked_t, by=one.pack: (by(m), by(t)), seconds)
            else:
                us = microseconds(lambda w=weight, by=pack: by(w, "optimal", dtype), seconds)
            row = {"layout": one.name, "N": n, "K": k, "both ways us": us, "two compress us": alone}
            rows.append({name: round(v, 1) if isinstance(v, float) else v for name, v in row.items()})
            rows[-1]["ratio"] = round(us / alone, 3)
    return pd.DataFrame(rows)


def products(seconds: float, dtype: torch.dtype, layouts: list[Backend]) -> pd.DataFrame:
    """[M, K] x [N, K]^T: by the host's clock where the GPU has next to nothing to do, and GPU time of a large one."""
    rows = []
    for m, n, k in ((256, 256, 256), (16384, 4096, 4096)):
        weight, x, bias = normal(n, k, dtype=dtype), normal(m, k, dtype=dtype), normal(n, dtype=dtype)
        dense = weight * sparsify.mask24(weight, "optimal")
        steps = {"dense": lambda x=x, d=dense, b=bias: torch.nn.functional.linear(x, d, b)}
        for one in layouts:
            packed = one.pack(dense)
            steps[one.name] = lambda x=x, p=packed, b=bias, n=n, by=one: by.multiply("linear", x, p, n, b, True)
        for name, step in steps.items():
            # torch's own calls make their plans while they run: what a graph would replay is not what they take.
            by_torch = name == "compress"
            us = microseconds(step, seconds) if by_torch else replayed(step, seconds)
            rows.append(
                {"layout": name, "M": m, "N": n, "K": k, "host us": round(host(step), 1), "GPU us": round(us, 1)}
            )
    return pd.DataFrame(rows)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16
    layouts = right(dtype)
    save(choice(dtype), "layouts", args.out, "What the probe finds of each packed layout, in the order it tries them.")
    table = packing(args.seconds / 2, dtype, layouts)
    save(table, "layouts_packing", args.out, "S(W) and S(W)^T from W, bfloat16, optimal; against two compress calls.")
    bars(table, ["N", "K"], "layout", "ratio", "layouts_packing", args.out)
    with torch.no_grad():
        table = products(args.seconds / 2, dtype, layouts)
    save(table, "layouts_products", args.out, "One product with a bias, bfloat16; host: of 200 launches in a row.")


if __name__ == "__main__":
    main()
