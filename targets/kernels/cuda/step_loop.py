"""What a warp does with its positions once their keys and values are there: logits, softmax, and weighted sums.

Four positions at a time have 8 lanes each, whose parts of a logit are added up so that lane and row change places: afterwards a lane has
the logits of one row. The softmax is computed online (https://arxiv.org/abs/1805.02867), by each warp for itself.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.attention_parts import HIDDEN, LOWEST, PAGE, from_cache, softcapped, to_cache
from moec.targets.kernels.cuda.copies import copy_commit, copy_wait
from moec.targets.kernels.cuda.emit import WARP, Buffer, Expr, at, local, store, strided, when
from moec.targets.kernels.cuda.intrinsics import call
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.loads import load4, load_words
from moec.targets.kernels.cuda.step_fetch import Fetch
from moec.targets.kernels.cuda.step_spec import SHARE, padded, vector, whole
from moec.targets.kernels.cuda.warp import sync_warp

MOST_KEYS = 64  # registers of a lane for keys
MOST_QUERIES = 32  # and for q, where it stays in registers

_FOLD = r"""
#ifndef MOEC_FOLD
#define MOEC_FOLD
__device__ __forceinline__ void moec_fold(float* v, int n) {
  #pragma unroll
  for (int step = 4; step; step >>= 1) {
    if (n > 1) {
      n >>= 1;
      const bool upper = threadIdx.x & step;
      #pragma unroll
      for (int i = 0; i < n; ++i) {
        const float own = upper ? v[i + n] : v[i], other = upper ? v[i] : v[i + n];
        v[i] = own + __shfl_xor_sync(0xffffffffu, other, step);
      }
    } else {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], step);
    }
  }
}
__device__ __forceinline__ float moec_positions_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 8));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 16));
}
__device__ __forceinline__ float moec_lanes_sum(float x, int first, int end) {
  for (int i = first; i < end; i <<= 1) x += __shfl_xor_sync(0xffffffffu, x, i);
  return x;
}
#endif
"""


def lanes_sum(x: Expr, first: int, end: int) -> Expr:
    """The sum over lanes that differ by `first`, twice as much, ... below `end`."""
    return T.Bind(call("moec_lanes_sum", _FOLD, x, first, end, result="float32"))


class Loop(Fetch):
    """The state of a warp: running maximum and sum of the rows that a lane has, and results of the columns that it has."""

    v: Buffer
    values: Buffer
    sinks: Buffer | None
    weights: Buffer
    corrections: Buffer
    part: Expr

    def _layout(self) -> None:
        """Who has what."""
        spec, a, c = self.spec, self.spec.attention, self.options.positions
        self.sets = [1 << (min(8, spec.rows - s) - 1).bit_length() for s in range(0, spec.rows, 8)]
        self.turns = c // (WARP // SHARE)
        self.each = padded(a.d) // SHARE
        self.width = vector(a.dv)
        pieces = a.dv // self.width
        fit = [g for g in (8, 4, 2) if g <= c and g * pieces <= WARP and pieces & (pieces - 1) == 0]
        self.groups = fit[0] if fit else 1
        self.turns_of_columns = ceil_div(pieces, WARP)
        self.part = T.Bind(self.lane % SHARE)
        self.group = T.Bind(self.lane // pieces % self.groups) if self.groups > 1 else 0

    def _own(self, s: int) -> Expr:
        """The row of a set of 8 that a lane has."""
        return s * 8 + T.shift_right(self.part, T.int32(3 - (self.sets[s].bit_length() - 1)))

    def _column(self, n: int) -> tuple[Expr, Expr]:
        """The first of some columns that a lane has, and whether there are such, or None."""
        pieces = self.spec.attention.dv // self.width
        if self.groups > 1:
            return self.lane % pieces * self.width, None
        piece = n * WARP + self.lane
        return piece * self.width, None if pieces % WARP == 0 else piece < pieces

    def _new_values(self, token: Expr) -> Buffer:
        """What a lane's columns have in a new token's value."""
        dv, width = self.spec.attention.dv, self.width
        values = local(self.turns_of_columns * width, "float32")
        for n in range(self.turns_of_columns):
            column, inside = self._column(n)
            begin = T.Bind(self.kv_head * dv + (column if inside is None else T.min(column, dv - width)))
            load_words(at(values, n * width), at(self.v, token, begin), width, early=True)
        return values

    def _begin(self) -> None:
        """The state before the first position; the new token, and the sink, are known to one warp each."""
        spec = self.spec
        self.maximum, self.sum = (local(len(self.sets), "float32") for _ in range(2))
        self.result = local(spec.rows * self.turns_of_columns * self.width, "float32")
        for i in range(spec.rows * self.turns_of_columns * self.width):
            store(self.result, T.float32(0), i)
        for s in range(len(self.sets)):
            store(self.maximum, T.float32(LOWEST), s)
            store(self.sum, T.float32(0), s)
        self.kept = local(spec.rows * self.each, "float32") if spec.rows * self.each <= MOST_QUERIES else None
        for j in range(spec.rows if self.kept is not None else 0):
            self._query(self.kept, j * self.each, j)
        with when(T.And(self.split == 0, self.warp == 0)):
            self._new()
        if self.sinks is not None:
            with when(T.And(self.split == 0, self.warp == 1)):
                for s in range(len(self.sets)):
                    store(self.maximum, self.sinks[self._head(self._own(s))], s)
                    store(self.sum, T.Select(self.lane < SHARE, T.float32(1), T.float32(0)), s)

    def _query(self, target: Buffer, offset: int, j: int) -> None:
        d, width = self.spec.attention.d, vector(self.spec.attention.d)
        for i in range(self.each // width):
            begin = j * padded(d) + (i * SHARE + self.part) * width
            if width == 4:
                load4(at(target, offset + 4 * i), at(self.queries, begin), "float32")
            else:
                store(target, self.queries[begin], offset + i)

    def _keys(self, keys: Buffer, offset: int, source: Buffer, base: Expr, dtype: str) -> None:
        """Read what a lane has of a key; q is zero where that is beyond the last number."""
        d, width = self.spec.attention.d, vector(self.spec.attention.d)
        for i in range(self.each // width):
            begin = (i * SHARE + self.part) * width
            if padded(d) != d:
                begin = T.min(begin, d - width)
            if width == 4:
                load4(at(keys, offset + 4 * i), at(source, base + (begin // 2 if dtype == "bfloat16" else begin)), dtype)
            else:
                store(keys, source[base + begin], offset + i)

    def _logits(self, keys: Buffer, turns: int) -> list[list[Expr]]:
        """For each of some keys, the logits of the rows that a lane has, one of each set."""
        spec, own = self.spec, sum(self.sets)
        totals, query = local(turns * own, "float32"), self.kept
        if query is None:
            query = local(self.each, "float32")
        for i in range(turns * own):
            store(totals, T.float32(0), i)
        for j in range(spec.rows):
            if self.kept is None:
                self._query(query, 0, j)
            offset = 0 if self.kept is None else j * self.each
            for t in range(turns):
                total = T.float32(0)
                for i in range(self.each):
                    total = T.Bind(total + query[offset + i] * keys[t * self.each + i])
                store(totals, total, t * own + j)
        found = list[list[Expr]]()
        for t in range(turns):
            found.append([])
            for s, n in enumerate(self.sets):
                call("moec_fold", _FOLD, at(totals, t * own + 8 * s), n)
                found[-1].append(T.Bind(softcapped(T.Bind(totals[t * own + 8 * s]), spec.attention.softcap)))
        return found

    def _new_logits(self, rows: Buffer, base: Expr) -> list[Expr]:
        """The logits of a key in shared memory, of the rows that a lane has."""
        keys = local(self.each, "float32")
        self._keys(keys, 0, rows, base, "float32")
        return self._logits(keys, 1)[0]

    def _new(self) -> None:
        """Begin with the new token: its weight is 1 against its own logit."""
        spec = self.spec
        logits = self._new_logits(self.new_key, 0)
        for s, logit in enumerate(logits):
            store(self.maximum, logit, s)
            store(self.sum, T.Select(self.lane < SHARE, T.float32(1), T.float32(0)), s)
        for n in range(self.turns_of_columns):
            column, mine = self._mine_of(n)
            with when(mine):
                for i in range(self.width):
                    stored = T.Bind(to_cache(self.values[n * self.width + i], self.dtype))
                    for j in range(spec.rows):
                        store(self.result, from_cache(stored, self.dtype), (j * self.turns_of_columns + n) * self.width + i)
                    with when(self.tile == 0):
                        store(self.v_pool, stored, self.new_page, self.kv_head, self.first_position % PAGE, column + i)

    def _mine_of(self, n: int) -> tuple[Expr, Expr]:
        """The first of some columns, and whether a lane is the one that begins with them."""
        column, inside = self._column(n)
        return column, T.bool(True) if inside is None and self.groups == 1 else self.group == 0 if inside is None else inside

    def _run(self) -> None:
        """Go through the warp's positions."""
        stages, warps, c = self.options.stages, self.options.warps, self.options.positions
        with strided(0, self.count, 1) as i:
            copy_wait(stages - 1)
            sync_warp()
            base = T.Bind(self.warp * self.region + i % stages * self.stage)
            self._softmax(self.first + i * warps, self._step_logits(base))
            sync_warp()
            self._accumulate(T.Bind(base + c * self.k_words))
            sync_warp()
            with when(i + stages < self.count):
                self._fetch(self.first + (i + stages) * warps, i % stages)
                self._look(i + stages + 1)
            copy_commit()

    def _step_logits(self, base: Expr) -> list[list[Expr]]:
        dtype = self.dtype if whole(self.spec.attention.d, self.dtype) else "float32"
        together = self.turns if self.turns * self.each <= MOST_KEYS else 1
        keys, found = local(together * self.each, "float32"), list[list[Expr]]()
        for first in range(0, self.turns, together):
            for t in range(together):
                row = (first + t) * (WARP // SHARE) + self.lane // SHARE
                self._keys(keys, t * self.each, self.memory, T.Bind(base + row * self.k_words), dtype)
            found += self._logits(keys, together)
        return found

    def _softmax(self, chunk: Expr, logits: list[list[Expr]]) -> None:
        """Turn logits into weights against the running maximum, and note what older weights lose by it."""
        c = self.options.positions
        here = [T.Bind(t * (WARP // SHARE) + self.lane // SHARE) for t in range(self.turns)]
        seen = [T.Bind(T.And(chunk * c + p >= self.start, chunk * c + p < self.cached)) for p in here]
        for s in range(len(self.sets)):
            values = [T.Bind(T.Select(seen[t], logits[t][s], T.float32(HIDDEN))) for t in range(self.turns)]
            peak: Any = values[0]
            for value in values[1:]:
                peak = T.max(peak, value)
            peak = T.Bind(T.max(self.maximum[s], call("moec_positions_max", _FOLD, peak, result="float32")))
            factor = T.Bind(T.exp(self.maximum[s] - peak))
            weights = [T.Bind(T.exp(value - peak)) for value in values]
            store(self.sum, sum(weights, self.sum[s] * factor), s)
            store(self.maximum, peak, s)
            row = T.Bind(self._own(s))
            with when(row < self.spec.rows):
                for p, weight in zip(here, weights, strict=True):
                    store(self.weights, weight, self.warp * self.spec.rows * c + row * c + p)
                store(self.corrections, factor, self.warp * self.spec.rows + row)

    def _accumulate(self, base: Expr) -> None:
        spec, c, width = self.spec, self.options.positions, self.width
        count = c // self.groups
        dtype = self.dtype if whole(spec.attention.dv, self.dtype) else "float32"
        values, weights = local(count * width, "float32"), local(count, "float32")
        for n in range(self.turns_of_columns):
            column, inside = self._column(n)
            column = T.Bind(column if inside is None else T.min(column, spec.attention.dv - width))
            for p in range(count):
                row = p * self.groups + self.group
                if width == 4:
                    where = base + row * self.v_words + (column // 2 if dtype == "bfloat16" else column)
                    load4(at(values, p * 4), at(self.memory, where), dtype)
                else:
                    store(values, self.memory[base + row * self.v_words + column], p)
            for j in range(spec.rows):
                begin = (self.warp * spec.rows + j) * c
                for p in range(0, count, 4 if self.groups == 1 else 1):
                    if self.groups == 1:
                        load4(at(weights, p), at(self.weights, begin + p), "float32")
                    else:
                        store(weights, self.weights[begin + p * self.groups + self.group], p)
                factor = T.Bind(self.corrections[self.warp * spec.rows + j])
                for i in range(width):
                    index = (j * self.turns_of_columns + n) * width + i
                    total = self.result[index] * factor
                    for p in range(count):
                        total = T.Bind(total + weights[p] * values[p * width + i])
                    store(self.result, total, index)
