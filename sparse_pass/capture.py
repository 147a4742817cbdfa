"""Trace a graph of Dynamo to ATen without compiling it: for `explain`, `inner="aot_eager"` and warm caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.fx import GraphModule

from .graph_pass import SparsePass


def compile_aot_eager(graph_module: GraphModule, inputs: Sequence[Any], sparse_pass: SparsePass) -> Callable[..., Any]:
    """AOTAutograd with the pass on its joint or inference graph; the result runs op by op."""
    return _trace(graph_module, inputs, sparse_pass, {})


def report_graph(graph_module: GraphModule, sparse_pass: SparsePass) -> None:
    """Run the pass on what Inductor would show it, for the report alone. Takes ownership of the graph."""
    from torch._inductor.decomposition import select_decomp_table

    # The fake inputs of Dynamo, not the real ones: those would be faked again, with other symbolic dims.
    inputs = [node.meta["example_value"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    # A context of its own: the one of the compilation in progress must not learn from this second trace.
    with tracing(TracingContext(detect_fake_mode(inputs))):
        _trace(graph_module, inputs, sparse_pass, {"decompositions": select_decomp_table()})


def copy_graph(graph_module: GraphModule) -> GraphModule:
    """A copy that survives a compiler that takes ownership of ``graph_module``. Tensors are shared."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    for node in graph.nodes:
        node.meta.pop("grapharg", None)  # holds the real parameter, which must be free to go
    copied = GraphModule(graph_module, graph)
    copied.meta = dict(graph_module.meta)
    return copied


def _trace(
    graph_module: GraphModule,
    inputs: Sequence[Any],
    sparse_pass: SparsePass,
    options: dict[str, Any],
) -> Callable[..., Any]:
    def run_op_by_op(aten: GraphModule, _: Sequence[Any]) -> Any:
        return make_boxed_func(aten.forward)

    def inference(aten: GraphModule, example_inputs: Sequence[Any]) -> Any:
        sparse_pass(aten.graph)
        aten.recompile()
        return run_op_by_op(aten, example_inputs)

    def partition(joint: GraphModule, joint_inputs: Sequence[Any], **kwargs: Any) -> tuple[GraphModule, GraphModule]:
        sparse_pass(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)

    compiler = aot_autograd(
        fw_compiler=run_op_by_op,
        bw_compiler=run_op_by_op,
        inference_compiler=inference,
        partition_fn=partition,
        keep_inference_input_mutations=True,
        **options,
    )
    return compiler(graph_module, inputs)
