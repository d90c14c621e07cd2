"""How kernels take codes out of the words of a layout: vectors of pairs, one row a lane, or one code of one row."""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu import trits
from moec.targets.kernels.cpu.emit import Buffer, Expr, lane_type, prefetch, splat, vector
from moec.targets.kernels.cpu.layout import BYTE_ORDER, LANES, LaneLayout, planes

PREFETCH_BYTES = 1536
"""How far ahead of its use a tile's next codes are asked for."""

Codes = Callable[[int], Expr]
"""From a step to codes 2 * step and 2 * step + 1 of a chunk as two 16-bit integers a lane; steps are asked for in order."""


def read_chunk(layout: LaneLayout, codes: Buffer, tile: tuple[Expr, ...], chunk: Expr, lane: int, lanes: int) -> Codes:
    """Emit reads of a chunk of `lanes` rows of a tile."""
    integer = layout.integer
    assert integer is not None
    if layout.ternary:
        return _Trits(codes, tile, chunk, lane, lanes).pair
    words = [T.Bind(vector(codes, *tile, chunk, w, lane, lanes=lanes)) for w in range(integer.bits)]
    cut = planes(integer)
    return lambda step: _pair(words, cut, step, lanes)


def prefetch_chunk(layout: LaneLayout, codes: Buffer, tile: tuple[Expr, ...], chunk: Expr) -> None:
    """Ask for the codes a little ahead; hardware alone leaves a sixth of the speed of a few tokens on the table."""
    integer = layout.integer
    assert integer is not None
    if layout.ternary:  # a word of all lanes is one cache line
        first = _first_word(chunk + PREFETCH_BYTES // (4 * LANES * trits.WORDS))
        for word in range(trits.WORDS):
            prefetch(codes, *tile, first + word, 0)
        return
    ahead = chunk + PREFETCH_BYTES // (4 * LANES * integer.bits)
    for word in range(integer.bits):
        prefetch(codes, *tile, ahead, word, 0)


def _pair(words: list[Expr], cut: list[tuple[int, int, int]], step: int, lanes: int) -> Expr:
    parts = []
    for width, start, first in cut:
        per_word = 32 // width
        word = words[first + 2 * step // per_word]
        four, half = divmod(step % (per_word // 2), 2)
        shift = 8 * half + width * four - start
        if shift > 0:
            word = T.shift_right(word, splat(shift, "uint32", lanes))
        elif shift < 0:
            word = T.shift_left(word, splat(-shift, "uint32", lanes))
        mask = ((1 << width) - 1) << start
        parts.append(T.bitwise_and(word, splat(mask | mask << 16, "uint32", lanes)))
    pair = parts[0]
    for part in parts[1:]:
        pair = T.bitwise_or(pair, part)
    return T.reinterpret(lane_type("int32", lanes), pair)


def _first_word(chunk: Expr) -> Expr:
    """Where the words of a chunk alone begin."""
    return chunk * trits.WORDS + chunk // trits.SHARING + 1


class _Trits:
    """The digits of a chunk, one pair after the other: the next one is the integer part of 3 x, and x becomes the fraction."""

    def __init__(self, codes: Buffer, tile: tuple[Expr, ...], chunk: Expr, lane: int, lanes: int) -> None:
        self._lanes, self._at = lanes, 0
        first = T.Bind(_first_word(chunk))
        words = [vector(codes, *tile, first + w, lane, lanes=lanes) for w in range(trits.WORDS)]
        words.append(vector(codes, *tile, chunk // trits.SHARING * (trits.WORDS * trits.SHARING + 1), lane, lanes=lanes))
        self._words = [T.Bind(T.reinterpret(f"uint16x{2 * lanes}", word)) for word in words]
        self._shared_power = _power(chunk % trits.SHARING)

    def pair(self, step: int) -> Expr:
        """Codes 2 * step and 2 * step + 1."""
        word, digit = divmod(step, trits.TRITS)
        if self._at != step or digit == 0:
            self._fraction = self._start(word, digit)
        self._at = step + 1
        pairs, words = f"uint16x{2 * self._lanes}", f"uint32x{2 * self._lanes}"
        product = T.cast(self._fraction, words) * splat(3, "uint32", 2 * self._lanes)
        found = T.cast(T.shift_right(product, splat(16, "uint32", 2 * self._lanes)), pairs)
        self._fraction = T.Bind(self._fraction * splat(3, "uint16", 2 * self._lanes))
        return T.reinterpret(lane_type("int32", self._lanes), found)

    def _start(self, word: int, digit: int) -> Expr:
        power = self._shared_power if word == trits.WORDS else T.uint16(3**digit)
        return T.Bind(self._words[word] * splat(power, "uint16", 2 * self._lanes))


def _power(turn: Expr) -> Expr:
    """9^turn, for a chunk's turn in the word that it shares: 3^10 = 9^5, and each chunk has two digits."""
    power = T.uint16(9 ** (trits.SHARING - 1))
    for exponent in range(trits.SHARING - 1):
        power = T.Select(turn == exponent, T.uint16(9**exponent), power)
    return T.Bind(power)


def one_code(layout: LaneLayout, codes: Buffer, tile: Expr, chunk: Expr, lane: Expr) -> Callable[[int], Expr]:
    """Emit reads of a chunk of one row: a function from i to its i-th code, int32."""
    integer = layout.integer
    assert integer is not None
    if layout.ternary:
        return _one_trit(codes, tile, chunk, lane)
    words = [T.Bind(codes[tile, chunk, w, lane]) for w in range(integer.bits)]
    cut = planes(integer)

    def code(i: int) -> Expr:
        found = T.uint32(0)
        for width, start, first in cut:
            per_word = 32 // width
            shift = 8 * BYTE_ORDER[i % 4] + width * (i % per_word // 4)
            plane = T.bitwise_and(T.shift_right(words[first + i // per_word], T.uint32(shift)), T.uint32((1 << width) - 1))
            found = T.bitwise_or(found, T.shift_left(plane, T.uint32(start)))
        return T.cast(found, "int32")

    return code


def _one_trit(codes: Buffer, tile: Expr, chunk: Expr, lane: Expr) -> Callable[[int], Expr]:
    first = T.Bind(_first_word(chunk))
    words = [T.Bind(codes[tile, first + w, lane]) for w in range(trits.WORDS)]
    shared = T.Bind(codes[tile, chunk // trits.SHARING * (trits.WORDS * trits.SHARING + 1), lane])
    shared_power = T.Bind(T.cast(_power(chunk % trits.SHARING), "uint32"))

    def code(i: int) -> Expr:
        word, digit = divmod(i // 2, trits.TRITS)
        power = T.uint32(3**digit) * (shared_power if word == trits.WORDS else T.uint32(1))
        half = T.shift_right([*words, shared][word], T.uint32(16 * (i % 2)))
        fraction = T.bitwise_and(T.bitwise_and(half, T.uint32(0xFFFF)) * power, T.uint32(0xFFFF))
        return T.cast(T.shift_right(fraction * T.uint32(3), T.uint32(16)), "int32")

    return code
