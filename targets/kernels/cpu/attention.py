"""Attention over a paged cache of keys and values, as one CPU kernel: append the new tokens, then attend.

The cache of a layer is two arrays of pages of `PAGE` tokens, K [pages, HK, d, PAGE] and V [pages, HK, PAGE, dv padded to 16]: a
vector of K holds one coordinate of neighbouring positions, so that logits grow without sums across lanes, and a vector of V holds
neighbouring coordinates of one position.

Tokens come as a packed stream of blocks. A block is a run of tokens of one sequence at consecutive positions, and `blocks` holds
(row of the page table, first token, number of tokens, first position) of each. The softmax is computed online, a page at a time
(https://arxiv.org/abs/1805.02867), for a few rows at once; a row is one token and one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from tvm import relax, tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu import math
from moec.targets.kernels.cpu.emit import Expr, Register, argument, prim_func, splat, store, vector
from moec.targets.kernels.cpu.isa import Isa
from moec.targets.kernels.cpu.layout import LANES, ceil_div
from moec.targets.kernels.cpu.loops import stack
from moec.targets.kernels.specs import AttentionSpec

PAGE = 32
"""Tokens of a page of the cache."""

HIDDEN = -1e30  # the logit of a position that a token does not see
LOWEST = -5e29  # where a running maximum starts: exp(HIDDEN - LOWEST) is 0
PARALLEL_WORK = 200_000  # multiplications below which one token is not worth waking the other threads


def page_shapes(spec: AttentionSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a page of K and of V."""
    return (spec.kv_heads, spec.d, PAGE), (spec.kv_heads, PAGE, ceil_div(spec.dv, LANES) * LANES)


