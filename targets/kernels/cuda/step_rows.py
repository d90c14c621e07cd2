"""Heads of q, and the new key, made ready by the warps of a thread block: normalised, turned by the token's angles, in shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.attention_parts import PAGE, from_cache, to_cache
from moec.targets.kernels.cuda.emit import WARP, Buffer, Expr, Shared, at, local, store, sync, when
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.loads import load_words
from moec.targets.kernels.cuda.step_spec import StepOptions, StepSpec, padded, vector
from moec.targets.kernels.cuda.warp import warp_sum
from moec.targets.kernels.specs import NormSpec


class Rows:
    """The state of a thread block that the preparation needs; a lane has elements i and i + d/2 of a row for some i."""

    spec: StepSpec
    options: StepOptions
    dtype: str
    thread: Expr
    warp: Expr
    lane: Expr
    split: Expr
    tile: Expr
    kv_head: Expr
    first_position: Expr
    token: Expr
    cached: Expr
    q: Buffer
    k: Buffer
    q_weight: Buffer | None
    k_weight: Buffer | None
    cos: Buffer | None
    sin: Buffer | None
    k_pool: Buffer
    page_table: Buffer
    slot: Expr
    queries: Buffer
    new_key: Buffer

    def _head(self, row: Expr) -> Expr:
        """The head that is a row of the thread block; those beyond the last repeat it."""
        return self.kv_head * self.spec.group + T.min(self.tile * self.spec.rows + row, self.spec.group - 1)

    def _before(self, memory: Shared) -> None:
        """What can be read while the kernel before this one still runs: weights of the norms, and where the new key goes."""
        spec, warps = self.spec, self.options.warps
        self.squares = memory.take((2 * warps,), "float32")
        self.own = [T.Bind(T.min(i * warps + self.warp, spec.rows - 1)) for i in range(ceil_div(spec.rows, warps))]
        heads = [T.Bind(self._head(row)) for row in self.own]
        self.weights_of_q = [self._weights(spec.q_norm, self.q_weight, head) for head in heads]
        self.weights_of_k = self._weights(spec.k_norm, self.k_weight, self.kv_head)
        self.keeper = spec.rows % warps  # the warp of the new key
        self.new_page = T.Bind(self.page_table[self.slot, self.first_position // PAGE])

    def _prepare(self) -> None:
        """Fill `queries` and, in the first part of the context, `new_key`, which the cache gets too."""
        spec, d = self.spec, self.spec.attention.d
        first = T.Bind(self.split == 0)
        turn = self._angles(self.token)  # all is asked for before the first use
        keys = self._pairs(self.k, self.kv_head * d, (self.token,))
        queries = [self._pairs(self.q, T.Bind(self._head(row)) * d, (self.token,)) for row in self.own]
        self._share_squares([self._pieces((self.q, self.k)[i], size) for i, size in self._whole_rows()])
        for row, values, weights in zip(self.own, queries, self.weights_of_q, strict=True):
            self._normalise(values, spec.q_norm, weights, self._squares_of(0))
            self._turn(values, turn)
            for index, value in self._elements(values):
                store(self.queries, value * T.float32(spec.attention.scale), row * padded(d) + index)
            for i in range(ceil_div(padded(d) - d, WARP)):
                with when(d + i * WARP + self.lane < padded(d)):
                    store(self.queries, T.float32(0), row * padded(d) + d + i * WARP + self.lane)
        # by all: in a branch, its loads would wait for what is before
        self._normalise(keys, spec.k_norm, self.weights_of_k, self._squares_of(1))
        self._turn(keys, turn)
        with when(T.And(first, self.warp == self.keeper)):
            for index, value in self._elements(keys):
                stored = T.Bind(to_cache(value, self.dtype))
                store(self.new_key, from_cache(stored, self.dtype), index)
                with when(self.tile == 0):
                    store(self.k_pool, stored, self.new_page, self.kv_head, self.first_position % PAGE, index)
        sync()

    @property
    def _half(self) -> int:
        return ceil_div(self.spec.attention.d, 2)

    def _indices(self) -> list[tuple[int, Expr, Expr]]:
        """(register, element, whether there is such an element, or None) of all that a lane has of a row."""
        found = list[tuple[int, Expr, Expr]]()
        d, half = self.spec.attention.d, self._half
        for n in range(ceil_div(half, WARP)):
            i = T.Bind(n * WARP + self.lane)
            inside = None if half % WARP == 0 else i < half
            found += [(2 * n, i, inside), (2 * n + 1, i + half, inside if d % 2 == 0 else i + half < d)]
        return found

    def _pairs(self, source: Buffer, begin: Expr, lead: tuple[Expr, ...]) -> Buffer:
        """Read a row's elements into registers."""
        values = local(2 * ceil_div(self._half, WARP), "float32")
        for n, i, inside in self._indices():
            if inside is None:
                load_words(at(values, n), at(source, *lead, begin + i), 1, early=True)
            else:
                store(values, T.float32(0), n)
                with when(inside):
                    load_words(at(values, n), at(source, *lead, begin + i), 1, early=True)
        return values

    def _elements(self, values: Buffer) -> Any:
        """For each element of a row: its index and value, where it exists."""
        for n, i, inside in self._indices():
            if inside is None:
                yield i, values[n]
            else:
                with when(inside):
                    yield i, values[n]

    def _weights(self, norm: NormSpec | None, weight: Buffer | None, head: Expr) -> Buffer | None:
        if norm is None or weight is None:
            return None
        return self._pairs(weight, head * self.spec.attention.d if norm.size != self.spec.attention.d else 0, ())

    def _angles(self, token: Expr) -> tuple[Buffer, Buffer] | None:
        if self.cos is None or self.sin is None:
            return None
        return self._pairs(self.cos, 0, (token,)), self._pairs(self.sin, 0, (token,))

    def _pieces(self, source: Buffer, size: int) -> tuple[Buffer, int]:
        """What a thread takes of a whole row, and how many numbers that is."""
        width, threads = vector(size), self.options.threads
        count = width * ceil_div(size // width, threads)
        values = local(count, "float32")
        for n in range(0, count, width):
            piece = T.Bind(n // width * threads + self.thread)
            for i in range(width if size % (width * threads) else 0):
                store(values, T.float32(0), n + i)
            with when(piece < size // width):
                load_words(at(values, n), at(source, self.token, piece * width), width, early=True)
        return values, count

    def _whole_rows(self) -> list[tuple[int, int]]:
        """Which of q (0) and k (1) have norms of their whole row, and how long that is."""
        norms = enumerate((self.spec.q_norm, self.spec.k_norm))
        return [(i, norm.size) for i, norm in norms if norm is not None and norm.size != self.spec.attention.d]

    def _share_squares(self, pieces: list[tuple[Buffer, int]]) -> None:
        """Let all warps know the sums of squares of each one's pieces of whole rows."""
        squares = [warp_sum(sum((x[n] * x[n] for n in range(count)), T.float32(0))) for x, count in pieces]
        for (i, _), square in zip(self._whole_rows(), squares, strict=True):
            with when(self.lane == 0):
                store(self.squares, square, i * self.options.warps + self.warp)
        if pieces:
            sync()

    def _squares_of(self, which: int) -> Callable[[], Expr]:
        """The sum of squares of the whole row of q (0) or k (1), which the warps have found together."""
        warps = self.options.warps
        return lambda: sum((self.squares[which * warps + i] for i in range(warps)), T.float32(0))

    def _normalise(self, values: Buffer, norm: NormSpec | None, weights: Buffer | None, whole: Callable[[], Expr]) -> None:
        if norm is None:
            return
        count = 2 * ceil_div(self._half, WARP)
        if norm.size == self.spec.attention.d:
            square = warp_sum(sum((values[i] * values[i] for i in range(count)), T.float32(0)))
        else:
            square = T.Bind(whole())
        inverse = T.Bind(T.rsqrt(square * T.float32(1 / norm.size) + T.float32(norm.eps)))
        for i in range(count):
            value = values[i] * inverse
            if weights is not None:
                value = value * (weights[i] + T.float32(norm.offset) if norm.offset else weights[i])
            store(values, value, i)

    def _turn(self, values: Buffer, turn: tuple[Buffer, Buffer] | None) -> None:
        if turn is None:
            return
        cos, sin = turn
        for i in range(0, 2 * ceil_div(self._half, WARP), 2):
            low, high = T.Bind(values[i]), T.Bind(values[i + 1])
            store(values, low * cos[i] - high * sin[i], i)
            store(values, high * cos[i + 1] + low * sin[i + 1], i + 1)
