"""The operators of the rewritten graphs: saved programs and the graphs of other tools hold these names and schemas."""

from __future__ import annotations

import pytest
import torch

import sparse_pass.one_graph  # noqa: F401  (registers the operators)

SCHEMAS = {
    "float8_inverse": "(Tensor scale, Tensor other) -> Tensor",
    "float8_scale": "(Tensor tensor, float factor=1.) -> Tensor",
    "grad_input": "(Tensor packed, Tensor weight, SymInt rows, *, bool tuned=False) -> Tensor",
    "grad_weight": "(Tensor packed, Tensor input, SymInt out_features, *, bool tuned=False) -> Tensor",
    "grad_weight_t": "(Tensor packed, Tensor input_t, SymInt out_features, *, bool tuned=False) -> Tensor",
    "input_grad_weight": "(Tensor packed_t, Tensor grad_output, SymInt in_features, *, bool tuned=False) -> Tensor",
    "input_linear": "(Tensor packed, Tensor weight, SymInt rows, *, bool tuned=False) -> Tensor",
    "input_mask24": "(Tensor input, str mask) -> Tensor",
    "linear": "(Tensor input, Tensor packed, Tensor? bias, SymInt out_features, *, bool tuned=False) -> Tensor",
    "mask24": "(Tensor weight, str mask) -> Tensor",
    "mvue24": "(Tensor grad, Tensor seed) -> Tensor",
    "quantize_float8": "(Tensor tensor, Tensor scale) -> Tensor",
    "round_float8": "(Tensor tensor, Tensor scale) -> Tensor",
    "sparsify": "(Tensor weight, str mask, *, ScalarType? dtype=None, float scale=1.) -> (Tensor, Tensor)",
    "sparsify_float8": "(Tensor weight, Tensor scale, str mask, float factor=1.) -> (Tensor, Tensor)",
    "sparsify_input": "(Tensor input, Tensor? gate, str mask, str activation) -> (Tensor, Tensor)",
    "sparsify_mvue": "(Tensor grad, Tensor seed) -> Tensor",
    "sparsify_mvue_float8": "(Tensor grad, Tensor seed, Tensor scale) -> (Tensor, Tensor)",
    "sparsify_mvue_sum": "(Tensor grad, Tensor seed) -> (Tensor, Tensor)",
    "sparsify_one": "(Tensor weight, str mask, bool transposed, *, ScalarType? dtype=None, float scale=1.) -> Tensor",
}


def test_there_are_no_others() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sparse_pass::")}
    assert names == {f"sparse_pass::{name}" for name in SCHEMAS}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name: str) -> None:
    op = getattr(torch.ops.sparse_pass, name).default
    assert str(op._schema) == f"sparse_pass::{name}{SCHEMAS[name]}"
    assert torch.Tag.pt2_compliant_tag in op.tags
    assert not op._schema.is_mutable
