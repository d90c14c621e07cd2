"""Parameters as values of the model: stored arrays, widened or dequantised where an operator wants numbers.

ONNX Runtime computes what depends on constants alone when it loads a model: scales widened from float16, repeated for the blocks
of a group, and bfloat16 matrices widened to float32 exist in memory only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moec.compiler.backends.onnx.emit import CONTRIB, Emitter
from moec.compiler.backends.onnx.layout import IntLayout
from moec.compiler.backends.onnx.placement import Placement, PlainLayout, fixed
from moec.compiler.ir import Param


class Weights:
    """The parameters of one model."""

    def __init__(self, emitter: Emitter, params: Mapping[str, Param], placement: Placement, portable: bool) -> None:
        self.e, self.params, self.placement, self.portable = emitter, params, placement, portable

    def layout(self, name: str) -> IntLayout | PlainLayout:
        return self.placement.layouts[name]

    def value(self, name: str, row: int | None = None) -> str:
        """A parameter, or one expert of a stacked one, as numbers: integers as they are, anything else in float32."""
        layout, param = self.layout(name), self.params[name]
        shape = fixed(param.type.shape)[row is not None :]
        if isinstance(layout, PlainLayout):
            stored = self.e.stored(name, "weight", layout.format, shape, row)
            return stored if param.type.dtype == layout.format else self.e.op("Cast", stored, to=1)
        return self.e.op("Reshape", self.dequantized(name, row), self.e.const(shape))

    def scale(self, name: str, row: int | None = None) -> str:
        """The scales of a matrix in float32, one a block: [N, blocks] (both halves of a split one: [N, 2 blocks])."""
        layout = self.layout(name)
        assert isinstance(layout, IntLayout)
        scale = self.e.op("Cast", self.e.stored(name, "scale", "f16", (layout.n, layout.groups), row), to=1)
        scale = self.per_block(layout, scale, -1)
        if layout.split:
            scale = self.e.op("Concat", self.e.op("Mul", scale, self.e.number(16.0, "f32")), scale, axis=-1)
        return scale

    def per_block(self, layout: IntLayout, groups: str, axis: int) -> str:
        """Values of groups repeated for the blocks of each group."""
        if np.array_equal(layout.group_of_block, np.arange(layout.groups)):
            return groups
        return self.e.op("Gather", groups, self.e.const(layout.group_of_block), axis=axis)

    def zero(self, name: str, row: int | None = None) -> str:
        """The packed zero points of a matrix as its operator wants them; "" if they are the operator's default."""
        layout = self.layout(name)
        assert isinstance(layout, IntLayout)
        if layout.has_zero:
            return self.e.stored(name, "zero", "u8", layout.arrays()["zero"].shape, row)
        if not layout.split:
            return ""
        halves = np.concatenate([np.full(layout.blocks, 8), np.zeros(layout.blocks)]).astype(np.uint8)
        line = (halves[0::2] | halves[1::2] << 4).astype(np.uint8)
        return self.e.op("Expand", self.e.const(line), self.e.const([layout.n, layout.blocks]))

    def rows(self, name: str, ids: str) -> str:
        """Rows of an integer matrix at `ids` [...], dequantised: [..., K] in float32."""
        layout = self.layout(name)
        assert isinstance(layout, IntLayout)
        if self.portable or not layout.block:
            return self._elementwise_rows(name, layout, ids)
        bits, width = (4, 2 * layout.padded_k) if layout.split else (layout.bits, layout.padded_k)
        data = self.e.stored(name, "weight", "u8", (layout.n, width * bits // 8))
        inputs = [data, ids, self.scale(name), self.zero(name)]
        found = self.e.multi(
            "GatherBlockQuantized", inputs, 1, CONTRIB, gather_axis=0, quantize_axis=1, block_size=layout.block, bits=bits
        )[0]
        if layout.split:
            return self.e.op("Add", self._part(found, 0, layout.k), self._part(found, layout.padded_k, layout.k))
        return found if width == layout.k else self._part(found, 0, layout.k)

    def _part(self, x: str, start: int, size: int) -> str:
        return self.e.op("Slice", x, *(self.e.const(v) for v in ([start], [start + size], [-1])))

    def dequantized(self, name: str, row: int | None = None) -> str:
        """A whole integer matrix in float32: [N, K]."""
        layout = self.layout(name)
        assert isinstance(layout, IntLayout)
        if layout.signed:
            shape = (layout.n, layout.padded_k)
            kind = "i4" if layout.bits == 4 else "i8"
            codes, scale = self.e.stored(name, "weight", kind, shape, row), self.scale(name, row)
            zero = self.e.stored(name, "zero", kind, (layout.n, layout.blocks), row) if layout.has_zero else ""
            matrix = self.e.multi("DequantizeLinear", [codes, scale, zero], 1, axis=1, block_size=layout.block)[0]
            return matrix if layout.padded_k == layout.k else self._part(matrix, 0, layout.k)
        if row is None:
            return self.rows(name, self.e.const(np.arange(layout.n)))
        assert not layout.block
        return self._elementwise_rows(name, layout, "", row)

    def _elementwise_rows(self, name: str, layout: IntLayout, ids: str, row: int | None = None) -> str:
        """(code - zero) * scale in elementwise operators, of the rows at `ids` or of all rows."""
        e = self.e
        width = layout.arrays()["weight"].shape[1]
        take = (lambda x: e.op("Gather", x, ids, axis=0)) if ids else (lambda x: x)
        codes = take(e.stored(name, "weight", "u8", (layout.n, width), row))
        if layout.block and layout.bits == 4:
            halves = [e.op("BitwiseAnd", codes, e.number(15, "u8")), e.op("BitShift", codes, e.number(4, "u8"), direction="RIGHT")]
            pairs = e.op("Concat", *(e.op("Unsqueeze", h, e.const([-1])) for h in halves), axis=-1)
            lead = e.op("Shape", codes, end=-1)
            codes = e.op("Reshape", pairs, e.op("Concat", lead, e.const([2 * width]), axis=0))
        if layout.signed:
            codes = e.op("BitwiseXor", codes, e.number(1 << (layout.bits - 1), "u8"))
        codes = e.op("Cast", self._part(codes, 0, layout.k) if layout.padded_k != layout.k else codes, to=1)
        size = layout.block or layout.fmt.group_size(layout.k)
        spread = e.const(np.arange(layout.k) // size)
        scale = take(self.scale(name, row))
        middle = e.number(1 << (layout.bits - 1), "f32")
        if layout.has_zero:
            middle = e.op("Gather", self._elementwise_zero(name, layout, take, row), spread, axis=-1)
        return e.op("Mul", e.op("Sub", codes, middle), e.op("Gather", scale, spread, axis=-1))

    def _elementwise_zero(self, name: str, layout: IntLayout, take: object, row: int | None) -> str:
        e = self.e
        assert callable(take)
        if layout.signed:  # as DequantizeLinear has it: a signed number
            kind = "i4" if layout.bits == 4 else "i8"
            signed = e.op("Cast", e.stored(name, "zero", kind, (layout.n, layout.blocks), row), to=1)
            return str(e.op("Add", take(signed), e.number(1 << (layout.bits - 1), "f32")))
        return str(e.op("Cast", take(e.stored(name, "zero", "u8", (layout.n, layout.blocks), row)), to=1))
