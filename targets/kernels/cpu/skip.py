"""skip of `moec.compiler.ops`: which of a token's experts are worth running, decided in one pass over its K weights.

Sums and products are those of the definition, in its order and in float32, so that ties fall the same way.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.emit import Expr, Register, argument, prim_func, store
from moec.targets.kernels.cpu.loops import over_tokens, stack
from moec.targets.kernels.specs import SkipSpec


def skip_func(spec: SkipSpec, tokens: int | None) -> tirx.PrimFunc:
    """PrimFunc (weights float32 [T, K], ids int64 [T, K], [counts int64 [T, 1]], out weights [T, K], out ids [T, K])."""

    def build() -> None:
        count = tokens if tokens is not None else T.int64()
        weights = argument("weights", (count, spec.top_k), "float32")
        ids = argument("ids", (count, spec.top_k), "int64")
        counts = argument("counts", (count, 1), "int64") if spec.counts else None
        out_weights = argument("out_weights", (count, spec.top_k), "float32")
        out_ids = argument("out_ids", (count, spec.top_k), "int64")

        def token(t: Expr) -> None:
            row = stack((spec.top_k,))
            total, before, left = (Register("float32", 1) for _ in range(3))
            for register in (total, before, left):
                register.clear()
            with T.serial(spec.top_k) as k:
                store(row, weights[t, k], k)
                total.set(total.get() + row[k])
            with T.serial(spec.top_k) as k:
                weight = T.Bind(row[k])
                skipped = _skipped(spec, k, weight, row[0], before.get(), total.get(), None if counts is None else counts[t, 0])
                before.set(before.get() + weight)
                store(row, T.Select(skipped, T.float32(0), weight), k)
                store(out_ids, T.Select(skipped, T.int64(spec.experts), ids[t, k]), t, k)
                left.set(left.get() + row[k])
            one = T.float32(1)
            factor = T.Bind(T.Select(left.get() == total.get(), one, total.get() / left.get()) if spec.normalize else one)
            with T.serial(spec.top_k) as k:
                store(out_weights, row[k] * factor, t, k)

        over_tokens(count, 4 * spec.top_k, token)

    return prim_func(build)


def _skipped(spec: SkipSpec, k: Expr, weight: Expr, first: Expr, before: Expr, total: Expr, count: Expr | None) -> Expr:
    """Whether the slot k is skipped: comparisons with NaN fail."""
    rules = []
    if spec.ratio > 0:
        rules.append(weight < T.float32(spec.ratio) * first)
    if spec.top_p < 1:
        rules.append(before >= T.float32(spec.top_p) * total)
    if count is not None:
        rules.append(T.cast(k, "int64") >= count)
    if not rules:
        return T.bool(False)
    any_rule = rules[0]
    for rule in rules[1:]:
        any_rule = T.Or(any_rule, rule)
    return T.Bind(T.And(k > 0, any_rule))
