"""The best of some values, one after the other, by a warp that has them in registers: lane l has `each` of them from l * each on.

Ties go to the lower index, and NaN counts as the largest number, so that indices are valid whatever the values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Expr, const, local, store, when
from moec.targets.kernels.cuda.intrinsics import call
from moec.targets.kernels.cuda.warp import warp_from

HIGHEST, LOWEST, MASKED = 3.0e38, -2.0e38, -3.0e38  # what compares as NaN, as -inf, and below all that a value can be

# Unsigned integers in the order of the values, so that one instruction finds the highest one of a warp; 0 is below all.
_ORDER = r"""
#ifndef MOEC_ORDER
#define MOEC_ORDER
__device__ __forceinline__ unsigned int moec_order(float x) {
  const unsigned int u = __float_as_uint(x + 0.f);  // 0 for -0
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ int moec_winner(unsigned int key) {
  const unsigned int most = __reduce_max_sync(0xffffffffu, key);
  return __ffs(__ballot_sync(0xffffffffu, key == most)) - 1;
}
#endif
"""


def comparable(value: Expr) -> Expr:
    """A value within the bounds: -inf as `LOWEST`, NaN as `HIGHEST`."""
    value, highest, lowest = T.Bind(value), T.float32(HIGHEST), T.float32(LOWEST)
    # A comparison with NaN fails, so NaN takes the last branch of both.
    return T.Bind(T.Select(value <= lowest, lowest, T.Select(value < highest, value, highest)))


class Choice:
    """Values that are `comparable` (or MASKED), of which the best are taken one after the other.

    Args:
        values: float32 of this lane.
        present: whether a lane has a value; it has all of them unless given.
    """

    def __init__(self, values: Sequence[Expr], lane: Expr, present: Callable[[int], Expr] | None = None) -> None:
        self._each, self._lane = len(values), lane
        self._keys = local(self._each, "uint32")
        for i, value in enumerate(values):
            key = call("moec_order", _ORDER, value, result="uint32")
            store(self._keys, key if present is None else T.Select(present(i), key, const(0, "uint32")), i)

    def take(self, scores: Sequence[Expr]) -> tuple[Expr, Expr]:
        """The index (int32) of the best value, which is not taken again, and its score, one of each lane's: both in each lane."""
        best, where, score = local(1, "uint32"), local(1, "int32"), local(1, "float32")
        store(best, self._keys[0], 0)
        store(where, const(0, "int32"), 0)
        store(score, scores[0], 0)
        for i in range(1, self._each):
            with when(self._keys[i] > best[0]):
                store(best, self._keys[i], 0)
                store(where, const(i, "int32"), 0)
                store(score, scores[i], 0)
        winner = T.Bind(call("moec_winner", _ORDER, best[0], result="int32"))
        for i in range(self._each):
            with when(T.And(self._lane == winner, where[0] == i)):
                store(self._keys, const(0, "uint32"), i)
        return T.Bind(winner * self._each + warp_from(where[0], winner, "int32")), warp_from(score[0], winner, "float32")
