"""One number of a packed weight, for kernels that read few of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Buffer, Expr, argument
from moec.targets.kernels.cuda.layout import BLOCK, ROWS, FragmentLayout
from moec.targets.kernels.cuda.packing import PAIRS


def weight_arguments(layout: FragmentLayout, *lead: int, prefix: str = "") -> dict[str, Buffer]:
    """The parameters that stand for a weight's arrays."""
    return {name: argument(f"{prefix}{name}", shape, dtype) for name, (shape, dtype) in layout.arrays(*lead).items()}


def element(layout: FragmentLayout, weights: Mapping[str, Buffer], lead: tuple[Expr, ...], row: Expr, column: Expr) -> Expr:
    """One number of a weight as float32: an expression of some loads and shifts."""
    if not layout.in_fragments:
        value = weights["data"][(*lead, row, column)]
        if layout.format == "bf16":
            return T.reinterpret("float32", T.shift_left(T.cast(value, "uint32"), T.uint32(16)))
        return T.cast(value, "float32")
    tile, half, g = T.Bind(row // ROWS), T.Bind(row % ROWS // 8), T.Bind(row % 8)
    block = T.Bind(column // BLOCK)
    t, h, o = column // 2 % 4, column // 8 % 2, column % 2
    step = column // 16 % 8  # 2 j + s
    lane = T.Bind(g * 4 + t)
    if layout.coded is None:
        at = (step // 2 * 64 + half * 32 + lane) * 8 + step % 2 * 4 + h * 2 + o
        bits = T.shift_left(T.cast(weights["values"][(*lead, tile, block, at)], "uint32"), T.uint32(16))
        return T.reinterpret("float32", bits)
    pair = T.Bind(step * 2 + h)
    words, bits = weights["codes"], layout.bits

    def word(i: Expr) -> Expr:
        """A word of the lane's row."""
        own = T.Bind(half * bits + i)
        count = T.min(4, 2 * bits - own // 4 * 4)
        return words[(*lead, tile, block, own // 4 * 128 + lane * count + own % 4)]

    code = _code(bits, word, pair, T.cast(o * 16, "uint32"))
    if layout.fp8 is not None:
        sign, size = T.bitwise_and(code, T.uint32(0x80)), T.bitwise_and(code, T.uint32(0x7F))
        number = T.cast(T.bitwise_or(T.shift_left(sign, T.uint32(8)), T.shift_left(size, T.uint32(7))), "uint16")
        place = (tile, block, half) if layout.fp8.block else (tile, 0, g, 0, half)
        # as float16, whose bias is 8 more
        return T.cast(T.reinterpret("float16", number), "float32") * T.float32(2.0**8) * weights["scale"][(*lead, *place)]
    group = column % BLOCK * layout.block_groups // BLOCK
    side = (*lead, tile, block // layout.scale_span, g, group, half)
    assert layout.integer is not None
    zero: Expr = T.int32(layout.integer.levels // 2)
    if not layout.integer.symmetric:
        zero = T.cast(weights["zero"][side], "int32")
    return T.cast(T.cast(code, "int32") - zero, "float32") * T.cast(weights["scale"][side], "float32")


def _code(bits: int, word: Callable[[Expr], Expr], pair: Expr, high: Expr) -> Expr:
    """The code of a pair that is at bit `high` of what its low one is at, as `packing` has it: side by side, but for 3 bits' last pair."""

    def part(which: Expr, first: Expr, width: int) -> Expr:
        return T.bitwise_and(T.shift_right(word(which), T.cast(first, "uint32") + high), T.uint32((1 << width) - 1))

    if bits == 3:
        rest = T.uint32(0)
        for k in range(3):
            rest = T.bitwise_or(rest, T.shift_left(part(k, 15, 1), T.uint32(k)))
        return T.Select(pair == PAIRS - 1, rest, part(T.min(pair // 5, 2), pair % 5 * 3, 3))
    code, first, start = T.uint32(0), 0, 0
    for width in (8, 4, 2, 1):
        if bits & width:
            per = PAIRS // width
            code = T.bitwise_or(code, T.shift_left(part(first + pair // per, pair % per * width, width), T.uint32(start)))
            first, start = first + width, start + width
    return code
