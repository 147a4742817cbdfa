"""The commands and their flags."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..predict.gpus import known_gpus
from ..registered import VARIABLE
from .models import NoModel
from .output import NoRich

_MODEL = """\
MODEL is one of
  package.module:factory   a function without arguments that returns a model and a tuple of its inputs
  timm name                such as vit_large_patch16_224
  transformers model type  such as llama or bert, with the library's default sizes; or the path of a config.json
Weights are random and on the meta device: nothing is downloaded, and a model of any size takes no memory.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 1 where nothing can be accelerated, 2 for what cannot be done."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (NoRich, NoModel, ValueError, ModuleNotFoundError) as error:
        print(f"sparse-pass {args.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sparse-pass", description="2:4 sparse training for torch.compile.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter

    doctor = commands.add_parser(
        "doctor", help="what of this machine can be accelerated", description="Exit status 1 where nothing can be."
    )
    doctor.add_argument("--json", action="store_true", help="print JSON, which does not need rich")
    doctor.set_defaults(run=_doctor)

    explain = commands.add_parser(
        "explain",
        help="which layers of a model gain on a GPU, and how much",
        description=f"Predict for a GPU, from shipped measurements, on any machine.\n\n{_MODEL}",
        formatter_class=raw,
    )
    explain.add_argument("model", metavar="MODEL")
    _add_model_flags(explain)
    explain.add_argument("--gpu", default="h100", choices=known_gpus(), help="the GPU to predict for (%(default)s)")
    explain.add_argument("--every", action="store_true", help="a row for every layer, not one for all that are alike")
    explain.add_argument("--json", action="store_true", help="print JSON, which does not need rich")
    explain.set_defaults(run=_explain)

    bench = commands.add_parser(
        "bench",
        help="measure the GEMMs of layers on this GPU",
        description=f"Measure dense and 2:4 GEMMs of linear layers on this machine's GPU.\n\n{_MODEL}",
        formatter_class=raw,
    )
    what = bench.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--shape", type=_shape, action="append", metavar="M,K,N", help="rows, features in and out; repeat"
    )
    what.add_argument("--model", metavar="MODEL", help="the shapes of all its linears")
    _add_model_flags(bench)
    bench.add_argument("--csv", type=Path, help="write the table as CSV")
    bench.add_argument("--png", type=Path, help="plot it, which needs matplotlib")
    bench.set_defaults(run=_bench)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch", type=int, help="sequences (default 8) or images (default 64) of one step")
    parser.add_argument("--tokens", type=int, help="tokens of each sequence (default 2048, or the most a model takes)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a size of the model")
    parser.add_argument("--config", help=f"JSON or YAML file, as for {VARIABLE}; without it one is suggested")
    parser.add_argument(
        "--scheme", default="WeightSparsity",
        help="of what is suggested: a name such as GradientSparsity, or JSON such as"
        ' \'{"WeightSparsity": {"grad_weight": "mvue"}}\'',
    )  # fmt: skip


def _shape(text: str) -> tuple[int, int, int]:
    try:
        m, k, n = (int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected three sizes M,K,N such as 16384,4096,14336") from None
    if min(m, k, n) < 1 or k % 64 or n % 64:
        raise argparse.ArgumentTypeError(f"{text!r}: M must be positive, and K and N multiples of 64 for 2:4 kernels")
    return m, k, n


def _doctor(args: argparse.Namespace) -> int:
    from ..doctor import diagnose
    from . import output

    found = None
    if not args.json:
        output.console()  # says that rich is missing before anything is asked of the GPU
    found = diagnose()
    if args.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        output.show_diagnosis(found)
    return 0 if found.accelerated else 1


def _explain(args: argparse.Namespace) -> int:
    from . import output
    from .plan import planned

    if not args.json:
        output.console()
    config, report = planned(args, args.gpu)
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        output.show_forecast(report, config, every=args.every)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from . import bench, output

    output.console()
    return bench.run(args)
