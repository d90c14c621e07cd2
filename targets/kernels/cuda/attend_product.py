"""Attention of many tokens on the tensor cores: a thread block attends for 64 rows (token, head) of a KV head, 16 of them a warp.

The softmax is computed online (https://arxiv.org/abs/2307.08691), a page of positions at a time, with logits and weights in the registers
in which `mma.m16n8k16` leaves them: its D has a row's neighbours where its A wants them. Numbers of float32 are two terms of bfloat16, and
products leave out that of the two small ones. Blocks of tokens of one sequence that follow each other share a thread block, so that keys
and values are read once for all of them. For those of a single token `step` attends, which needs less of a multiprocessor.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.attend import BLOCK_TOKENS, Attend
from moec.targets.kernels.cuda.attend_tile import THREADS
from moec.targets.kernels.cuda.attention_parts import LOWEST, PAGE, first_seen, joined
from moec.targets.kernels.cuda.emit import WARP, Expr, Shared, at, kernel, local, store, strided, sync, when
from moec.targets.kernels.cuda.intrinsics import SPLIT, call, grid_launch, grid_wait, mma, term
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.loads import load4
from moec.targets.kernels.cuda.warp import sync_warp
from moec.targets.kernels.specs import AttentionSpec

ROWS = 64  # of a thread block
OWN = 16  # rows of a warp


def together(spec: AttentionSpec) -> int:
    """Blocks of tokens that a thread block may attend for."""
    return max(1, ROWS // (BLOCK_TOKENS * (spec.heads // spec.kv_heads)))


_TERMS = (
    SPLIT
    + r"""
