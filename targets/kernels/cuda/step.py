"""Attention of single tokens in one kernel: norms and rope of q and k, the append to the cache, and the sum over the context.

Thread blocks split the context among them (https://arxiv.org/abs/2311.01282); how many do is computed from its length, and the others
end at once. The one that arrives last adds the parts up. Of several tokens each has thread blocks of its own.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.arrival import SEMAPHORES, last_arrival
from moec.targets.kernels.cuda.attention_parts import LOWEST, first_seen, pool_arguments
from moec.targets.kernels.cuda.emit import WARP, Buffer, Expr, Shared, argument, at, kernel, local, store, sync, when
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.loads import load4
from moec.targets.kernels.cuda.step_loop import lanes_sum
from moec.targets.kernels.cuda.step_ready import Ready
from moec.targets.kernels.cuda.step_spec import SHARE, StepOptions, StepSpec, padded
from moec.targets.kernels.specs import NormSpec

TOGETHER = 8  # parts that are read at a time


class Step(Ready):
    """Emits (k_pool, v_pool, q, k, v, blocks, page_table, semaphores[, weights of the norms][, cos, sin][, sinks], outs...).

    The last ones are `outputs`. Blocks of tokens that are left to another kernel have no rows in `out`, but in `ready`.
    """

    def __init__(self, spec: StepSpec, options: StepOptions, dtype: str) -> None:
        self.spec, self.options, self.dtype = spec, options, dtype

    def arguments(self) -> Any:
        spec, a = self.spec, self.spec.attention
        tokens = spec.tokens if spec.tokens is not None else T.int64()
        count = 1 if spec.tokens == 1 else T.int64()
        self.k_pool, self.v_pool = pool_arguments(a, self.dtype)
        self.q = argument("q", (tokens, a.heads * a.d), "float32")
        self.k = argument("k", (tokens, a.kv_heads * a.d), "float32")
        self.v = argument("v", (tokens, a.kv_heads * a.dv), "float32")
        self.blocks = argument("blocks", (count, 4), "int32")
        self.page_table = argument("page_table", (T.int64(), T.int64()), "int32")
        self.semaphores = argument("semaphores", (SEMAPHORES,), "int32")
        self.q_weight, self.k_weight = self._weight("q_weight", spec.q_norm), self._weight("k_weight", spec.k_norm)
        self.cos = argument("cos", (tokens, a.d), "float32") if spec.rope else None
        self.sin = argument("sin", (tokens, a.d), "float32") if spec.rope else None
        self.sinks = argument("sinks", (a.heads,), "float32") if a.sinks else None
        shapes = outputs(spec, self.options, tokens)
        names = ("parts", "statistics", "out", "ready")
        self.parts, self.statistics, self.out, *ready = (argument(n, shape, "float32") for n, shape in zip(names, shapes, strict=False))
        self.ready = ready[0] if ready else None
        return tokens, count

    @staticmethod
    def _weight(name: str, norm: NormSpec | None) -> Buffer | None:
        return argument(name, (norm.size,), "float32") if norm is not None and norm.weight else None

    def grid(self, counts: Any) -> list[Expr]:
        """KV heads and their tiles, parts of the context, tokens."""
        return [self.spec.columns, self.options.splits] + ([] if self.spec.tokens == 1 else [counts[0]])

    def body(self, counts: Any, shared: Shared, x: Expr, split: Expr, *rest: Expr) -> None:
        *token, thread = rest
        spec, several = self.spec, bool(token)
        grid_launch()
        self.thread, self.warp, self.lane = thread, T.Bind(thread // WARP), T.Bind(thread % WARP)
        self.tile, self.kv_head, self.split = T.Bind(x % spec.tiles), T.Bind(x // spec.tiles), split
        if several:
            self._locate(token[0], counts[1])
        else:
            self.token, self.left = 0, None
            self.slot, self.first_position = T.Bind(self.blocks[0, 0]), T.Bind(self.blocks[0, 3])
            self.cached = self.first_position
        self.lead = (self.token,) if several else ()
        if self.left is None:
            self._attend(counts[0], shared, x)
            return
        with T.If(self.left):
            with T.Then(), when(T.And(x == 0, split == 0)):  # the others end without waiting
                grid_wait()
                self._make_ready(shared)
            with T.Else():
                self._attend(counts[0], shared, x)

    def _attend(self, tokens: Expr, shared: Shared, x: Expr) -> None:
        """Attend for the token."""
        spec, o, several = self.spec, self.options, self.spec.tokens != 1
        self._stages()
        self._layout()
        begin, end, self.active = self._cut(tokens)
        with when(self.split < self.active):
            self.memory = shared.take((o.warps * self.region,), "float32")
            self.maxima, self.sums = (shared.take((o.warps * spec.rows,), "float32") for _ in range(2))
            self.weights = shared.take((o.warps * spec.rows * o.positions,), "float32")
            self.corrections = shared.take((o.warps * spec.rows,), "float32")
            self.queries = shared.take((spec.rows * padded(spec.attention.d),), "float32")
            self.new_key = shared.take((padded(spec.attention.d),), "float32")
            if several:
                self.earlier_keys = shared.take((o.warps * padded(spec.attention.d),), "float32")
            self._chunks(begin, end)
            self._before(shared)
            grid_wait()
            self.values = self._new_values(self.token)
            self._prepare()
            self._begin()
            if several:
                self._earlier()
            self._run()
            self._leave()
            self._merge(self.token * spec.columns + x if several else x)

    def _cut(self, tokens: Expr) -> tuple[Expr, Expr, Expr]:
        """The chunks of positions of this part of the context, and the number of parts."""
        o = self.options
        self.start = T.Bind(first_seen(self.spec.attention, self.first_position))
        first = T.Bind(self.start // o.positions)
        chunks = T.Bind((self.cached + o.positions - 1) // o.positions - first)
        if o.all_parts and o.splits > 1:
            each = self._each(chunks, tokens)
        else:
            each = T.Bind(T.max((chunks + o.splits - 1) // o.splits, ceil_div(o.least, o.positions)))
        if alone := o.alone // o.positions:
            each = T.Bind(T.Select(chunks <= alone, alone, each))
        begin = T.Bind(first + self.split * each)
        return begin, T.Bind(T.min(begin + each, first + chunks)), T.Bind(T.max((chunks + each - 1) // each, 1))

    def _leave(self) -> None:
        """Write what the warp has found into shared memory, over its stages."""
        spec, dv = self.spec, self.spec.attention.dv
        pieces = dv // self.width
        for s in range(len(self.sets)):
            total, row = lanes_sum(self.sum[s], SHARE, WARP), T.Bind(self._own(s))
            with when(T.And(self.lane < SHARE, row < spec.rows)):
                store(self.maxima, self.maximum[s], self.warp * spec.rows + row)
                store(self.sums, total, self.warp * spec.rows + row)
        for n in range(self.turns_of_columns):
            column, inside = self._column(n)
            for j in range(spec.rows):
                for i in range(self.width):
                    value = self.result[(j * self.turns_of_columns + n) * self.width + i]
                    if self.groups > 1:
                        value = lanes_sum(value, pieces, pieces * self.groups)
                    with when(T.bool(True) if inside is None else inside):
                        store(self.memory, value, self.warp * self.region + j * dv + column + i)
        sync()

    def _mine(self) -> Any:
        """The outputs of a thread: row, first column, and how many columns."""
        spec, a, threads = self.spec, self.spec.attention, self.options.threads
        width = 4 if a.dv % 4 == 0 and spec.rows * a.dv >= 4 * threads else 1
        pieces = spec.rows * a.dv // width
        for n in range(ceil_div(pieces, threads)):
            piece = T.Bind(n * threads + self.thread)
            row = T.Bind(piece // (a.dv // width))
            inside = self.tile * spec.rows + row < spec.group
            with when(inside if pieces % threads == 0 else T.And(piece < pieces, inside)):
                yield row, T.Bind(piece % (a.dv // width) * width), width

    def _merge(self, x: Expr) -> None:
        """Add up what the warps have found, then what the thread blocks have."""
        spec, a, warps = self.spec, self.spec.attention, self.options.warps
        for row, column, width in self._mine():
            head = T.Bind(self._head(row))
            peaks = [T.Bind(self.maxima[w * spec.rows + row]) for w in range(warps)]
            peak = self._most(peaks)
            factors = [T.Bind(T.exp(p - peak)) for p in peaks]
            total = T.Bind(sum((f * self.sums[w * spec.rows + row] for w, f in enumerate(factors)), T.float32(0)))
            found = [
                T.Bind(sum((f * self.memory[w * self.region + row * a.dv + column + i] for w, f in enumerate(factors)), T.float32(0)))
                for i in range(width)
            ]
            with T.If(self.active == 1):
                with T.Then():
                    inverse = T.Bind(T.float32(1) / total)
                    for i in range(width):
                        store(self.out, found[i] * inverse, self.token, head * a.dv + column + i)
                with T.Else():
                    for i in range(width):
                        store(self.parts, found[i], *self.lead, self.split, head, column + i)
                    with when(column == 0):
                        store(self.statistics, peak, *self.lead, self.split, head, 0)
                        store(self.statistics, total, *self.lead, self.split, head, 1)
        if self.options.splits > 1:
            with when(self.active > 1):
                last = last_arrival(self.semaphores, x, self.active)
                with when(last != 0):
                    self._combine()

    @staticmethod
    def _most(values: list[Expr]) -> Expr:
        peak = values[0]
        for value in values[1:]:
            peak = T.max(peak, value)
        return T.Bind(peak)

    def _combine(self) -> None:
        """Add up the parts."""
        dv, splits = self.spec.attention.dv, self.options.splits
        peak, total = local(1, "float32"), local(1, "float32")
        values, found = local(TOGETHER * 4, "float32"), local(4, "float32")
        for row, column, width in self._mine():
            head = T.Bind(self._head(row))
            store(peak, T.float32(LOWEST), 0)
            store(total, T.float32(0), 0)
            for i in range(width):
                store(found, T.float32(0), i)
            for first in range(0, splits, TOGETHER):
                with when(first < self.active):
                    together = min(TOGETHER, splits - first)
                    indices = [T.Bind(T.min(first + s, self.active - 1)) for s in range(together)]
                    read = [T.Bind(self.statistics[(*self.lead, s, head, 0)]) for s in indices]
                    sums = [T.Bind(self.statistics[(*self.lead, s, head, 1)]) for s in indices]
                    for n, s in enumerate(indices):
                        if width == 4:
                            load4(at(values, n * 4), at(self.parts, *self.lead, s, head, column), "float32")
                        else:
                            store(values, self.parts[(*self.lead, s, head, column)], n)
                    peaks = [T.Bind(T.Select(first + n < self.active, p, T.float32(2 * LOWEST))) for n, p in enumerate(read)]
                    most = self._most([peak[0], *peaks])
                    factor = T.Bind(T.exp(peak[0] - most))
                    weights = [T.Bind(T.exp(p - most)) for p in peaks]
                    store(total, sum((w * s for w, s in zip(weights, sums, strict=True)), total[0] * factor), 0)
                    store(peak, most, 0)
                    for i in range(width):
                        store(found, sum((w * values[n * width + i] for n, w in enumerate(weights)), found[i] * factor), i)
            inverse = T.Bind(T.float32(1) / total[0])
            for i in range(width):
                store(self.out, found[i] * inverse, self.token, head * dv + column + i)


def outputs(spec: StepSpec, options: StepOptions, tokens: Expr) -> list[tuple[Expr, ...]]:
    """Shapes of the outputs, which are float32: parts and their statistics, the result [T, H*dv], and perhaps q [T, H*d]."""
    a, lead = spec.attention, () if spec.tokens == 1 else (1 if options.splits == 1 else spec.tokens or max(options.all_parts // 2, 1),)
    shapes = [(*lead, options.splits, a.heads, size) for size in (a.dv, 2)]
    return [*shapes, (tokens, a.heads * a.dv), *([(tokens, a.heads * a.d)] if spec.tokens is None else [])]


def step_func(spec: StepSpec, options: StepOptions, dtype: str = "float32") -> tirx.PrimFunc:
    """The kernel."""
    step = Step(spec, options, dtype)
    words, together = options.words(spec, dtype), options.together
    return kernel("attend_step", options.threads, step.arguments, step.grid, step.body, words=words, blocks_per_multiprocessor=together)
