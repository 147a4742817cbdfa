"""The Triton kernels against their references, in Triton's interpreter: run by test_interpreter.py.

The results are equal bit for bit in float16; the interpreter rounds float32 to bfloat16 towards zero.
"""

from __future__ import annotations

from unittest import mock

import torch
import triton
from support import assert_same_packed, bits, split_packed
from torch import Tensor

from sparse_pass import vocabulary
from sparse_pass.kernels import memory, mvue, mvue_float8, sparsify, sparsify_float8
from sparse_pass.ops.reference import float8
from sparse_pass.ops.reference import gradients as reference_gradients
from sparse_pass.ops.reference import inputs as reference_inputs
from sparse_pass.ops.reference import weights as reference

HAS_FLOAT8 = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)
"""That of Triton 3.6 has other conversions to float8 than a GPU, where the kernels are compared as well."""
INF, NAN = float("inf"), float("nan")
HALF, BFLOAT16 = torch.float16, torch.bfloat16


def on_the_cpu(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype)


def assert_same(actual: Tensor, expected: Tensor, about: object) -> None:
    assert torch.equal(bits(actual), bits(expected)), about


def special(source: torch.dtype) -> Tensor:
    weight = torch.randn(64, 64)
    weight[3], weight[8:11, 8:12], weight[20:24, 20:24], weight[60:] = INF, NAN, 0, -0.0
    weight[40:44] *= 1e-6 if source is HALF else 1e-39  # denormal
    return weight.to(source)


def check_float8() -> None:
    for source in (HALF, torch.float32, BFLOAT16):
        weight = (torch.randn(128, 192) * torch.randn(128, 1).exp()).to(source)
        weight[3], weight[8:12, 8:12] = 0, 1e-4
        for mask, factor in (("optimal", 1.0), ("greedy", 1.0 if source is BFLOAT16 else 1.5)):
            scale = float8.scale(weight, factor)
            actual = sparsify_float8.sparsify_float8(weight, scale, mask, factor)
            for one, other in zip(actual, float8.sparsify(weight, scale, mask, factor), strict=True):
                assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), (source, mask)


def check_weights() -> None:
    for source in (torch.float32, BFLOAT16, HALF):
        weights = torch.randn(64, 256).to(source), torch.randint(-2, 3, (64, 64)).to(source).T, special(source)
        target = BFLOAT16 if source is BFLOAT16 else HALF
        for mask in vocabulary.MASKS:
            small = torch.randn(20, 132).to(source)
            assert torch.equal(sparsify.mask24(small, mask), reference.mask24(small, mask))
            for number, weight in enumerate(weights):
                about = (source, mask, number)
                assert torch.equal(sparsify.mask24(weight, mask), reference.mask24(weight, mask)), about
                both = zip(
                    sparsify.sparsify(weight, mask, target), reference.sparsify(weight, mask, target), strict=True
                )
                for transposed, (actual, expected) in enumerate(both):
                    assert_same_packed(actual, expected, about)
                    # What the library may read past its end is there, and nothing has to be copied.
                    past_end = memory.reads_past_end(weight.shape[0 if transposed else 1])
                    assert not past_end or memory.with_room(actual) is actual
        if target is HALF:  # the interpreter cuts off what a bfloat16 does not hold
            both = (kernels.sparsify(weights[0], "optimal", target, 1.105) for kernels in (sparsify, reference))
            for actual, expected in zip(*both, strict=True):
                assert_same_packed(actual, expected, (source, "scaled"))
    for transposed, expected in enumerate(reference.sparsify(weights[0], "optimal", target)):
        assert_same_packed(sparsify.sparsify_one(weights[0], "optimal", bool(transposed), target), expected, transposed)


def gradient(rows: int, cols: int) -> Tensor:
    grad = torch.randn(rows, cols) * torch.randn(rows, 1).exp()
    grad[0, 0], grad[1, 5], grad[:, 7], grad[:, 9:11] = NAN, -INF, 0, -0.0
    grad[:, 20:30] = torch.randint(-2, 3, (rows, 10))  # ties
    grad[2, 40:] *= 1e-6  # denormal
    return grad.half()