#ifndef MOEC_TERMS
#define MOEC_TERMS
__device__ __forceinline__ void moec_row_terms(void* out, const float* v, int term) {
  *(uint2*)out = make_uint2(moec_term(v[0], v[1], term), moec_term(v[2], v[3], term));
}
__device__ __forceinline__ void moec_pair_terms(void* out, const float* a, const float* b, int term) {
  *(uint4*)out = make_uint4(
    moec_term(a[0], b[0], term), moec_term(a[1], b[1], term), moec_term(a[2], b[2], term), moec_term(a[3], b[3], term));
}
__device__ __forceinline__ float moec_quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float moec_quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
#endif
"""
)


class AttendProduct(Attend):
    """Emits what `Attend` does, for blocks that have, or join, several tokens; head sizes are multiples of 16 (q and k) and of 8 (v)."""

    def __init__(self, spec: AttentionSpec, dtype: str) -> None:
        super().__init__(spec, dtype)
        rows = BLOCK_TOKENS * self.group  # of a block of tokens
        self.together = together(spec)
        self.tiles = ceil_div(rows, ROWS)
        self.terms = 2 if dtype == "float32" else 1
        self.q_stride = self.k_stride = spec.d // 2 + 4  # words; the lanes of a fragment are in different banks
        self.v_stride = spec.dv + (8 if spec.dv % 16 == 0 else 0)
        self.sizes = [2 * ROWS * self.q_stride, self.terms * PAGE * self.k_stride, self.terms * PAGE // 2 * self.v_stride]
        self.words = sum(self.sizes)

    @staticmethod
    def fits(spec: AttentionSpec, dtype: str, memory: int) -> bool:
        """Whether it has the shape, and a thread block so many bytes of memory."""
        return spec.d % 16 == 0 and spec.dv % 8 == 0 and 4 * AttendProduct(spec, dtype).words <= memory

    def body(self, blocks: Any, memory: Shared, x: Expr, block: Expr, thread: Expr) -> None:
        grid_launch()
        self.thread, self.warp, self.lane = thread, T.Bind(thread // WARP), T.Bind(thread % WARP)
        self.tile, self.kv_head = T.Bind(x % self.tiles), T.Bind(x // self.tiles)
        block, count = T.Bind(T.cast(block, "int32")), T.int32(1)
        first = block
        if self.together > 1:
            base = T.Bind(block // self.together * self.together)
            count = joined(self.blocks, self.together, base, T.cast(blocks, "int32"))
            first = T.Bind(T.Select(count > 1, base, block))
        self.slot, self.first_token, tokens, self.first_position = (T.Bind(self.blocks[first, i]) for i in range(4))
        mine = T.Bind(T.And(first == block, T.Or(count > 1, tokens > 1)))
        with when(T.Or(mine, T.And(x == 0, block == 0))):  # one has to, so that this kernel does not end before the one before it
            grid_wait()
        with when(mine):
            self._together(memory, first, count)

    def _together(self, memory: Shared, first: Expr, count: Expr) -> None:
        spec = self.spec
        self.queries, self.keys, self.values = (memory.take((size,), "uint32") for size in self.sizes)
        self.g, self.t = T.Bind(self.lane // 4), T.Bind(self.lane % 4)
        each = self.group if self.together > 1 else ROWS // OWN  # warps of a block of tokens
        mine = T.Bind(T.min(self.warp // each, count - 1) + first)
        tokens = T.Bind(self.blocks[mine, 2])
        row = T.Bind(self.tile * ROWS + self.warp % each * OWN)
        there = T.Bind(T.And(self.warp // each < count, row < tokens * self.group))
        rows = [T.Bind(row + self.g), T.Bind(row + self.g + 8)]
        inside = [T.Bind(T.And(there, r < tokens * self.group)) for r in rows]
        token = [T.Bind(T.min(r // self.group, tokens - 1)) for r in rows]
        self.heads = [T.Bind(self.kv_head * self.group + r % self.group) for r in rows]
        self.tokens = [T.Bind(self.blocks[mine, 1] + i) for i in token]
        self.positions = [T.Bind(self.blocks[mine, 3] + i) for i in token]
        lowest = T.Bind(self.first_position + self.tile * ROWS // self.group)
        end = T.Bind(first + count - 1)
        most = T.min(self.blocks[end, 2] - 1, (self.tile * ROWS + ROWS - 1) // self.group)
        self.last = T.Bind(self.blocks[end, 3] + most)
        own_last = T.Bind(self.blocks[mine, 3] + T.min((row + OWN - 1) // self.group, tokens - 1))
        begin = T.Bind(first_seen(spec, lowest) // PAGE)
        stop = T.Bind(T.Select(lowest <= self.last, self.last // PAGE + 1, begin))
        with when(there):
            self._load_queries(row, tokens, mine)
        sync_warp()
        self._clear()
        with strided(begin, stop, 1) as tile:
            first_position = T.Bind(tile * PAGE)
            sync()
            self._load(first_position)
            sync()
            with when(T.And(there, first_position <= own_last)):
                self._step(first_position)
        for half in range(2):
            total = T.Bind(call("moec_quad_sum", _TERMS, self.sum[half], result="float32"))
            inverse = T.Bind(T.float32(1) / total)
            with when(inside[half]):
                for n in range(spec.dv // 8):
                    for i in range(2):
                        column = T.Bind(self.heads[half] * spec.dv + n * 8 + 2 * self.t + i)
                        store(self.out, self.result[4 * n + 2 * half + i] * inverse, self.tokens[half], column)

    def _clear(self) -> None:
        """The state of rows g and g + 8 of a warp: maximum, sum (of a lane's part), and results."""
        self.maximum, self.sum = (local(2, "float32") for _ in range(2))
        self.result = local(self.spec.dv // 2, "float32")
        for i in range(self.spec.dv // 2):
            store(self.result, T.float32(0), i)
        for half in range(2):
            store(self.maximum, T.float32(LOWEST), half)
            store(self.sum, T.float32(0), half)
            if self.sinks is not None:
                store(self.maximum, self.sinks[self.heads[half]], half)
                store(self.sum, T.Select(self.t == 0, T.float32(1), T.float32(0)), half)

    def _load_queries(self, row: Expr, tokens: Expr, mine: Expr) -> None:
        """The warp's rows of q as two terms."""
        spec, pieces = self.spec, self.spec.d // 4
        values = local(4, "float32")
        with strided(self.lane, OWN * pieces, WARP) as i:
            at_row, piece = T.Bind(i // pieces), T.Bind(i % pieces)
            r = T.Bind(T.min(row + at_row, tokens * self.group - 1))
            head = T.Bind(self.kv_head * self.group + r % self.group)
            load4(at(values, 0), at(self.q, self.blocks[mine, 1] + r // self.group, head * spec.d + piece * 4), "float32")
            for n in range(4):
                store(values, values[n] * T.float32(spec.scale), n)
            for n in range(2):
                place = (n * ROWS + self.warp * OWN + at_row) * self.q_stride + piece * 2
                call("moec_row_terms", _TERMS, at(self.queries, place), at(values, 0), n)

    def _load(self, first: Expr) -> None:
        """Keys of a page as rows of terms, and values as pairs of positions; zeros where no token looks."""
        spec = self.spec
        page = T.Bind(self.page_table[self.slot, first // PAGE])
        pieces, values = spec.d // 4, local(8, "float32")

        def read(pool: Any, row: Expr, column: Expr, offset: int) -> None:
            for n in range(4):
                store(values, T.float32(0), offset + n)
            with when(first + row <= self.last):
                load4(at(values, offset), at(pool, page, self.kv_head, row, column), self.dtype)

        for i in range(ceil_div(PAGE * pieces, THREADS)):
            index = T.Bind(i * THREADS + self.thread)
            with when(index < PAGE * pieces):
                row, piece = T.Bind(index // pieces), T.Bind(index % pieces)
                read(self.k_pool, row, piece * 4, 0)
                for n in range(self.terms):
                    call("moec_row_terms", _TERMS, at(self.keys, (n * PAGE + row) * self.k_stride + piece * 2), at(values, 0), n)
        pieces = spec.dv // 4
        for i in range(ceil_div(PAGE // 2 * pieces, THREADS)):
            index = T.Bind(i * THREADS + self.thread)
            with when(index < PAGE // 2 * pieces):
                pair, piece = T.Bind(index // pieces), T.Bind(index % pieces)
                for n in range(2):
                    read(self.v_pool, pair * 2 + n, piece * 4, 4 * n)
                for n in range(self.terms):
                    place = (n * PAGE // 2 + pair) * self.v_stride + piece * 4
                    call("moec_pair_terms", _TERMS, at(self.values, place), at(values, 0), at(values, 4), n)

    def _step(self, first: Expr) -> None:
        """Attend to a page."""
        spec, tiles = self.spec, PAGE // 8
        logits = local(4 * tiles, "float32")
        for i in range(4 * tiles):
            store(logits, T.float32(0), i)
        a, base = local(8, "uint32"), T.Bind((self.warp * OWN + self.g) * self.q_stride + self.t)
        for k in range(spec.d // 16):
            for n in range(2):
                for r in range(4):
                    place = base + (n * ROWS + r % 2 * 8) * self.q_stride + k * 8 + r // 2 * 4
                    store(a, self.queries[place], 4 * n + r)
            for n in range(tiles):
                place = T.Bind((n * 8 + self.g) * self.k_stride + k * 8 + self.t)
                words = [self.keys[place + m * PAGE * self.k_stride + j * 4] for m in range(self.terms) for j in (0, 1)]
                self._products(at(logits, 4 * n), a, words)
        for half in range(2):
            self._weigh(first, logits, half)
        for k in range(PAGE // 16):
            for n in range(2):
                for r in range(4):
                    i = 4 * (2 * k + r // 2) + 2 * (r % 2)
                    store(a, term(logits[i], logits[i + 1], n), 4 * n + r)
            for n in range(spec.dv // 8):
                place = T.Bind((k * 8 + self.t) * self.v_stride + n * 8 + self.g)
                words = [self.values[place + (m * PAGE // 2 + j * 4) * self.v_stride] for m in range(self.terms) for j in (0, 1)]
                self._products(at(self.result, 4 * n), a, words)

    def _products(self, d: Expr, a: Any, words: list[Expr]) -> None:
        """d += A B, where both are sums of terms: without the product of the small ones."""
        words = [T.Bind(word) for word in words]
        mma(d, at(a, 0), words[0], words[1])
        mma(d, at(a, 4), words[0], words[1])
        if self.terms == 2:
            mma(d, at(a, 0), words[2], words[3])

    def _weigh(self, first: Expr, logits: Any, half: int) -> None:
        """Turn a row's logits into weights against the running maximum, and scale what there is."""
        own, index = self.positions[half], [4 * n + 2 * half + i for n in range(PAGE // 8) for i in range(2)]
        start = T.Bind(first_seen(self.spec, own))
        peak: Any = self.maximum[half]
        for i in index:
            position = T.Bind(first + i // 4 * 8 + 2 * self.t + i % 2)
            store(logits, self._masked(logits[i], T.And(position <= own, position >= start)), i)
            peak = T.max(peak, logits[i])
        peak = T.Bind(call("moec_quad_max", _TERMS, peak, result="float32"))
        factor = T.Bind(T.exp(self.maximum[half] - peak))
        for i in index:
            store(logits, T.exp(logits[i] - peak), i)
        store(self.sum, sum((logits[i] for i in index), self.sum[half] * factor), half)
        store(self.maximum, peak, half)
        for n in range(self.spec.dv // 8):
            for i in range(2):
                store(self.result, self.result[4 * n + 2 * half + i] * factor, 4 * n + 2 * half + i)


def attend_product_func(spec: AttentionSpec, dtype: str = "float32") -> tirx.PrimFunc:
    """The kernel for any number of tokens, where `AttendProduct.fits`; rows of blocks of a single token are left as they are."""
    attend = AttendProduct(spec, dtype)
    return kernel("attend", THREADS, attend.arguments, attend.grid, attend.body, words=attend.words)
