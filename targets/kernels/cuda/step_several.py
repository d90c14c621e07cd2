"""Several tokens of a call, each of which has thread blocks of its own: where a token is, and what it sees of the others.

The cache is read as far as earlier calls have written it. Tokens of the call that come before in the same sequence, as in a short prompt,
are taken from the call's keys and values instead, normalised and turned once more by each warp that attends to one: no thread block
waits for another. In a batch of decoding sequences there are none.
"""

from __future__ import annotations

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.attend_product import together
from moec.targets.kernels.cuda.attention_parts import from_cache, joined, to_cache
from moec.targets.kernels.cuda.emit import WARP, Buffer, Expr, at, local, store, strided, when
from moec.targets.kernels.cuda.intrinsics import call
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.loads import load_words
from moec.targets.kernels.cuda.step_loop import Loop
from moec.targets.kernels.cuda.step_spec import SHARE, padded, vector
from moec.targets.kernels.cuda.warp import sync_warp, warp_sum

UNDER_WAY = 4  # pieces of a row that a lane reads at a time

_LOCATE = r"""
#ifndef MOEC_LOCATE
#define MOEC_LOCATE
__device__ __forceinline__ void moec_locate(int* out, const void* blocks, int count, int token) {
  const int4* b = (const int4*)blocks;
  const int lane = threadIdx.x % 32;
  int own = -1;
  for (int i = 0; i < count; i += 32)
    own += __popc(__ballot_sync(0xffffffffu, i + lane < count && b[min(i + lane, count - 1)].y <= token));
  const int4 mine = b[own];
  int first = own;
  for (int i = 0; i <= own; i += 32) {
    const unsigned int same = __ballot_sync(0xffffffffu, i + lane <= own && b[min(i + lane, own)].x == mine.x);
    if (same) { first = i + __ffs(same) - 1; break; }
  }
  const int4 begin = b[first];
  out[0] = own; out[1] = mine.x; out[2] = mine.z; out[3] = mine.w + token - mine.y; out[4] = begin.y; out[5] = begin.w;
}
__device__ __forceinline__ int moec_each(int chunks, int all, int tokens, int most, int least) {
  const int parts = max(1, min(all / tokens, most));
  return max((max(chunks, 0) + parts - 1) / parts, least);
}
#endif
"""


class Several(Loop):
    """The state of a token: the first token of its sequence in the call, and how much of the sequence the cache had before."""

    blocks: Buffer
    first_token: Expr
    left: Expr | None
    earlier_keys: Buffer

    def _locate(self, token: Expr, blocks: Expr) -> None:
        """Find the token's block, one of so many."""
        self.token, count = T.Bind(T.cast(token, "int32")), T.Bind(T.cast(blocks, "int32"))
        found = local(6, "int32")
        call("moec_locate", _LOCATE, at(found, 0), at(self.blocks, 0, 0), count, self.token)
        block, self.slot, tokens, self.first_position, self.first_token, self.cached = (T.Bind(found[i]) for i in range(6))
        self.left = None
        if self.spec.tokens is None:
            most = together(self.spec.attention)
            shared = joined(self.blocks, most, T.Bind(block // most * most), count) if most > 1 else T.int32(1)
            self.left = T.Bind(T.Or(shared > 1, tokens > 1))

    def _each(self, chunks: Expr, tokens: Expr) -> Expr:
        """Chunks of a part of the context, of which tokens that are not known before have the fewer the more of them there are."""
        o, count = self.options, T.cast(tokens, "int32")
        least = ceil_div(o.least, o.positions)
        return T.Bind(call("moec_each", _LOCATE, chunks, o.all_parts, count, o.splits, least, result="int32"))

    def _earlier(self) -> None:
        """Attend to the tokens of the call that come before in the same sequence; the warps of the first part take turns."""
        spec, warps, c = self.spec, self.options.warps, self.options.positions
        begin = T.Bind(T.max(self.cached, self.start))
        end = T.Bind(T.Select(self.split == 0, self.first_position, begin))
        with strided(begin + self.warp, end, warps) as position:
            token = T.Bind(self.first_token + position - self.cached)
            self._earlier_key(token)
            sync_warp()
            logits = self._new_logits(self.earlier_keys, self.warp * padded(spec.attention.d))
            values = self._new_values(token)
            for s, logit in enumerate(logits):
                peak = T.Bind(T.max(self.maximum[s], logit))
                factor, weight = T.Bind(T.exp(self.maximum[s] - peak)), T.Bind(T.exp(logit - peak))
                store(self.sum, self.sum[s] * factor + T.Select(self.lane < SHARE, weight, T.float32(0)), s)
                store(self.maximum, peak, s)
                row = T.Bind(self._own(s))
                with when(row < spec.rows):
                    store(self.weights, weight, (self.warp * spec.rows + row) * c)
                    store(self.corrections, factor, self.warp * spec.rows + row)
            sync_warp()
            for n in range(self.turns_of_columns):
                mine = T.Bind(self._mine_of(n)[1])
                for j in range(spec.rows):
                    factor = T.Bind(self.corrections[self.warp * spec.rows + j])
                    weight = T.Bind(T.Select(mine, self.weights[(self.warp * spec.rows + j) * c], T.float32(0)))
                    for i in range(self.width):
                        index = (j * self.turns_of_columns + n) * self.width + i
                        value = from_cache(T.Bind(to_cache(values[n * self.width + i], self.dtype)), self.dtype)
                        store(self.result, self.result[index] * factor + weight * value, index)
            sync_warp()

    def _earlier_key(self, token: Expr) -> None:
        """Leave the key of a token of the call in the warp's memory, as the cache has it."""
        spec, d = self.spec, self.spec.attention.d
        turn, key = self._angles(token), self._pairs(self.k, self.kv_head * d, (token,))
        self._normalise(key, spec.k_norm, self.weights_of_k, lambda: self._square(token, spec.attention.kv_heads * d))
        self._turn(key, turn)
        for index, value in self._elements(key):
            kept = from_cache(T.Bind(to_cache(value, self.dtype)), self.dtype)
            store(self.earlier_keys, kept, self.warp * padded(d) + index)

    def _square(self, token: Expr, size: int) -> Expr:
        """The sum of squares of all heads of a token's key, which a warp finds for itself."""
        width, total = vector(size), local(1, "float32")
        pieces, values = size // width, local(UNDER_WAY * width, "float32")
        store(total, T.float32(0), 0)
        with T.serial(ceil_div(pieces, WARP * UNDER_WAY)) as turn:
            for n in range(UNDER_WAY):
                piece = T.Bind((turn * UNDER_WAY + n) * WARP + self.lane)
                for i in range(width):
                    store(values, T.float32(0), n * width + i)
                with when(piece < pieces):
                    load_words(at(values, n * width), at(self.k, token, piece * width), width, early=True)
            store(total, sum((values[i] * values[i] for i in range(UNDER_WAY * width)), total[0]), 0)
        return warp_sum(total[0])
