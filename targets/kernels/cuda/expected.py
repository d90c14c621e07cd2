"""How long the kernels of many tokens should take, relative to each other: a model of their cost, by which a sweep orders what it tries.

A tile of tokens of one expert costs as much as its products take, whether all of its columns have a token or not, but at least what its
weights take to be made bfloat16, which goes on at the same time; and something before and after. On 18 cells of four layers in 4 bits on an
H100, whose numbers these are, the best of the four candidates that it puts first is the best of all but once, where it is 5 % slower; the
first alone is 2 % slower on average, 9 % at most. Blocks of one warpgroup and tiles of more than 136 tokens were not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import exp, lgamma, log

from moec.targets.kernels.cuda.shape import Shape

BEGINNING, LEAST = 30.0, 72.0
"""What a tile costs before its products, and the columns whose products take as long as making its weights bfloat16 does."""

EXACT_BEGINNING, EXACT_COLUMNS = 35.0, 1.2
"""The same where sums get the scales, of smaller blocks of threads of which two share a multiprocessor, and what a column costs there."""

MANY = 400
"""Tokens of an expert from which on it has half a tile to spare, however they are spread."""


@cache
def expected_tiles(experts: int, top_k: int, tokens: int, size: int) -> float:
    """Tiles of `size` tokens, on average over uniform routing: the tokens of an expert follow a binomial distribution.

    >>> round(expected_tiles(8, 2, 4096, 64)), expected_tiles(4, 4, 10, 8)
    (132, 8)
    """
    share = top_k / experts
    if share >= 1:
        return experts * -(-tokens // size)
    if tokens * share > MANY:
        return experts * (tokens * share / size + 0.5)
    total = 0.0
    for n in range(1, tokens + 1):
        ways = lgamma(tokens + 1) - lgamma(n + 1) - lgamma(tokens - n + 1)
        total += exp(ways + n * log(share) + (tokens - n) * log(1 - share)) * -(-n // size)
    return experts * total


NARROW_COLUMNS = 0.5
"""What a column of E4M3 costs, by the arithmetic of the tensor cores alone; nothing is made of its weights. Not fitted to measurements."""


def cost(experts: int, top_k: int, tokens: int, options: Mapping[str, int]) -> float:
    """The cost of options of `Shape`, in products of one column with a tile's rows."""
    size, columns = options["tokens"], options["tokens"] * options["terms"]
    tiles = expected_tiles(experts, top_k, tokens, size)
    if "chunk" in options:
        return tiles * (BEGINNING + NARROW_COLUMNS * columns)
    if options["exact"]:
        return tiles * (EXACT_BEGINNING + EXACT_COLUMNS * columns)
    shape = Shape.of(options)
    # rows of a multiprocessor at a time, times 256; that more of them hide the beginning and end of tiles was not measured
    together = min(1.0, shape.rows * shape.residency / 256)
    full = BEGINNING / together + max(LEAST, columns)
    if len(shape.columns) == 1:
        return tiles * full
    halves = expected_tiles(experts, top_k, tokens, size // 2)
    return (halves - tiles) * full + (2 * tiles - halves) * (BEGINNING / together + max(LEAST, columns / 2))
