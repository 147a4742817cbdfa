"""All operators of the rewritten graphs, `torch.ops.sparse_pass.*`.

Of weights W [N, K], inputs X [M, K] and gradients dY [M, N]; Mp is M rounded up to a multiple of 64:

    mask24            W -> bool [N, K]                   input_mask24       X [..., K] -> bool [..., K]
    mvue24            dY -> MVUE(dY) [M, N], dense
    sparsify          W -> S(W) [N, K] and S(W)^T [K, N], packed
    sparsify_one      W -> one of the two
    sparsify_input    X -> S(x) [Mp, K] and S(x)^T [K, Mp], packed       x = activation(X), or of X and a gate
    sparsify_mvue     dY -> MVUE(dY)^T [N, Mp], packed
    sparsify_mvue_sum the same, and sums of dY over 64 rows each, float32 [Mp / 64, N], for the gradient of a bias
    linear            X, S(W) -> X S(W)^T + b [M, N]     grad_weight        MVUE(dY)^T, X -> MVUE(dY)^T X [N, K]
    input_linear      S(x), W -> S(x) W^T [M, N]         input_grad_weight  S(x)^T, dY -> dY^T S(x) [N, K]

MVUE keeps two of every four along M, at random, right in expectation (`reference.gradients`); its seed, an int64 tensor
of one element on the device of dY, decides all that is random. All are functional and take any strides. They have no
derivative: the pass rewrites graphs that already hold their backward. The CPU kernels are the reference and use the
byte layout of the GPU kernels (`reference.weights.pack`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..vocabulary import KERNEL_TILE, PRODUCTS, Form, packed_numel, padded
from . import checks, cuda
from .define import Kernels, define
from .reference import gradients, inputs, weights
from .reference.products import product
from .shards import is_sharded, mask_of_shards


def mask24(weight: Tensor, mask: str = "optimal") -> Tensor:
    """Return the transposable 2:4 mask of a weight: bool [N, K], at most two True of four along rows and columns.

    weight: [N, K] floating point, N and K multiples of 4, any device and strides. mask: "optimal", the largest sum of
    magnitudes of all such masks of a 4x4 tile, or "greedy", torch core's `largest_abs_values_greedy`;
    `sparse_pass.ops.reference.weights.mask24` defines both, ties included. ValueError for anything else.

    The mask of a DTensor is a DTensor of the same placements: the part of the mask of the whole weight. Where shards
    end inside of a tile the weight is gathered for it, so all ranks must call this. The mask is that of the numbers as
    they are given: where training sees a rounded weight, as with FSDP2's ``MixedPrecisionPolicy``, round it first.
    """
    if is_sharded(weight):
        checks.mask24(weight, mask)  # all ranks raise, before any of them waits for another
        return mask_of_shards(weight.detach(), lambda whole: mask24(whole, mask))
    return torch.ops.sparse_pass.mask24(weight.detach(), mask)  # type: ignore[no-any-return]


def _packed(source: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return source.new_empty(packed_numel(*source.shape), dtype=dtype)


def _sums(grad: Tensor) -> Tensor:
    rows, cols = grad.shape
    return grad.new_empty(padded(rows) // KERNEL_TILE, cols, dtype=torch.float32)


# Masks, and an estimate of a gradient, as dense tensors

MASK24 = define(
    "mask24(Tensor weight, str mask) -> Tensor",
    check=checks.mask24,
    fake=lambda weight, mask: weight.new_empty(weight.shape, dtype=torch.bool),
    cpu=weights.mask24,
    cuda=cuda.mask24,
    is_mask=True,
)
INPUT_MASK24 = define(
    "input_mask24(Tensor input, str mask) -> Tensor",
    check=checks.input_mask24,
    fake=lambda input, mask: input.new_empty(input.shape, dtype=torch.bool),
    cpu=inputs.input_mask24,
    cuda=lambda input, mask: inputs.input_mask24(input, mask, cuda.mask24),
    is_mask=True,
)
MVUE24 = define(
    "mvue24(Tensor grad, Tensor seed) -> Tensor",
    check=checks.mvue24,
    fake=lambda grad, seed: grad.new_empty(grad.shape),
    cpu=gradients.mvue24,
    cuda=cuda.mvue24,
)

# Packed

SPARSIFY = define(
    "sparsify(Tensor weight, str mask, *, ScalarType? dtype=None) -> (Tensor, Tensor)",
    check=checks.sparsify,
    fake=lambda weight, mask, dtype=None: (_packed(weight, dtype), _packed(weight, dtype)),
    cpu=weights.sparsify,
    cuda=cuda.sparsify,
)
SPARSIFY_ONE = define(
    "sparsify_one(Tensor weight, str mask, bool transposed, *, ScalarType? dtype=None) -> Tensor",
    check=checks.sparsify_one,
    fake=lambda weight, mask, transposed, dtype=None: _packed(weight, dtype),
    cpu=weights.sparsify_one,
    cuda=cuda.sparsify_one,
)
SPARSIFY_INPUT = define(
    "sparsify_input(Tensor input, Tensor? gate, str mask, str activation) -> (Tensor, Tensor)",
    check=checks.sparsify_input,
    fake=lambda input, gate, mask, activation: (_packed(input), _packed(input)),
    cpu=inputs.sparsify_input,
    cuda=cuda.sparsify_input,
)
SPARSIFY_MVUE = define(
    "sparsify_mvue(Tensor grad, Tensor seed) -> Tensor",
    check=checks.sparsify_mvue,
    fake=lambda grad, seed: _packed(grad),
    cpu=gradients.sparsify_mvue,
    cuda=cuda.sparsify_mvue,
)
SPARSIFY_MVUE_SUM = define(
    "sparsify_mvue_sum(Tensor grad, Tensor seed) -> (Tensor, Tensor)",
    check=checks.sparsify_mvue,
    fake=lambda grad, seed: (_packed(grad), _sums(grad)),
    cpu=gradients.sparsify_mvue_sum,
    cuda=cuda.sparsify_mvue_sum,
)

# Products


def _define_product(form: Form, arguments: str, names: tuple[str, str]) -> Kernels:
    """names: see `checks.product`."""
    spec = PRODUCTS[form]

    def check(*args: Tensor, tuned: bool = False) -> None:
        checks.product(form, *spec.operands(*args), names)

    def fake(*args: Tensor, tuned: bool = False) -> Tensor:
        dense, _, n, _ = spec.operands(*args)
        return dense.new_empty(spec.output_shape(spec.dense_shape(*dense.shape)[0], n))  # type: ignore[no-any-return]

    def cpu(*args: Tensor, tuned: bool = False) -> Tensor:
        return product(form, *spec.operands(*args))

    def multiply(*args: Tensor, tuned: bool = False) -> Tensor:
        return cuda.product(form, *spec.operands(*args), tuned)

    schema = f"{spec.op}({arguments}, *, bool tuned=False) -> Tensor"
    return define(schema, check=check, fake=fake, cpu=cpu, cuda=multiply)


LINEAR = _define_product(
    "linear", "Tensor input, Tensor packed, Tensor? bias, SymInt out_features", ("input [M, K]", "out_features")
)
GRAD_WEIGHT = _define_product(
    "grad_weight", "Tensor packed, Tensor input, SymInt out_features", ("input [M, K]", "out_features")
)
INPUT_LINEAR = _define_product("input", "Tensor packed, Tensor weight, SymInt rows", ("weight [N, K]", "rows"))
INPUT_GRAD_WEIGHT = _define_product(
    "input_grad_weight",
    "Tensor packed_t, Tensor grad_output, SymInt in_features",
    ("grad_output [M, N]", "in_features"),
)
