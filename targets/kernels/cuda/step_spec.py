"""What the kernel of attention of single tokens is told: the op, what is done to q and k before, and how the work is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moec.targets.kernels.cuda.arrival import SEMAPHORES
from moec.targets.kernels.cuda.attention_parts import PAGE
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.specs import AttentionSpec, NormSpec

SHARE = 8
"""Lanes that compute the logits of a position together, so that a warp has four positions at a time."""

MOST_ROWS = 16
MOST_SPLITS = 32
MOST_TOGETHER = 4  # thread blocks of a multiprocessor
FEWEST = 9  # tokens of a call of any number: fewer have functions of their own


@dataclass(frozen=True)
class StepSpec:
    """Attention of one token, or of several that attend each for itself.

    Args:
        attention: the op.
        q_norm, k_norm: what normalises q and k, each head (size d) or the whole row (size H*d); None where nothing does.
        rope: whether q and k are turned by the token's angles, afterwards.
        tokens: of a call; None: any number, of whose blocks those of several tokens are left to `attend_product`.
    """

    attention: AttentionSpec
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    rope: bool = False
    tokens: int | None = 1

    @property
    def group(self) -> int:
        """Heads that share a KV head."""
        return self.attention.heads // self.attention.kv_heads

    @property
    def rows(self) -> int:
        """Heads of a thread block."""
        return min(self.group, MOST_ROWS)

    @property
    def tiles(self) -> int:
        """Thread blocks of a KV head that split its heads."""
        return ceil_div(self.group, self.rows)

    @property
    def columns(self) -> int:
        """Thread blocks of a part of the context."""
        return self.attention.kv_heads * self.tiles


@dataclass(frozen=True)
class StepOptions:
    """How the work is cut. A thread block has some part of the context, of which each of its warps takes a few positions at a time.

    Args:
        warps: of a thread block.
        positions: that a warp works on at a time, 4 or 8.
        stages: so many times these positions are on their way into shared memory.
        splits: the most parts of the context.
        least: positions that a part has before there is another one.
        alone: positions of which there is one part, however they would be cut: adding parts up takes longer than this many.
        all_parts: the most parts of all tokens of a call together, where their number is known only then; 0: each token has `splits`.
        together: thread blocks that share a multiprocessor, or 0.
    """

    warps: int
    positions: int
    stages: int
    splits: int
    least: int
    all_parts: int = 0
    together: int = 0
    alone: int = 0

    @classmethod
    def of(cls, spec: StepSpec, dtype: str, memory: int, multiprocessors: int, tokens: int = 1) -> StepOptions:
        """Options for a GPU of so many multiprocessors, whose thread blocks get `memory` bytes, and for calls of at most `tokens`.

        A thread block has most of a multiprocessor's memory, so that more of them than multiprocessors would take turns: 2048 tokens
        of 16 heads take an H100 13.4 us in 8 parts and 17.2 us in 16. 64 positions are one turn of 8 warps, which takes 8 heads that share
        them less than 1 us, and adding up two parts takes 1.6. Where tokens make more of them than there are multiprocessors,
        up to `MOST_TOGETHER` share one, each with so much less memory and fewer warps (16 have 128 registers a lane).
        """
        tokens, shared = spec.tokens or tokens, spec.rows > 1
        most = 16 if shared and spec.columns > 2 else MOST_SPLITS  # parts of many heads take long to add up
        parts = multiprocessors // spec.columns if spec.columns < SEMAPHORES else 1
        fewest = tokens if spec.tokens is not None else min(tokens, FEWEST)  # tokens of a call that takes these options
        options = cls(8, 8, 2, max(1, min(most, parts // fewest)), 64 if shared else 128, alone=128 if shared else 0)
        if spec.tokens is None:
            options = replace(options, all_parts=parts)
        together = min(ceil_div(spec.columns * tokens, multiprocessors), MOST_TOGETHER)
        if together > 1:
            options = replace(options, warps=min(8, 16 // together // 2 * 2), together=together)
        smaller = [options, replace(options, stages=1), replace(options, positions=4, stages=1), replace(options, warps=4, stages=1)]
        smaller += [replace(options, warps=4, positions=4, stages=1), replace(options, warps=2, positions=4, stages=1)]
        fits = (o for o in smaller if 4 * o.words(spec, dtype) * max(together, 1) <= memory)
        return next(fits, replace(smaller[-1], together=0))

    @property
    def threads(self) -> int:
        return 32 * self.warps

    def words(self, spec: StepSpec, dtype: str) -> int:
        """Words of a thread block's shared memory."""
        sizes = [self.warps * self.region(spec, dtype), *([self.warps * spec.rows] * 2)]  # results, and their statistics
        sizes += [self.warps * spec.rows * self.positions, self.warps * spec.rows, 2 * self.warps]  # weights, corrections, sums of squares
        sizes += [self.warps * padded(spec.attention.d)] if spec.tokens != 1 else []  # keys of tokens before
        sizes += [2 * self.warps] if spec.tokens is None else []  # sums of squares of tokens that are left
        return sum(ceil_div(size, 4) * 4 for size in (*sizes, spec.rows * padded(spec.attention.d), padded(spec.attention.d)))

    def region(self, spec: StepSpec, dtype: str) -> int:
        """Words of a warp: its stages, and in the end its results."""
        a = spec.attention
        stage = self.positions * (row_words(a.d, dtype) + row_words(a.dv, dtype))
        return max(self.stages * ceil_div(stage, 4) * 4, ceil_div(spec.rows * a.dv, 4) * 4)

    def __post_init__(self) -> None:
        assert PAGE % self.positions == 0 and self.positions % 4 == 0, self.positions
        assert self.splits <= MOST_SPLITS


def vector(size: int) -> int:
    """Neighbours that a lane reads at once."""
    return 4 if size % 4 == 0 else 1


def padded(d: int) -> int:
    """Numbers of a row of q, with zeros up to what the lanes of a position read."""
    return ceil_div(d, SHARE * vector(d)) * SHARE * vector(d)


def whole(size: int, dtype: str) -> bool:
    """Whether rows of the cache consist of pieces of 16 bytes, which are copied as they are; others are copied one by one, as float32."""
    return size % (4 if dtype == "float32" else 8) == 0


def row_words(size: int, dtype: str) -> int:
    """Words of a row in shared memory."""
    return size // 2 if whole(size, dtype) and dtype != "float32" else size