def check_gradients() -> None:
    for number, (rows, cols) in enumerate(((64, 64), (70, 64), (3, 128))):
        grad, seed = gradient(rows, cols), torch.tensor([2**40 * number + 3])
        for one in (grad, grad.T.contiguous().T):
            about = (rows, cols, one.stride())
            assert_same(mvue.mvue24(one, seed), reference_gradients.mvue24(grad, seed), about)
            assert_same_packed(mvue.sparsify_mvue(one, seed), reference_gradients.sparsify_mvue(grad, seed), about)
        finite = torch.where(grad.isfinite(), grad, 1)
        (packed, sums), expected = (kernels.sparsify_mvue_sum(finite, seed) for kernels in (mvue, reference_gradients))
        assert_same_packed(packed, expected[0], (rows, cols))
        torch.testing.assert_close(sums, expected[1])
    for odd in (gradient(70, 50), gradient(70, 64).T):  # no multiple of 64, as of a transpose; and that
        assert_same(mvue.mvue24(odd, seed), reference_gradients.mvue24(odd, seed), "odd")
        assert_same_packed(mvue.sparsify_mvue(odd, seed), reference_gradients.sparsify_mvue(odd, seed), "odd")


def check_float8_gradients() -> None:
    for grad in (gradient(128, 64), gradient(70, 52), gradient(128, 70).T[:, :68]):
        grad = torch.where(grad.isfinite(), grad, 1)
        seed, scale = torch.tensor([5]), float8.scale(grad)
        actual = mvue_float8.sparsify_mvue_float8(grad, seed, scale)
        for one, other in zip(actual, float8.sparsify_mvue(grad, seed, scale), strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), grad.shape


def check_bfloat16_gradients() -> None:
    """What is kept. Draws are made in float32."""
    grad, seed = gradient(70, 64).bfloat16(), torch.tensor([5])
    actual, expected = mvue.sparsify_mvue(grad, seed), reference_gradients.sparsify_mvue(grad, seed)
    assert torch.equal(split_packed(actual)[1], split_packed(expected)[1])


EXACT = ("none", "relu", "squared_relu")


def input_of(activation: str, rows: int, cols: int) -> Tensor:
    x = torch.randn(rows, cols)
    if activation in EXACT:
        x[0, 5], x[rows // 2, 7], x[1] = NAN, INF, x[1].round() + 0.0
    if activation == "none":  # torch's relu may keep the sign of a zero
        x[-1, 9:11] = -0.0
    return x.half()


def check_input(x: Tensor, gate: Tensor | None, mask: str, activation: str) -> None:
    about = activation, mask, x.shape
    results = [kernels.sparsify_input(x, gate, mask, activation) for kernels in (sparsify, reference_inputs)]
    for actual, expected in zip(*results, strict=True):
        if activation in EXACT:
            assert_same_packed(actual, expected, about)
        else:  # another exponential: last bits differ, and no two sums of magnitudes are as close here
            assert torch.equal(split_packed(actual)[1], split_packed(expected)[1]), about
            torch.testing.assert_close(split_packed(actual)[0], split_packed(expected)[0], rtol=1e-3, atol=1e-6)


def check_inputs() -> None:
    for activation in reference_inputs.ACTIVATIONS:
        for rows, cols, mask in ((64, 128, "greedy"), (70, 64, "optimal")):
            gate = torch.randn(rows, 2 * cols).half()[:, cols:] if activation in reference_inputs.GATED else None
            check_input(input_of(activation, rows, cols), gate, mask, activation)
    check_input(torch.randn(64, 70).half().T, None, "optimal", "none")


def check_layouts() -> None:
    """Of several tiles in both directions; what the layouts share with the first one is tried above."""
    x, seed = torch.randn(200, 128).half(), torch.tensor([9])
    for layout in ("sm80", "cutlass", "dense"):
        both = (one.sparsify_input(x, None, "optimal", "relu", layout) for one in (sparsify, reference_inputs))
        pairs = list(zip(*both, strict=True))
        if layout != "dense":
            pairs.append((mvue.sparsify_mvue(x, seed, layout), reference_gradients.sparsify_mvue(x, seed, layout)))
        for actual, expected in pairs:
            assert torch.equal(actual.view(torch.int16), expected.view(torch.int16)), layout
    estimate, sums = mvue.mvue24_sum(x[:70], seed)
    assert_same(estimate, reference_gradients.mvue24(x[:70], seed), "dense")
    torch.testing.assert_close(sums, reference_gradients.sums(x[:70]))


if __name__ == "__main__":
    torch.manual_seed(0)
    with (
        mock.patch.object(sparsify, "_empty_strided_cuda", on_the_cpu),
        mock.patch.object(memory, "_empty_strided_cuda", on_the_cpu),
        mock.patch.object(mvue, "_empty_strided_cuda", on_the_cpu),
        mock.patch.object(mvue_float8, "_empty_strided_cuda", on_the_cpu),
    ):
        check_weights()
        if HAS_FLOAT8:
            check_float8()
        check_gradients()
        if HAS_FLOAT8:
            check_float8_gradients()
        check_bfloat16_gradients()
        check_inputs()
        check_layouts()
    print("equal")
