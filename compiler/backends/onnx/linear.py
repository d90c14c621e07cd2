"""`linear` in ONNX: MatMulNBits for integer weights, a float32 product otherwise.

With float activations MatMulNBits runs at accuracy level 0 on 4-bit codes (8-bit ones as two 4-bit halves, see `layout`), with int8
activations at level 4 on 2, 4 or 8-bit codes.
"""

from __future__ import annotations

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
    result = product(low, low.value(x), len(low.shape(x)), weight, None, node.name)
    return low.e.op("Add", result, low.value(bias[0])) if bias and bias[0] else result


def product(low: Lowering, x: str, rank: int, weight: str, row: int | None = None, stem: str = "") -> str:
    """x [..., K] times a parameter [N, K] (or one expert of it) transposed.

    Args:
        rank: of x.
    """
    layout = low.weights.placement.layouts.get(weight)
    if isinstance(layout, IntLayout) and layout.block and not low.portable:
        return _nbits(low, x, rank, weight, layout, row, stem)
    if weight in low.graph.params:
        matrix = low.weights.value(weight, row)
        return dense(low, x, matrix, 2, stem)
    return dense(low, x, low.value(weight), 2, stem)


def dense(low: Lowering, x: str, matrix: str, rank: int, stem: str = "") -> str:
    """x times a float32 matrix transposed."""
    e = low.e
    if low.portable:
        perm = [*range(rank - 2), rank - 1, rank - 2]
        return e.op("MatMul", x, e.op("Transpose", matrix, perm=perm), stem=stem)
    return e.op("FusedMatMul", x, matrix, domain=CONTRIB, transB=1, stem=stem)


def _nbits(low: Lowering, x: str, rank: int, weight: str, layout: IntLayout, row: int | None, stem: str) -> str:
    e, bits, blocks, k = low.e, layout.bits, layout.blocks, layout.k
    if layout.split:
        bits, blocks = 4, 2 * layout.blocks
        halves = [x, x]
        if (padding := layout.padded_k - k) > 0:
            zeros = e.const(np.zeros(padding, np.float32))
            shape = e.op("Concat", e.op("Shape", x, end=-1), e.const([padding]), axis=0)
            halves = [x, e.op("Expand", zeros, shape), x]
        x, k = e.op("Concat", *halves, axis=rank - 1), layout.padded_k + k
    data = e.stored(weight, "weight", "u8", (layout.n, blocks, layout.block * bits // 8), row)
    inputs = [x, data, low.weights.scale(weight, row), low.weights.zero(weight, row)]
    attrs = {"N": layout.n, "K": k, "bits": bits, "block_size": layout.block, "accuracy_level": low.accuracy_level}
    return e.multi("MatMulNBits", inputs, 1, CONTRIB, stem, **attrs)[0]
