"""All operators of the rewritten graphs, `torch.ops.sparse_pass.*`.

Of weights W [N, K], inputs X [M, K] and gradients dY [M, N]; Mp and Np are M and N rounded up to multiples of 64:

    mask24            W -> bool [N, K]                   input_mask24       X [..., K] -> bool [..., K]
    mvue24            dY -> MVUE(dY) [M, N], dense
    float8_scale      T -> its scale, a power of two: float32, no dims
    float8_inverse    of two scales, 1 / (s s')
    quantize_float8   T, scale -> q(T), float8     round_float8   the same, back in the dtype of T
    sparsify          W -> scale S(W) [N, K] and its transpose [K, N], packed
    sparsify_one      W -> one of the two          sparsify_float8   W, scale -> S(q(W)) and its transpose, packed
    sparsify_input    X -> S(x) [Mp, K] and S(x)^T [K, Mp], packed       x = activation(X), or of X and a gate
    sparsify_mvue     dY -> MVUE(dY)^T [Np, Mp], packed
    sparsify_mvue_float8  dY, scale -> q(MVUE(dY))^T, packed, and q(dY)
    sparsify_mvue_sum the same, and sums of dY over 64 rows each, float32 [Mp / 64, N], for the gradient of a bias
    linear            X, S(W) -> X S(W)^T + b [M, N]     grad_weight        MVUE(dY)^T, X -> MVUE(dY)^T X [N, K]
                                                         grad_weight_t      the same of MVUE(dY)^T and X^T
    input_linear      S(x), W -> S(x) W^T [M, N]         input_grad_weight  S(x)^T, dY -> dY^T S(x) [N, K]
    grad_input        MVUE(dY^T)^T, W -> MVUE(dY^T)^T W [M, K]

MVUE keeps two of every four along its first dim, at random, right in expectation (`reference.gradients`): of dY along
M, over which grad_weight contracts, of dY^T along N, over which grad_input does. Its seed, an int64 tensor of one
element on the device of dY, decides all that is random. All are functional and take any strides. They have no
derivative: the pass rewrites graphs that already hold their backward. The CPU kernels are the reference and use the
byte layout of the GPU kernels (`reference.weights.pack`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..vocabulary import FLOAT8, KERNEL_TILE, PRODUCTS, Form, output_dtype, packed_numel, padded
from . import checks, cuda
from .define import Kernels, define
from .reference import float8, gradients, inputs, weights
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
    rows, cols = source.shape
    return source.new_empty(packed_numel(rows, cols, dtype or source.dtype), dtype=dtype)


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

# Float8

FLOAT8_SCALE = define(
    "float8_scale(Tensor tensor, float factor=1.0) -> Tensor",
    check=checks.float8_scale,
    fake=lambda tensor, factor=1.0: tensor.new_empty([], dtype=torch.float32),
    cpu=float8.scale,
    cuda=float8.scale,
)
FLOAT8_INVERSE = define(
    "float8_inverse(Tensor scale, Tensor other) -> Tensor",
    check=checks.float8_inverse,
    fake=lambda scale, other: torch.empty_like(scale),
    cpu=float8.inverse,
    cuda=float8.inverse,
)
ROUND_FLOAT8 = define(
    "round_float8(Tensor tensor, Tensor scale) -> Tensor",
    check=checks.round_float8,
    fake=lambda tensor, scale: torch.empty_like(tensor),
    cpu=float8.rounded,
    cuda=float8.rounded,
)

QUANTIZE_FLOAT8 = define(
    "quantize_float8(Tensor tensor, Tensor scale) -> Tensor",
    check=checks.round_float8,
    fake=lambda tensor, scale: torch.empty_like(tensor, dtype=FLOAT8),
    cpu=float8.quantize,
    cuda=float8.quantize,
)

# Packed

SPARSIFY = define(
    "sparsify(Tensor weight, str mask, *, ScalarType? dtype=None, float scale=1.0) -> (Tensor, Tensor)",
    check=checks.sparsify,
    fake=lambda weight, mask, dtype=None, scale=1.0: (_packed(weight, dtype), _packed(weight, dtype)),
    cpu=weights.sparsify,
    cuda=cuda.sparsify,
)
SPARSIFY_ONE = define(
    "sparsify_one(Tensor weight, str mask, bool transposed, *, ScalarType? dtype=None, float scale=1.0) -> Tensor",
    check=checks.sparsify_one,
    fake=lambda weight, mask, transposed, dtype=None, scale=1.0: _packed(weight, dtype),
    cpu=weights.sparsify_one,
    cuda=cuda.sparsify_one,
)
SPARSIFY_FLOAT8 = define(
    "sparsify_float8(Tensor weight, Tensor scale, str mask, float factor=1.0) -> (Tensor, Tensor)",
    check=checks.sparsify_float8,
    fake=lambda weight, scale, mask, factor=1.0: (_packed(weight, FLOAT8), _packed(weight, FLOAT8)),
    cpu=float8.sparsify,
    cuda=cuda.sparsify_float8,
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
    fake=lambda grad, seed: grad.new_empty(packed_numel(grad.shape[0], padded(grad.shape[1]))),
    cpu=gradients.sparsify_mvue,
    cuda=cuda.sparsify_mvue,
)
SPARSIFY_MVUE_FLOAT8 = define(
    "sparsify_mvue_float8(Tensor grad, Tensor seed, Tensor scale) -> (Tensor, Tensor)",
    check=checks.sparsify_mvue_float8,
    fake=lambda grad, seed, scale: (_packed(grad, FLOAT8), grad.new_empty(grad.shape, dtype=FLOAT8)),
    cpu=float8.sparsify_mvue,
    cuda=cuda.sparsify_mvue_float8,
)
SPARSIFY_MVUE_SUM = define(
    "sparsify_mvue_sum(Tensor grad, Tensor seed) -> (Tensor, Tensor)",
    check=checks.sparsify_mvue_sum,
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
        shape = spec.output_shape(spec.dense_shape(*dense.shape)[0], n)
        return dense.new_empty(shape, dtype=output_dtype(dense.dtype))  # type: ignore[no-any-return]

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
GRAD_WEIGHT_T = _define_product(
    "grad_weight_t", "Tensor packed, Tensor input_t, SymInt out_features", ("input_t [K, M]", "out_features")
)
INPUT_LINEAR = _define_product("input", "Tensor packed, Tensor weight, SymInt rows", ("weight [N, K]", "rows"))
INPUT_GRAD_WEIGHT = _define_product(
    "input_grad_weight",
    "Tensor packed_t, Tensor grad_output, SymInt in_features",
    ("grad_output [M, N]", "in_features"),
)
GRAD_INPUT = _define_product("grad_input", "Tensor packed, Tensor weight, SymInt rows", ("weight [N, K]", "rows"))
