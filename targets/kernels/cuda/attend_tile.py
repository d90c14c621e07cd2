"""What attention does with one tile of positions: logits of a thread block's rows, their softmax, and the weighted sum of values."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.attention_parts import HIDDEN, PAGE, from_cache, softcapped
from moec.targets.kernels.cuda.emit import WARP, Buffer, Expr, at, local, store, when
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.loads import load4
from moec.targets.kernels.cuda.warp import warp_max, warp_sum
from moec.targets.kernels.specs import AttentionSpec

TILE = 64  # positions at a time: two for each lane
THREADS = 128
SHARE = 8  # threads that compute a logit together
TURNS = TILE // (THREADS // SHARE)  # positions of a tile that a thread helps with
MOST_KEYS = 64  # registers of a thread for keys
VALUES = 8  # that a thread has under way


class Tile:
    """The state of a thread block: parameters, where it is, its rows, and its memory."""

    spec: AttentionSpec
    dtype: str
    group: int
    rows: int
    vector: int
    columns: int
    thread: Expr
    warp: Expr
    lane: Expr
    tile: Expr
    kv_head: Expr
    count: Expr
    last: Expr
    first_position: Expr
    k_pool: Buffer
    v_pool: Buffer
    queries: Buffer
    logits: Buffer
    weights: Buffer
    correction: Buffer
    pages: Buffer
    maximum: Buffer
    sum: Buffer
    result: Buffer

    def _row(self, j: Expr) -> Expr:
        """The row of the block that is number j of the tile; those beyond the last repeat it."""
        return T.min(self.tile * self.rows + j, self.count - 1)

    def _own_rows(self, act: Any) -> None:
        """Do something for the rows that a warp has."""
        warps = THREADS // WARP
        for i in range(ceil_div(self.rows, warps)):
            j = T.Bind(i * warps + self.warp)
            if (i + 1) * warps <= self.rows:
                act(i, j)
            else:
                with when(j < self.rows):
                    act(i, j)

    def _logits(self, first: Expr) -> None:
        spec, rows = self.spec, self.rows
        part = T.Bind(self.thread % SHARE)
        each = ceil_div(spec.d, SHARE)
        together = max(1, min(TURNS, MOST_KEYS // each))
        keys, query = local(each * together, "float32"), local(4, "float32")
        for turn in range(TURNS):
            if turn % together == 0:
                for n in range(together):  # all loads are under way before the first is used
                    self._load_keys(keys, n * each, first + (turn + n) * (THREADS // SHARE) + self.thread // SHARE, part)
            offset = turn % together * each
            here = T.Bind(turn * (THREADS // SHARE) + self.thread // SHARE)
            position = T.Bind(first + here)
            for j in range(rows):
                total = T.float32(0)
                for i in range(ceil_div(spec.d, SHARE * self.vector)):
                    begin = (i * SHARE + part) * self.vector
                    if self.vector == 4:
                        load4(at(query, 0), at(self.queries, j * spec.d + begin), "float32")
                        for n in range(4):
                            total = T.Bind(total + query[n] * keys[offset + 4 * i + n])
                    else:
                        element = T.if_then_else(begin < spec.d, self.queries[j * spec.d + T.min(begin, spec.d - 1)], T.float32(0))
                        total = T.Bind(total + element * keys[offset + i])
                logit = warp_sum(total, SHARE)
                with when(part == j % SHARE):
                    store(self.logits, self._seen(logit, position, j), here * rows + j)

    def _load_keys(self, keys: Buffer, offset: int, position: Expr, part: Expr) -> None:
        """Read what a thread has of a position's key into registers from `offset` on."""
        spec, position = self.spec, T.Bind(position)
        for i in range(ceil_div(spec.d, SHARE)):
            store(keys, T.float32(0), offset + i)
        with when(position <= self.last):
            page = T.Bind(self.pages[position // PAGE % (TILE // PAGE)])
            for i in range(ceil_div(spec.d, SHARE * self.vector)):
                begin = T.Bind((i * SHARE + part) * self.vector)
                if self.vector == 4:
                    load4(at(keys, offset + 4 * i), at(self.k_pool, page, self.kv_head, position % PAGE, begin), self.dtype)
                else:
                    with when(begin < spec.d):
                        store(keys, from_cache(self.k_pool[page, self.kv_head, position % PAGE, begin], self.dtype), offset + i)

    def _seen(self, logit: Expr, position: Expr, j: int) -> Expr:
        """The logit of a position, or what hides it."""
        spec = self.spec
        own = T.Bind(self.first_position + self._row(j) // self.group)
        seen = position <= own
        if spec.window:
            seen = T.And(seen, position > own - spec.window)
        if spec.chunk:
            seen = T.And(seen, position >= own // spec.chunk * spec.chunk)
        return self._masked(logit, seen)

    def _masked(self, logit: Expr, seen: Expr) -> Expr:
        """A logit after the softcap, or what hides it."""
        return T.Select(seen, softcapped(logit, self.spec.softcap), T.float32(HIDDEN))

    def _softmax(self, i: int, j: Expr) -> None:
        """Turn the logits of a row into weights against the running maximum, and note what older weights lose by it."""
        rows = self.rows
        index = [T.Bind((self.lane + WARP * n) * rows + j) for n in range(TILE // WARP)]
        values = [T.Bind(self.logits[n]) for n in index]
        peak = T.Bind(T.max(self.maximum[i], warp_max(T.max(*values))))
        factor = T.Bind(T.exp(self.maximum[i] - peak))
        weights = [T.Bind(T.exp(value - peak)) for value in values]
        for n, weight in zip(index, weights, strict=True):
            store(self.weights, weight, n)
        total = warp_sum(weights[0] + weights[1])
        store(self.sum, self.sum[i] * factor + total, i)
        store(self.maximum, peak, i)
        with when(self.lane == 0):
            store(self.correction, factor, j)

    def _accumulate(self, first: Expr) -> None:
        spec, rows = self.spec, self.rows
        for n in range(self.columns):
            column = T.Bind(self.thread + n * THREADS)
            with when(column < spec.dv):
                for j in range(rows):
                    store(self.result, self.result[n * rows + j] * self.correction[j], n * rows + j)
                for page in range(TILE // PAGE):
                    begin = T.Bind(first + page * PAGE)
                    with when(begin <= self.last):
                        where = T.Bind(self.pages[page])
                        count = T.Bind(T.min(PAGE, self.last + 1 - begin))
                        with T.serial(count // VALUES) as chunk:
                            self._add(n, where, begin + chunk * VALUES, page * PAGE + chunk * VALUES, column, VALUES)
                        with T.serial(count % VALUES) as i:
                            rest = T.Bind(count // VALUES * VALUES + i)
                            self._add(n, where, begin + rest, page * PAGE + rest, column, 1)

    def _add(self, n: int, page: Expr, position: Expr, here: Expr, column: Expr, count: int) -> None:
        """Add `count` positions to the sums of a column."""
        rows, stored = self.rows, [self.v_pool[page, self.kv_head, position % PAGE + i, column] for i in range(count)]
        values = [T.Bind(from_cache(value, self.dtype)) for value in stored]
        for i, value in enumerate(values):
            for j in range(rows):
                store(self.result, self.result[n * rows + j] + self.weights[(here + i) * rows + j] * value, n * rows + j)
