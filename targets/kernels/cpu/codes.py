"""How kernels take codes out of the words of a layout: vectors of pairs, one row a lane, or one code of one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu import trits
from moec.targets.kernels.cpu.emit import Buffer, Expr, lane_type, prefetch, splat, vector
from moec.targets.kernels.cpu.layout import BYTE_ORDER, LANES, LaneLayout, planes

PREFETCH_BYTES = 1536
"""How far ahead of its use a tile's next codes are asked for."""

Codes = Callable[[int], Expr]
"""From a step of a run to a pair of neighbouring codes as two 16-bit integers a lane; steps are asked for in order."""


class Run(NamedTuple):
    """Steps of a chunk, a pair of codes each, that are emitted once and repeated with other words: the first step, how many, how often."""

    first: int
    steps: int
    repeats: int = 1


def runs(layout: LaneLayout, part: int, parts: int) -> list[Run]:
    """The runs of one of the equal parts of a chunk."""
    steps = layout.chunk // 2 // parts
    first, stop, found = part * steps, part * steps + steps, list[Run]()
    if not layout.ternary:
        return [Run(first, steps)]
    own = trits.WORDS * trits.TRITS
    if parts == 1:
        return [Run(0, trits.TRITS, trits.WORDS), Run(own, stop - own)]
    while first < stop:
        end = min(stop, (first // trits.TRITS + 1) * trits.TRITS)
        found.append(Run(first, end - first))
        first = end
    return found


def read_run(layout: LaneLayout, codes: Buffer, tile: tuple[Expr, ...], chunk: Expr, run: Run, turn: Expr, lane: int, lanes: int) -> Codes:
    """Emit reads of the words of a run, in one of its repetitions, of `lanes` rows of a tile."""
    integer = layout.integer
    assert integer is not None
    if layout.ternary:
        return _Trits(codes, tile, chunk, run, turn, lane, lanes).pair
    words = [T.Bind(vector(codes, *tile, chunk, w, lane, lanes=lanes)) for w in range(integer.bits)]
    cut = planes(integer)
    return lambda step: _pair(words, cut, run.first + step, lanes)


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


def _shared_word(chunk: Expr) -> Expr:
    """The word that a chunk shares."""
    return chunk // trits.SHARING * (trits.WORDS * trits.SHARING + 1)


class _Trits:
    """The digits of a word, one pair after the other: the next one is the integer part of 3 x, and x becomes the fraction."""

    def __init__(self, codes: Buffer, tile: tuple[Expr, ...], chunk: Expr, run: Run, turn: Expr, lane: int, lanes: int) -> None:
        self._lanes = lanes
        if run.first < trits.WORDS * trits.TRITS:
            word, power = _first_word(chunk) + run.first // trits.TRITS + turn, T.uint16(3 ** (run.first % trits.TRITS))
        else:
            word, power = _shared_word(chunk), _power(chunk % trits.SHARING)
        halves = T.reinterpret(f"uint16x{2 * lanes}", vector(codes, *tile, T.Bind(word), lane, lanes=lanes))
        self._fraction = T.Bind(halves * splat(power, "uint16", 2 * lanes))

    def pair(self, _: int) -> Expr:
        """The next two codes."""
        pairs, wide = 2 * self._lanes, f"uint32x{2 * self._lanes}"
        product = T.cast(self._fraction, wide) * splat(3, "uint32", pairs)
        found = T.cast(T.shift_right(product, splat(16, "uint32", pairs)), f"uint16x{pairs}")
        self._fraction = T.Bind(self._fraction * splat(3, "uint16", pairs))
        return T.reinterpret(lane_type("int32", self._lanes), found)


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
    shared = T.Bind(codes[tile, _shared_word(chunk), lane])
    shared_power = T.Bind(T.cast(_power(chunk % trits.SHARING), "uint32"))

    def code(i: int) -> Expr:
        word, digit = divmod(i // 2, trits.TRITS)
        power = T.uint32(3**digit) * (shared_power if word == trits.WORDS else T.uint32(1))
        half = T.shift_right([*words, shared][word], T.uint32(16 * (i % 2)))
        fraction = T.bitwise_and(T.bitwise_and(half, T.uint32(0xFFFF)) * power, T.uint32(0xFFFF))
        return T.cast(T.shift_right(fraction * T.uint32(3), T.uint32(16)), "int32")

    return code
