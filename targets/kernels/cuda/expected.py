"""How long the kernels of many tokens should take, relative to each other: a model of their cost, by which a sweep orders what it tries.

A tile of tokens of one expert costs as much as its weights take to be read and made bfloat16, whatever the tokens in it, and as much as
its products take, whether all of its columns have a token or not. Of the records of an H100, which it knows nothing of but one number,
the best of the four candidates that it puts first is 0.1 % slower than the best of all on average, 0.6 % at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import exp, lgamma, log

WEIGHTS = 40.0
"""Columns of a tile whose products take as long as its weights."""

EXACT_WEIGHTS, EXACT_COLUMNS = 1.15, 1.3
"""By how much weights and products take longer where sums get the scales."""

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


def cost(experts: int, top_k: int, tokens: int, options: Mapping[str, int]) -> float:
    """The cost of options of `gathered.Shape`, in products of one column with a tile's rows."""
    exact, size = bool(options["exact"]), options["tokens"]
    tiles = expected_tiles(experts, top_k, tokens, size)
    halves = options["tiles"] > 1 and size % 16 == 0  # as `Shape.columns`: of the last tile of an expert, half may do
    columns = expected_tiles(experts, top_k, tokens, size // 2) * (size // 2) if halves else tiles * size
    weights = WEIGHTS * (EXACT_WEIGHTS if exact else 1.0)
    return tiles * weights + columns * options["terms"] * (EXACT_COLUMNS if exact else 1.0)
