"""The main kernel of attention: a thread block attends for a few rows (token, head) of a KV head.

The softmax is computed online, TILE positions at a time (https://arxiv.org/abs/1805.02867): 8 threads share a position for the logits, a
warp has a row for the softmax, a thread a column of V for the sum. A block of one token, as in a batch of sequences, has fewer rows.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.attend_tile import SHARE, THREADS, TILE, Tile
from moec.targets.kernels.cuda.attention_parts import LOWEST, PAGE, first_seen, pool_arguments
from moec.targets.kernels.cuda.emit import WARP, Expr, Shared, argument, kernel, local, store, strided, sync, when
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.specs import AttentionSpec

BLOCK_TOKENS = 16  # the most tokens of a block
MOST_ROWS = 16  # of a thread block


class Attend(Tile):
    """Emits (k_pool, v_pool, q, blocks, page_table, [sinks,] out)."""

    def __init__(self, spec: AttentionSpec, dtype: str) -> None:
        self.spec, self.dtype = spec, dtype
        self.group = spec.heads // spec.kv_heads
        self.vector = 4 if spec.d % (4 * SHARE) == 0 else 1
        self.columns = ceil_div(spec.dv, THREADS)
        self.rows = min(self.group * BLOCK_TOKENS, MOST_ROWS)
        self.tiles = ceil_div(self.group * BLOCK_TOKENS, self.rows)
        single = min(self.group, MOST_ROWS)  # rows of a block of one token
        self.cases = [single, self.rows] if single < self.rows else [self.rows]
        self.words = sum(self.words_of(rows) for rows in self.cases)

    def words_of(self, rows: int) -> int:
        """Words of memory that so many rows take."""
        spec = self.spec
        return sum(ceil_div(n, 4) * 4 for n in (rows * spec.d, *[TILE * rows] * 2, *[rows] * 3, TILE // PAGE))

    def arguments(self) -> Any:
        spec = self.spec
        tokens, blocks = T.int64(), T.int64()
        self.k_pool, self.v_pool = pool_arguments(spec, self.dtype)
        self.q = argument("q", (tokens, spec.heads * spec.d), "float32")
        self.blocks = argument("blocks", (blocks, 4), "int32")
        self.page_table = argument("page_table", (T.int64(), T.int64()), "int32")
        self.sinks = argument("sinks", (spec.heads,), "float32") if spec.sinks else None
        self.out = argument("out", (tokens, spec.heads * spec.dv), "float32")
        return blocks

    def grid(self, blocks: Expr) -> list[Expr]:
        return [self.tiles * self.spec.kv_heads, blocks]

    def body(self, _: Any, memory: Shared, x: Expr, block: Expr, thread: Expr) -> None:
        grid_launch()
        grid_wait()
        self.thread, self.warp, self.lane = thread, T.Bind(thread // WARP), T.Bind(thread % WARP)
        self.tile, self.kv_head = T.Bind(x % self.tiles), T.Bind(x // self.tiles)
        self.slot, self.first_token = T.Bind(self.blocks[block, 0]), T.Bind(self.blocks[block, 1])
        self.first_position = T.Bind(self.blocks[block, 3])
        self.count = T.Bind(self.blocks[block, 2] * self.group)
        if len(self.cases) == 1:
            self._attend(memory, self.cases[0])
            return
        with T.If(self.count == self.group):
            with T.Then():
                self._attend(memory, self.cases[0])
            with T.Else():
                self._attend(memory, self.cases[1])

    def _attend(self, memory: Shared, rows: int) -> None:
        spec, self.rows = self.spec, rows
        self.queries = memory.take((rows * spec.d,), "float32")
        self.logits, self.weights = (memory.take((TILE * rows,), "float32") for _ in range(2))
        self.pages = memory.take((TILE // PAGE,), "int32")
        self.correction, self.maxima, self.sums = (memory.take((rows,), "float32") for _ in range(3))
        with strided(self.thread, rows * spec.d, THREADS) as i:
            row = T.Bind(self._row(i // spec.d))
            value = self.q[self.first_token + row // self.group, (self.kv_head * self.group + row % self.group) * spec.d + i % spec.d]
            store(self.queries, value * T.float32(spec.scale), i)
        self.maximum, self.sum = (local(ceil_div(rows, THREADS // WARP), "float32") for _ in range(2))
        self.result = local(rows * self.columns, "float32")
        for i in range(rows * self.columns):
            store(self.result, T.float32(0), i)
        self._own_rows(self._begin)
        self.last = T.Bind(self.first_position + self._row(rows - 1) // self.group)
        start = first_seen(spec, self.first_position + self._row(0) // self.group)
        begin, end = T.Bind(start // TILE), T.Bind(self.last // TILE + 1)
        if self.tiles > 1:  # a short block has fewer rows
            end = T.Bind(T.Select(self.tile * self.rows < self.count, end, begin))
        with strided(begin, end, 1) as tile:
            first = T.Bind(tile * TILE)
            sync()
            with when(T.And(self.thread < TILE // PAGE, first + self.thread * PAGE <= self.last)):
                store(self.pages, self.page_table[self.slot, first // PAGE + self.thread], self.thread)
            sync()
            self._logits(first)
            sync()
            self._own_rows(self._softmax)
            sync()
            self._accumulate(first)
        self._finish()

    def _begin(self, i: int, j: Expr) -> None:
        store(self.maximum, T.float32(LOWEST), i)
        store(self.sum, T.float32(0), i)
        if self.sinks is not None:
            store(self.maximum, self.sinks[self.kv_head * self.group + self._row(j) % self.group], i)
            store(self.sum, T.float32(1), i)

    def _finish(self) -> None:
        spec, rows = self.spec, self.rows

        def publish(i: int, j: Expr) -> None:
            with when(self.lane == 0):
                store(self.sums, self.sum[i], j)
                store(self.maxima, self.maximum[i], j)

        self._own_rows(publish)
        sync()
        for j in range(rows):
            with when(self.tile * rows + j < self.count):
                row = T.Bind(self._row(j))
                head = T.Bind(self.kv_head * self.group + row % self.group)
                inverse = T.Bind(T.float32(1) / self.sums[j])
                for n in range(self.columns):
                    column = self.thread + n * THREADS
                    with when(column < spec.dv):
                        value = self.result[n * rows + j] * inverse
                        store(self.out, value, self.first_token + row // self.group, head * spec.dv + column)


def attend_func(spec: AttentionSpec, dtype: str = "float32") -> tirx.PrimFunc:
    """The kernel for any number of tokens."""
    attend = Attend(spec, dtype)
    return kernel("attend", THREADS, attend.arguments, attend.grid, attend.body, words=attend.words)
