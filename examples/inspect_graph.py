"""What the pass does to a joint forward and backward graph: before, after, and the report.

python examples/inspect_graph.py              # what this machine computes
python examples/inspect_graph.py --kernels    # the sparse ops, on a CPU as reference kernels

Either takes about ten seconds.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence

import arguments
import torch
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

import sparse_pass as sp


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 256)
        self.fc2 = nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Recorder(CustomGraphPass):
    """A graph pass around another one that keeps the graph from before and after it, as text."""

    def __init__(self, inner: CustomGraphPass) -> None:
        self.inner = inner
        self.before: list[str] = []
        self.after: list[str] = []

    def __call__(self, graph: Graph) -> None:
        self.before = listing(graph)
        self.inner(graph)
        self.after = listing(graph)

    def uuid(self) -> None:
        """None: never from a compile cache, or there would be nothing to record."""
        return None


def listing(graph: Graph) -> list[str]:
    """One line a call: `mm = aten.mm(view, permute)  # fc1`."""
    lines = []
    for node in graph.nodes:
        if node.op == "call_function":
            name = getattr(node.target, "_overloadpacket", None) or node.target.__name__
            lines.append(f"{node} = {name}({', '.join(map(str, node.args))}){layer_of(node)}")
        elif node.op == "output":
            lines.append(f"return {node.args[0]}")
    return lines


def layer_of(node: Node) -> str:
    forward, backward = node.meta.get("nn_module_stack"), node.meta.get("fwd_nn_module_stack")
    stack = forward or backward
    if not stack:
        return ""
    path = list(stack.values())[-1][0].removeprefix("L['self']").removeprefix(".")
    return f"  # {path}{'' if forward else ' backward'}" if path else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pattern", default="fc1", help="layers to make sparse (default: fc1)")
    parser.add_argument("--device", type=arguments.device, choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help='backend="cusparselt", also on a CPU (slow, for a look)',
    )
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.kernels or args.device == "cuda" else torch.float32
    model = MLP().to(args.device, dtype)
    x = torch.randn(128, 64, device=args.device, dtype=dtype, requires_grad=True)
    config = {args.pattern: sp.WeightSparsity(backend="cusparselt" if args.kernels else "auto")}

    try:
        sp.sparse_backend(config, model=model)
    except ValueError as error:
        parser.error(f"--pattern: {error}")

    recorder = Recorder(sp.SparsePass(config))
    compiled = torch.compile(model, options={"joint_custom_pre_pass": recorder})
    compiled(x).sum().backward()

    print("The joint graph before (-) and after (+):\n")
    for line in difflib.unified_diff(recorder.before, recorder.after, n=999, lineterm=""):
        if not line.startswith(("---", "+++", "@@")):
            print(line)
    print("\nThe same without compiling or training, sp.explain(model, config)(x):\n")
    print(sp.explain(model, config)(x))


if __name__ == "__main__":
    main()
