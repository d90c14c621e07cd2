"""The size of a block's product of many tokens, and what it needs: data only, no compiler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moec.targets.kernels.cuda.experts_layout import Stack
from moec.targets.kernels.cuda.layout import BLOCK, FragmentLayout, ceil_div

LEAST_STAGES = 3  # of a ring: one that is read, one that products may still read, and one on its way
LARGE = 136  # tokens of a tile beyond which stages leave little memory
STAGED = 64  # tokens whose results lie in shared memory at a time, where it is scarce


@dataclass(frozen=True)
class Shape:
    """The size of a block's product.

    Args:
        tokens: N, a multiple of 8.
        tiles: of 64 rows of a warpgroup.
        stages: of activations, at most; where they are enough for all columns, no thread waits for others between blocks.
        terms: of bfloat16 that add up to an activation.
        exact: whether codes are multiplied before their scales.
        residency: blocks that are to fit on a multiprocessor, which limits their registers.
        depth: sets of registers for weights: all but one are on their way.
        batch: steps whose weights are made ready before their products start, so that few tokens wait less often.
        multiprocessors: of the GPU, for blocks of threads that stay for many tiles; 0 for one block a tile.
        cluster: blocks that share activations, 1, 2 or 4, which are in images then; 0 for activations as they are.
        ring: sets of weights in shared memory, of which all but two are on their way from memory, with a cluster; 0 for registers alone.
        groups: warpgroups of a block, 1 or 2: blocks of one wait for each other less, where two of them share a multiprocessor.
        halved: whether stages have 64 columns and not 128, with a cluster: more of them are on their way in the same memory.
    """

    tokens: int = 64
    tiles: int = 1
    stages: int = 4
    terms: int = 1
    exact: bool = True
    residency: int = 1
    depth: int = 2
    batch: int = 1
    multiprocessors: int = 132
    cluster: int = 0
    ring: int = 0
    groups: int = 2
    halved: bool = False

    @classmethod
    def of(cls, options: Mapping[str, int]) -> Shape:
        """The shape that options of `space` are, a `NarrowShape` if they say how many columns it has at a time."""
        fields = {**options, "exact": bool(options["exact"]), "halved": bool(options.get("halved"))}
        return NarrowShape(**fields) if "chunk" in options else cls(**fields)  # type: ignore[arg-type]

    @property
    def narrow(self) -> bool:
        """Whether activations are E4M3 (`narrow`) and not bfloat16."""
        return False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * self.groups

    @property
    def block_tiles(self) -> int:
        """Tiles of 16 rows of weights of a block."""
        return 4 * self.groups * self.tiles

    @property
    def rows(self) -> int:
        """Rows of weights of a block."""
        return 16 * self.block_tiles

    @property
    def staged(self) -> int:
        """Tokens whose results lie in shared memory at a time, on their way out."""
        return self.tokens if self.groups == 2 and self.tokens <= LARGE else min(self.tokens, STAGED)

    @property
    def stages_of_block(self) -> int:
        """Stages of a block of columns."""
        return 2 if self.halved else 1

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage."""
        return self.terms * self.tokens * BLOCK * 2 // self.stages_of_block

    def for_columns(self, k: int) -> Shape:
        """The shape with no more stages than k columns have a use for."""
        return replace(self, stages=min(self.stages, max(ceil_div(k, BLOCK) * self.stages_of_block, LEAST_STAGES)))

    @property
    def words(self) -> int:
        """Words of shared memory, those included that bring it to a multiple of 1024 bytes."""
        return self.stages * self.stage_bytes // 4 + 256

    @property
    def columns(self) -> tuple[int, ...]:
        """How many columns products have: all, or half of them for the last tile of an expert, which may have few tokens."""
        return (self.tokens // 2, self.tokens) if (self.tiles > 1 or self.tokens > LARGE) and self.tokens % 16 == 0 else (self.tokens,)

    @property
    def taken(self) -> bool:
        """Whether blocks of threads take tiles when they have time for them, and not by their number.

        Of clusters, fewer may run at once than there would be multiprocessors for: those that begin late must find nothing left.
        """
        return self.multiprocessors > 0

    @property
    def together(self) -> int:
        """Tiles that run with the same rows of weights at about the same time, where tokens are many: 1024 tokens or so."""
        return 8 if self.tiles > 1 else 4 if self.tokens > LARGE else 1

    @property
    def sums(self) -> int:
        """Sums of a thread for 64 rows."""
        return self.tokens // 2

    @property
    def barrier_words(self) -> int:
        """Words of the barriers of the stages."""
        return 4 * self.stages if self.cluster else 0

    def lane_words(self, layout: FragmentLayout) -> int:
        """Words of 16 rows of weights that a lane has at a time."""
        return layout.unit_words

    def ring_words(self, stack: Stack) -> int:
        """Words of a ring of weights."""
        return self.ring * self.tiles * self.threads * max(self.lane_words(layout) for layout in stack.classes)

    def hidden_width(self, tile_rows: int) -> int:
        """Words of a token's hidden values of 64 rows, padded against conflicts; 16 rows of weights make `tile_rows` of them."""
        return 2 * tile_rows + 4

    def hidden_words(self, tile_rows: int) -> int:
        """Words by way of which hidden values are written."""
        return self.groups * self.staged * self.hidden_width(tile_rows)

    def output_words(self, dtype: str) -> int:
        """Words by way of which outputs are written."""
        return self.groups * self.staged * self.output_width(dtype)

    @staticmethod
    def output_width(dtype: str) -> int:
        """Words of a token's outputs of 64 rows, padded."""
        return (64 if dtype == "float32" else 32) + 4

    def shared_words(self, stack: Stack, results: int) -> int:
        """Words of shared memory of a kernel whose results are written by way of so many; stages are those `for_columns`."""
        return self.words + results + self.barrier_words + self.ring_words(stack) + 4 * self.taken


@dataclass(frozen=True)
class NarrowShape(Shape):
    """The size of a block's product of weights and activations that are both E4M3.

    Sums of a block of columns get their scales in float32, as many columns (tokens) at a time as there are registers for.

    Args:
        chunk: columns at a time.
        buffers: sets of registers for them, 1 or 2; of 2, one is scaled while the other is summed up.
    """

    chunk: int = 64
    buffers: int = 2

    @property
    def narrow(self) -> bool:
        return True

    @property
    def data_bytes(self) -> int:
        """Bytes of the numbers of a stage."""
        return self.tokens * BLOCK

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage: numbers, and a scale of each token."""
        return self.data_bytes + 4 * self.tokens

    @property
    def columns(self) -> tuple[int, ...]:
        return (self.tokens,)

    def lane_words(self, layout: FragmentLayout) -> int:
        return layout.block_words // 32

    def hidden_width(self, tile_rows: int) -> int:
        """Words of a token's hidden values of a block of threads, which has 128 of them for a scale."""
        return self.block_tiles * tile_rows // 2 + 4

    def hidden_words(self, tile_rows: int) -> int:
        return self.tokens * self.hidden_width(tile_rows)
