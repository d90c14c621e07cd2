"""skip of `moec.compiler.ops`: a thread decides which of a token's experts do not run.

Sums and products are those of the definition, in its order and in float32, so that ties fall the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Expr, Shared, argument, kernel, local, store, when
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.specs import SkipSpec

THREADS = 64


def skip_func(spec: SkipSpec, tokens: int | None) -> tirx.PrimFunc:
    """PrimFunc (weights float32 [T, K], ids int64 [T, K], [counts int64 [T, 1]], out weights [T, K], out ids [T, K])."""

    def arguments() -> Any:
        count = tokens if tokens is not None else T.int64()
        weights = argument("weights", (count, spec.top_k), "float32")
        ids = argument("ids", (count, spec.top_k), "int64")
        counts = argument("counts", (count, 1), "int64") if spec.counts else None
        out_weights = argument("out_weights", (count, spec.top_k), "float32")
        return count, weights, ids, counts, out_weights, argument("out_ids", (count, spec.top_k), "int64")

    def body(operands: Any, _: Shared, block: Expr, thread: Expr) -> None:
        count, weights, ids, counts, out_weights, out_ids = operands
        grid_launch()
        grid_wait()
        token = T.Bind(block * THREADS + thread)
        with when(token < count):
            slots = range(spec.top_k)
            rows = [[T.Bind(array[token, k]) for k in slots] for array in (weights, ids)]
            found = skip_slots(spec, rows[0], rows[1], None if counts is None else counts[token, 0])
            for k in slots:
                store(out_weights, found[0][k], token, k)
                store(out_ids, found[1][k], token, k)

    return kernel("skip", THREADS, arguments, lambda o: [(o[0] + THREADS - 1) // THREADS], body)


def skip_slots(
    spec: SkipSpec, weights: Sequence[Expr], ids: Sequence[Expr], count: Expr | None = None
) -> tuple[list[Expr], list[Expr]]:  # fmt: skip
    """The weights (float32) and ids (int64) of a token's slots, skipped ones among them, from what the router chose."""
    total = before = left = T.float32(0)
    for weight in weights:
        total = T.Bind(total + weight)
    kept, found = local(spec.top_k, "float32"), []  # in registers, so that no sum is taken for another one, which NaN is not
    for k, (weight, own) in enumerate(zip(weights, ids, strict=True)):
        skipped = _skipped(spec, k, weight, weights[0], before, total, count)
        before = T.Bind(before + weight)
        store(kept, T.Select(skipped, T.float32(0), weight), k)
        found.append(T.Bind(T.Select(skipped, T.int64(spec.experts), own)))
        left = T.Bind(left + kept[k])
    one = T.float32(1)
    factor = T.Bind(T.Select(left == total, one, total / left) if spec.normalize else one)
    return [kept[k] * factor for k in range(spec.top_k)], found


def _skipped(spec: SkipSpec, k: int, weight: Expr, first: Expr, before: Expr, total: Expr, count: Expr | None) -> Expr:
    """Whether the slot k is skipped: comparisons with NaN fail."""
    rules = []
    if spec.ratio > 0:
        rules.append(weight < T.float32(spec.ratio) * first)
    if spec.top_p < 1:
        rules.append(before >= T.float32(spec.top_p) * total)
    if count is not None:
        rules.append(T.int64(k) >= count)
    if not rules or k == 0:
        return T.bool(False)
    any_rule = rules[0]
    for rule in rules[1:]:
        any_rule = T.Or(any_rule, rule)
    return T.Bind(any_rule)
