"""`linear` in ONNX: MatMulNBits for integer weights, a float32 product otherwise.

With int8 activations MatMulNBits runs at accuracy level 4 on 2, 4 or 8-bit codes. With float activations it runs at level 0 on 4-bit
codes. It computes quickly in float32 only with those; 8-bit codes come as two 4-bit halves (see `layout`), or, for x86-64, whole, and
the activations of each block as two terms:

    x = a + b,  a = round(x / s) s,  s = max |x| / 127

At level 4 MatMulNBits rounds activations to multiples of s, with an s for each row and block: it takes a as it is, and b, at most s / 2,
with an error of at most s / 508. Measured with ONNX Runtime 1.31.1, 8192 x 384 weights of 8 bits, one token, one thread of a Sapphire
Rapids machine: halves 594 us, two terms 150 us; relative error of the result 5e-5 (1 % with int8 activations). Not every kernel for other
processors rounds like that, so they keep the halves.

On a GPU codes of 4 and 8 bits are multiplied as they are, with activations and scales of 16 bits, or of 32 where `half` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moec.compiler.backends.onnx.emit import CONTRIB
from moec.compiler.backends.onnx.layout import IntLayout
from moec.compiler.ir import Node

if TYPE_CHECKING:
    from moec.compiler.backends.onnx.lower import Lowering


def lower_linear(low: Lowering, node: Node) -> str:
    """The `linear` op."""
    x, weight, *bias = node.inputs
    if siblings := low.fusion.siblings.get(node.name):
        if node is siblings[0]:
            _together(low, siblings)
        return ""
    result = product(low, low.value(x), len(low.shape(x)), weight, None, node.name, exact=node.name in low.exact)
    return low.e.op("Add", result, low.value(bias[0])) if bias and bias[0] else result


def product(low: Lowering, x: str, rank: int, weight: str, row: int | None = None, stem: str = "", exact: bool = False) -> str:
    """x [..., K] times a parameter [N, K] (or one expert of it) transposed.

    Args:
        rank: of x.
        exact: in float32, also on a GPU.
    """
    layout = low.weights.placement.layouts.get(weight)
    if isinstance(layout, IntLayout) and layout.block and not low.portable:
        return _nbits(low, x, rank, layout, _arrays(low, weight, row, low.fusion.factors.get(stem)), stem, exact)
    matrix = low.weights.value(weight, row) if weight in low.graph.params else low.value(weight)
    return dense(low, x, matrix, 2, stem, exact)


def dense(low: Lowering, x: str, matrix: str, rank: int, stem: str = "", exact: bool = False) -> str:
    """x times a float32 matrix transposed."""
    e = low.e
    if low.half and not exact:
        return low.widen(e.op("FusedMatMul", low.narrow(x), low.narrow(matrix), domain=CONTRIB, transB=1, stem=stem))
    if low.portable:
        perm = [*range(rank - 2), rank - 1, rank - 2]
        return e.op("MatMul", x, e.op("Transpose", matrix, perm=perm), stem=stem)
    return e.op("FusedMatMul", x, matrix, domain=CONTRIB, transB=1, stem=stem)


def _together(low: Lowering, nodes: Sequence[Node]) -> None:
    """Several linear nodes with one input as one product, whose weights are put together when the model is loaded."""
    e = low.e
    layouts = [low.weights.layout(node.inputs[1]) for node in nodes]
    layout = layouts[0]
    assert isinstance(layout, IntLayout)
    sizes = [layout.n for layout in layouts if isinstance(layout, IntLayout)]
    parts = [_arrays(low, node.inputs[1], None, low.fusion.factors.get(node.name)) for node in nodes]
    joined = [e.op("Concat", *arrays, axis=0) if arrays[0] else "" for arrays in zip(*parts, strict=True)]
    x, rank = low.value(nodes[0].inputs[0]), len(low.shape(nodes[0].inputs[0]))
    result = _nbits(low, x, rank, replace(layout, n=sum(sizes)), joined, nodes[0].name)
    for node, part in zip(nodes, e.multi("Split", [result, e.const(sizes)], len(nodes), axis=-1), strict=True):
        low.set_value(node.name, part)


def _arrays(low: Lowering, weight: str, row: int | None = None, factor: float | None = None) -> list[str]:
    """Codes, scales (times a factor) and zero points of a matrix as MatMulNBits takes them."""
    layout = low.weights.layout(weight)
    assert isinstance(layout, IntLayout)
    bits, blocks = (4, 2 * layout.blocks) if layout.split else (layout.bits, layout.blocks)
    data = low.e.stored(weight, "weight", "u8", (layout.n, blocks, layout.block * bits // 8), row)
    scale = low.weights.scale(weight, row)
    if factor is not None:
        scale = low.e.op("Mul", scale, low.number(factor, "f32"))
    return [data, scale, low.weights.zero(weight, row)]


def _nbits(low: Lowering, x: str, rank: int, layout: IntLayout, arrays: Sequence[str], stem: str, exact: bool = False) -> str:
    e, bits, k = low.e, layout.bits, layout.k
    if low.half:
        codes, scale, zero = arrays
        wide = {"N": layout.n, "K": k, "bits": bits, "block_size": layout.block}
        if exact:
            return e.multi("MatMulNBits", [x, *arrays], 1, CONTRIB, stem, **wide)[0]
        return low.widen(e.multi("MatMulNBits", [low.narrow(x), codes, low.narrow(scale), zero], 1, CONTRIB, stem, **wide)[0])
    if bits == 8 and not layout.split and low.accuracy_level == 0:
        return _two_terms(low, x, rank, layout, arrays, stem)
    if layout.split:
        bits = 4
        halves = [x, x]
        if (padding := layout.padded_k - k) > 0:
            zeros = e.const(np.zeros(padding, np.float32))
            shape = e.op("Concat", e.op("Shape", x, end=-1), e.const([padding]), axis=0)
            halves = [x, e.op("Expand", zeros, shape), x]
        x, k = e.op("Concat", *halves, axis=rank - 1), layout.padded_k + k
    attrs = {"N": layout.n, "K": k, "bits": bits, "block_size": layout.block, "accuracy_level": low.accuracy_level}
    return e.multi("MatMulNBits", [x, *arrays], 1, CONTRIB, stem, **attrs)[0]


def _two_terms(low: Lowering, x: str, rank: int, layout: IntLayout, arrays: Sequence[str], stem: str) -> str:
    """x [..., K] as the sum of two rows that a product with int8 activations takes, the first exactly and the second nearly."""
    e, block = low.e, layout.block
    if (padding := layout.padded_k - layout.k) > 0:
        x = e.op("Pad", x, e.const([0] * (2 * rank - 1) + [padding]))
    blocks = e.op("Reshape", x, e.const([0] * (rank - 1) + [layout.blocks, block]))
    largest = e.op("ReduceMax", e.op("Abs", blocks), e.const([-1]), keepdims=1)
    step = e.op("Max", e.op("Mul", largest, low.number(1 / 127, "f32")), low.number(1e-30, "f32"))
    first = e.op("Mul", e.op("Round", e.op("Div", blocks, step)), step)
    both = e.op("Concat", first, e.op("Sub", blocks, first), axis=rank - 2)
    rows = e.op("Reshape", both, e.const([0] * (rank - 1) + [layout.padded_k]))
    attrs = {"N": layout.n, "K": layout.padded_k, "bits": 8, "block_size": block, "accuracy_level": 4}
    result = e.multi("MatMulNBits", [rows, *arrays], 1, CONTRIB, stem, **attrs)[0]
    return e.op("Add", *e.multi("Split", [result], 2, axis=rank - 2, num_outputs=2))
