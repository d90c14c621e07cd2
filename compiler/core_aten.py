"""The ATen operators that occur in a graph in normal form, one spelling each: what a backend has to lower.

Attributes are stated in full and axes counted from the front. Where a comment says *number*, the second operand may be the
attribute `other` (for `where`: `self` or `other`) instead of a tensor. Elementwise operators broadcast.
"""

from __future__ import annotations

from collections.abc import Iterator

from moec.compiler.ir import Graph
from moec.compiler.ops import OPS

CORE_ATEN: dict[str, str] = {
    # arithmetic, elementwise
    "aten.add.Tensor": "x + y (number)",
    "aten.sub.Tensor": "x - y (number)",
    "aten.mul.Tensor": "x * y (number)",
    "aten.div.Tensor": "x / y (number)",
    "aten.div.Tensor_mode": "x / y (number), rounded as rounding_mode says: floor or trunc",
    "aten.floor_divide.default": "floor(x / y) (number)",
    "aten.remainder.Tensor": "x modulo y (number), with the sign of y",
    "aten.neg.default": "-x",
    "aten.abs.default": "|x|",
    "aten.sign.default": "-1, 0 or 1",
    "aten.floor.default": "the greatest integer not above x",
    "aten.pow.Tensor_Scalar": "x to the power `exponent`",
    "aten.pow.Scalar": "the number `self` to the power x",
    "aten.pow.Tensor_Tensor": "x to the power y",
    "aten.sqrt.default": "square root",
    "aten.rsqrt.default": "1 / square root",
    "aten.exp.default": "e^x",
    "aten.exp2.default": "2^x",
    "aten.expm1.default": "e^x - 1",
    "aten.log.default": "natural logarithm",
    "aten.log1p.default": "log(1 + x)",
    "aten.log2.default": "binary logarithm",
    "aten.erf.default": "error function",
    "aten.sin.default": "sine",
    "aten.cos.default": "cosine",
    "aten.tanh.default": "hyperbolic tangent",
    "aten.sigmoid.default": "1 / (1 + e^-x)",
    "aten.silu.default": "x * sigmoid(x)",
    "aten.gelu.default": 'x * Phi(x); approximate="tanh" for the tanh form',
    "aten.relu.default": "max(x, 0)",
    "aten.softplus.default": "log(1 + e^x)",
    "aten.maximum.default": "the greater of x and y",
    "aten.minimum.default": "the lesser of x and y",
    "aten.clamp.default": "x within the attributes `min` and `max` (either may be absent)",
    # comparisons and choice
    "aten.eq.Tensor": "x == y", "aten.eq.Scalar": "x == other",
    "aten.ne.Tensor": "x != y", "aten.ne.Scalar": "x != other",
    "aten.lt.Tensor": "x < y", "aten.lt.Scalar": "x < other",
    "aten.le.Tensor": "x <= y", "aten.le.Scalar": "x <= other",
    "aten.gt.Tensor": "x > y", "aten.gt.Scalar": "x > other",
    "aten.ge.Tensor": "x >= y", "aten.ge.Scalar": "x >= other",
    "aten.logical_and.default": "x and y", "aten.logical_or.default": "x or y",
    "aten.logical_xor.default": "x unequal y, of booleans", "aten.logical_not.default": "not x",
    "aten.where.self": "x where the condition holds, y elsewhere (number for either)",
    # element type and shape
    "aten._to_copy.default": "x as element type `dtype`",
    "aten.view.default": "x in the shape `size`, elements in row-major order; stands for every reshape",
    "aten.permute.default": "axes in the order `dims`; stands for every transpose",
    "aten.expand.default": "axes of size one repeated to the shape `size`",
    "aten.repeat.default": "x repeated `repeats` times along each axis",
    "aten.slice.Tensor": "start:end:step along `dim`",
    "aten.select.int": "one index of `dim`, which goes away",
    "aten.cat.default": "tensors one after the other along `dim`",
    "aten.constant_pad_nd.default": "`value` added around x: `pad` has pairs (before, after), last axis first",
    "aten.flip.default": "axes `dims` in reverse order",
    "aten.roll.default": "x shifted by `shifts` along `dims`, around the end",
    "aten.tril.default": "x below the diagonal `diagonal`, zero above",
    "aten.triu.default": "x above the diagonal `diagonal`, zero below",
    # indexing
    "aten.gather.default": "x at the indices along `dim`",
    "aten.scatter.src": "x with elements of src put at the indices along `dim`",
    "aten.scatter.value": "x with the number `value` put at the indices along `dim`",
    "aten.scatter_add.default": "x with elements of src added at the indices along `dim`",
    "aten.index_select.default": "rows of x along `dim` at a vector of indices",
    "aten.index.Tensor": "x at several index tensors, one for each leading axis",
    # reductions
    "aten.sum.dim_IntList": "sum over `dim`",
    "aten.mean.dim": "mean over `dim`",
    "aten.amax.default": "greatest over `dim`",
    "aten.amin.default": "least over `dim`",
    "aten.argmax.default": "index of the greatest over `dim`",
    "aten.any.dim": "whether any holds along `dim`",
    "aten.cumsum.default": "running sum along `dim`",
    "aten._softmax.default": "softmax along `dim`",
    "aten.topk.default": "the `k` greatest along `dim` and their indices, greatest first",
    "aten.sort.default": "x in order along `dim`, and the indices",
    # products
    "aten.matmul.default": "batched matrix product; leading axes broadcast",
    "aten.conv1d.default": "convolution of sequences [B, C, T], depthwise where groups equals C",
    # made from nothing
    "aten.full.default": "`fill_value` in the shape `size`",
    "aten.arange.start_step": "start, start + step, ... below end",
}  # fmt: skip
"""Operator -> meaning, in a line."""


def unknown_ops(graph: Graph) -> Iterator[str]:
    """The ops of a graph that are neither semantic nor core."""
    yield from sorted({n.op for n in graph.nodes} - OPS.keys() - CORE_ATEN.keys())
