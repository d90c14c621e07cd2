"""Which experts a few tokens run, and for which slots, as each block finds it for itself."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Buffer, Expr, Shared, at, const, store, strided, sync
from moec.targets.kernels.cuda.intrinsics import call
from moec.targets.kernels.cuda.layout import ceil_div

NONE = -1

# The first warp goes through the slots, 32 at a time. What has a rank is in the table; of the others the first of each kind get the next.
_RANKS = r"""
#ifndef MOEC_RANKS
#define MOEC_RANKS
template <typename Id>
__device__ __forceinline__ void moec_ranks(
    const Id* ids, int tokens, int top_k, int experts, int* table, int* expert, int* slot, int* count) {
  const int lane = threadIdx.x & 31, slots = tokens * top_k;
  int known = 0;
  for (int base = 0; base < slots; base += 32) {
    const int s = base + lane, t = s / top_k;
    const long long e = s < slots ? (long long)ids[s] : -1;
    const bool valid = e >= 0 && e < experts;
    int again = 0;  // a token that runs an expert twice has two ranks
    if (valid) for (int j = t * top_k; j < s; ++j) again += ids[j] == ids[s];
    const int key = valid ? (int)e * top_k + again : -1;
    int rank = valid ? table[key] : 0;
    __syncwarp();
    const unsigned int alike = __match_any_sync(0xffffffffu, valid && rank < 0 ? key : -1 - lane);
    const bool leads = valid && rank < 0 && __ffs(alike) - 1 == lane;
    const unsigned int leaders = __ballot_sync(0xffffffffu, leads);
    const int own = known + __popc(leaders & ((1u << lane) - 1));
    if (leads) { table[key] = own; expert[own] = (int)e; }
    known += __popc(leaders);
    __syncwarp();
    if (valid) slot[table[key] * tokens + t] = s;
  }
  if (lane == 0) *count = known;
}
#endif
"""


class Routing:
    """Which experts run, and for which slots: of one token they are its slots, of several they are found anew by each block.

    A rank is an expert with the slots that run it, at most one a token; `slot_of(rank, token)` is NONE where a token does not.

    Args:
        ids: [T, k], int32 or int64.
        memory: has `words(T, k, E)` left.
    """

    def __init__(self, ids: Buffer, experts: int, memory: Shared, thread: Expr, threads: int) -> None:
        self._ids, self._experts = ids, experts
        self._tokens, self._top_k = (int(size) for size in ids.shape)
        if self._tokens == 1:
            return
        count = self._tokens * self._top_k
        table = memory.take((experts * self._top_k,), "int32")
        self._expert, self._slot = memory.take((count,), "int32"), memory.take((count, self._tokens), "int32")
        self._count = memory.take((1,), "int32")
        with strided(thread, experts * self._top_k, threads) as i:
            store(table, const(NONE, "int32"), i)
        with strided(thread, count * self._tokens, threads) as i:
            store(self._slot, const(NONE, "int32"), i // self._tokens, i % self._tokens)
        sync()
        with T.If(thread < 32), T.Then():
            addresses = (at(b, *[0] * len(b.shape)) for b in (table, self._expert, self._slot, self._count))
            call("moec_ranks", _RANKS, at(ids, 0, 0), self._tokens, self._top_k, experts, *addresses)
        sync()

    @staticmethod
    def words(tokens: int, top_k: int, experts: int) -> int:
        """Words of a block's memory."""
        count = tokens * top_k
        sizes = (experts * top_k, count, count * tokens, 1)
        return 0 if tokens == 1 else sum(ceil_div(size, 4) * 4 for size in sizes)

    @property
    def count(self) -> Expr:
        """Ranks (of one token: its slots, of which some may not run)."""
        return const(self._top_k, "int32") if self._tokens == 1 else self._count[0]

    def expert(self, rank: Expr) -> Expr:
        """The expert of a rank, NONE where the slot of a single token has none."""
        if self._tokens > 1:
            return self._expert[rank]
        expert = T.Bind(T.cast(self._ids[0, rank], "int64"))  # int32 would take 2^32 for 0
        return T.Select(T.And(expert >= 0, expert < self._experts), T.cast(expert, "int32"), const(NONE, "int32"))

    def slot_of(self, rank: Expr, token: Expr) -> Expr:
        """The slot in which a token runs the expert of a rank."""
        return T.cast(rank, "int32") if self._tokens == 1 else self._slot[rank, token]