class _Rows:
    """A tile of rows (token, head) of one block and one key/value head, while it walks over the pages."""

    def __init__(self, kernel: AttentionKernel, block: Expr, kv_head: Expr, tile: Expr) -> None:
        self.kernel, spec, count = kernel, kernel.spec, kernel.rows
        group = spec.heads // spec.kv_heads
        self.kv_head, self.slot = kv_head, T.Bind(kernel.blocks[block, 0])
        first_token, tokens = T.Bind(kernel.blocks[block, 1]), kernel.blocks[block, 2]
        first_position = T.Bind(kernel.blocks[block, 3])
        # Rows beyond the last repeat it, and write the same result again.
        rows = [T.Bind(T.min(tile * count + j, tokens * group - 1)) for j in range(count)]
        self.token = [T.Bind(first_token + row // group) for row in rows]
        self.head = [T.Bind(kv_head * group + row % group) for row in rows]
        self.position = [T.Bind(first_position + row // group) for row in rows]
        lanes = kernel.isa.lanes
        self.logits = [[Register("float32", lanes) for _ in range(PAGE // lanes)] for _ in rows]
        self.weights = [stack((PAGE,)) for _ in rows]
        self.sum = [Register("float32", lanes) for _ in rows]
        self.max = [Register("float32", 1) for _ in rows]
        self.correction = [Register("float32", 1) for _ in rows]
        self.result = [stack((kernel.padded_dv,)) for _ in rows]

    def run(self) -> None:
        """Attend and write the result."""
        spec, lanes = self.kernel.spec, self.kernel.isa.lanes
        for j in range(self.kernel.rows):
            self.sum[j].clear()
            if self.kernel.sinks is not None:
                self.max[j].set(self.kernel.sinks[self.head[j]])
                first_lane = T.ramp(0, 1, lanes) == splat(0, "int32", lanes)
                self.sum[j].set(T.Select(first_lane, splat(1, "float32", lanes), splat(0, "float32", lanes)))
            else:
                self.max[j].set(T.float32(LOWEST))
            with T.serial(self.kernel.padded_dv // lanes) as i:
                store(self.result[j], splat(0, "float32", lanes), i * lanes, lanes=lanes)
        start: Expr = T.int32(0)
        if spec.window:
            start = T.max(start, self.position[0] - (spec.window - 1))
        if spec.chunk:
            start = T.max(start, self.position[0] // spec.chunk * spec.chunk)
        first = T.Bind(start // PAGE)
        with T.serial(self.position[-1] // PAGE + 1 - first) as step:
            index = T.Bind(first + T.cast(step, "int32"))
            page = T.Bind(self.kernel.page_table[self.slot, index])
            self._logits(page)
            self._softmax(index)
            self._accumulate(page, T.min(PAGE, self.position[-1] + 1 - index * PAGE))
        self._write()

    def _logits(self, page: Expr) -> None:
        kernel, spec, lanes = self.kernel, self.kernel.spec, self.kernel.isa.lanes
        for row in self.logits:
            for register in row:
                register.clear()
        with T.serial(spec.d) as d:
            keys = [T.Bind(vector(kernel.k_pool, page, self.kv_head, d, v * lanes, lanes=lanes)) for v in range(PAGE // lanes)]
            for j, row in enumerate(self.logits):
                q = T.Bind(splat(kernel.q[self.token[j], self.head[j] * spec.d + d], "float32", lanes))
                for register, key in zip(row, keys, strict=True):
                    register.set(register.get() + q * key)

    def _softmax(self, index: Expr) -> None:
        """Turn the logits of a page into weights against the running maximum, and note what older weights lose by it."""
        spec, lanes = self.kernel.spec, self.kernel.isa.lanes
        for j, row in enumerate(self.logits):
            for v, register in enumerate(row):
                logit = register.get() * splat(spec.scale, "float32", lanes)
                if spec.softcap:
                    logit = math.tanh(logit * splat(1 / spec.softcap, "float32", lanes), lanes) * splat(spec.softcap, "float32", lanes)
                at = T.ramp(index * PAGE + v * lanes, 1, lanes)
                visible = at <= splat(self.position[j], "int32", lanes)
                if spec.window:
                    visible = T.And(visible, at > splat(self.position[j] - spec.window, "int32", lanes))
                if spec.chunk:
                    visible = T.And(visible, at >= splat(self.position[j] // spec.chunk * spec.chunk, "int32", lanes))
                register.set(T.Select(visible, logit, splat(HIDDEN, "float32", lanes)))
            peak = reduce(T.max, (register.get() for register in row))
            peak = T.Bind(T.max(self.max[j].get(), T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fmax", peak)))
            self.correction[j].set(math.exp(self.max[j].get() - peak))
            self.max[j].set(peak)
            self.sum[j].set(self.sum[j].get() * splat(self.correction[j].get(), "float32", lanes))
            for v, register in enumerate(row):
                weight = T.Bind(math.exp(register.get() - splat(peak, "float32", lanes), lanes))
                store(self.weights[j], weight, v * lanes, lanes=lanes)
                self.sum[j].set(self.sum[j].get() + weight)

    def _accumulate(self, page: Expr, positions: Expr) -> None:
        kernel, lanes = self.kernel, self.kernel.isa.lanes
        wide = max(w for w in (1, 2, 4) if kernel.padded_dv // lanes % w == 0 and w * kernel.rows <= kernel.accumulators)
        with T.serial(kernel.padded_dv // lanes // wide) as part:
            at = [part * wide * lanes + w * lanes for w in range(wide)]
            sums = [[Register("float32", lanes) for _ in at] for _ in self.result]
            for j, row in enumerate(sums):
                for register, i in zip(row, at, strict=True):
                    factor = splat(self.correction[j].get(), "float32", lanes)
                    register.set(vector(self.result[j], i, lanes=lanes) * factor)
            with T.serial(positions) as position:
                values = [T.Bind(vector(kernel.v_pool, page, self.kv_head, position, i, lanes=lanes)) for i in at]
                for j, row in enumerate(sums):
                    weight = T.Bind(splat(self.weights[j][position], "float32", lanes))
                    for register, value in zip(row, values, strict=True):
                        register.set(register.get() + weight * value)
            for j, row in enumerate(sums):
                for register, i in zip(row, at, strict=True):
                    store(self.result[j], register.get(), i, lanes=lanes)

    def _write(self) -> None:
        dv, lanes = self.kernel.spec.dv, self.kernel.isa.lanes
        for j, result in enumerate(self.result):
            total = T.call_llvm_pure_intrin("float32", "llvm.vector.reduce.fadd", T.float32(0), self.sum[j].get())
            inverse = T.Bind(T.float32(1) / total)
            with T.serial(dv // lanes) as i:
                scaled = vector(result, i * lanes, lanes=lanes) * splat(inverse, "float32", lanes)
                store(self.kernel.out, scaled, self.token[j], self.head[j] * dv + i * lanes, lanes=lanes)
            with T.serial(dv % lanes) as i:
                last = dv // lanes * lanes + i
                store(self.kernel.out, result[last] * inverse, self.token[j], self.head[j] * dv + last)


class AttentionKernel:
    """Emits the PrimFunc (k_pool, v_pool, q, k, v, blocks, page_table, [sinks,] out).

    float32 k_pool [pages, HK, d, PAGE], v_pool [pages, HK, PAGE, dv padded], both changed in place; q [T, H*d], k [T, HK*d],
    v [T, HK*dv], sinks [H], out [T, H*dv]; int32 blocks [NB, 4], page_table [S, MP].
    """

    def __init__(self, spec: AttentionSpec, isa: Isa, tokens: int | None) -> None:
        self.spec, self.isa, self.tokens = spec, isa, tokens
        self.accumulators = 16 if isa.vector_bits == 512 else 8
        group = spec.heads // spec.kv_heads
        most = self.accumulators * isa.lanes // PAGE
        self.rows = max(1, min(most, 4, group if tokens == 1 else 4))
        self.padded_dv = ceil_div(spec.dv, LANES) * LANES

    def build(self) -> None:
        """The function's body."""
        spec, tokens = self.spec, self.tokens if self.tokens is not None else T.int64()
        pages, block_count = T.int64(), 1 if self.tokens == 1 else T.int64()
        k_page, v_page = page_shapes(spec)
        self.k_pool = argument("k_pool", (pages, *k_page), "float32")
        self.v_pool = argument("v_pool", (pages, *v_page), "float32")
        self.q = argument("q", (tokens, spec.heads * spec.d), "float32")
        self.k = argument("k", (tokens, spec.kv_heads * spec.d), "float32")
        self.v = argument("v", (tokens, spec.kv_heads * spec.dv), "float32")
        self.blocks = argument("blocks", (block_count, 4), "int32")
        self.page_table = argument("page_table", (T.int64(), T.int64()), "int32")
        self.sinks = argument("sinks", (spec.heads,), "float32") if spec.sinks else None
        self.out = argument("out", (tokens, spec.heads * spec.dv), "float32")
        if self.tokens == 1:
            self._append(T.int32(0))
            with T.If((self.blocks[0, 3] + 1) * (spec.heads * (spec.d + spec.dv)) > PARALLEL_WORK):
                with T.Then(), T.parallel(spec.kv_heads) as kv_head:
                    self._attend(T.int32(0), T.cast(kv_head, "int32"))
                with T.Else(), T.serial(spec.kv_heads) as kv_head:
                    self._attend(T.int32(0), T.cast(kv_head, "int32"))
            return
        with T.parallel(block_count) as block:
            self._append(block)
        with T.parallel(block_count * spec.kv_heads) as task:
            # Early blocks of a long prompt have less to do than late ones: alternate between the two ends.
            at = T.Bind(task // spec.kv_heads)
            block = T.Bind(T.Select(at % 2 == 0, at // 2, block_count - 1 - at // 2))
            self._attend(block, T.Bind(T.cast(task % spec.kv_heads, "int32")))

    def _append(self, block: Expr) -> None:
        spec = self.spec
        with T.serial(self.blocks[block, 2]) as i:
            token = T.Bind(self.blocks[block, 1] + i)
            position = T.Bind(self.blocks[block, 3] + i)
            page = T.Bind(self.page_table[self.blocks[block, 0], position // PAGE])
            with T.serial(spec.kv_heads) as h:
                with T.serial(spec.d) as d:
                    store(self.k_pool, self.k[token, h * spec.d + d], page, h, d, position % PAGE)
                with T.serial(spec.dv) as d:
                    store(self.v_pool, self.v[token, h * spec.dv + d], page, h, position % PAGE, d)

    def _attend(self, block: Expr, kv_head: Expr) -> None:
        group = self.spec.heads // self.spec.kv_heads
        with T.serial((self.blocks[block, 2] * group + self.rows - 1) // self.rows) as tile:
            _Rows(self, block, kv_head, T.Bind(T.cast(tile, "int32"))).run()


def attention_func(spec: AttentionSpec, tokens: int | None, isa: Isa) -> tirx.PrimFunc:
    """The kernel for a static number of tokens (only 1), or for any (None)."""
    return prim_func(AttentionKernel(spec, isa, tokens).build)


def attention(
    bb: relax.BlockBuilder, caches: Sequence[relax.Expr], inputs: Sequence[relax.Expr], spec: AttentionSpec, isa: Isa
) -> relax.Var:
    """Emit attention: caches (k_pool, v_pool), inputs (q, k, v, blocks, page_table[, sinks]) -> float32 [T, H*dv].

    The caches change in place.
    """
    count = inputs[0].ty.shape[0]
    static = int(count) if isinstance(count, tirx.IntImm) else None
    func = bb.add_func(attention_func(spec, static, isa), "attention")
    out = relax.TensorType((count, spec.heads * spec.dv), "float32")
    types = [*(cache.ty for cache in caches), out]
    result = bb.emit(relax.op.call_tir_inplace(func, relax.Tuple([*caches, *inputs]), [0, 1, -1], types))
    return bb.emit(relax.TupleGetItem(result, 2))
