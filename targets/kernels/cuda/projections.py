"""projections: rows times several packed matrices, [residual addition,] [normalisation,] products, in one kernel. For 1, 2, 4 or 8 tokens.

    sum  = x + residual                     float32 [T, K], if there is a residual
    row  = norm(sum) * weight (+ bias)      float32 [T, K], if there is a norm
    out_i = row @ W_i^T (+ b_i)             float32 [T, N_i], each W_i of a format of its own

A small matrix is limited by latency, not by bandwidth, so what counts is the chain from the moment that the kernel before has ended:

 1. Weights are asked for first, and so are the norm's; they are on their way while the kernel before this one still runs.
 2. Each warp reads the columns of x that it multiplies and stages them, times the norm's weight but not yet divided by the row's length,
    which divides the results instead, so that no warp waits for another.
 3. Activations are integers of 24 bits, and integer codes meet them exactly as bytes (`fixed_point.py`): where they became bfloat16,
    that took longer than the weights took to arrive. Weights in floating point meet activations of two terms of bfloat16.
 4. The warps of a block share the columns out (`splits`), and each multiplies several tiles of rows at once, so that one product waits for
    none before it; their sums meet in shared memory at the one barrier, and a thread adds up and writes an output.

Several tokens are more columns of the same products (`projections_columns`), so that weights are read and made into operands once. Each
block stages all tokens for itself, which limits how many blocks there should be (`ProjectionsSpec.suits`).

Blocks are dealt to the matrices by ranges. Matrices of one format are one piece of code, which picks its arrays by the block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx

from moec.targets.kernels.cuda.calls import Gpu
from moec.targets.kernels.cuda.emit import WARP, Expr, Shared, argument, kernel, sync
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import ROWS, ceil_div
from moec.targets.kernels.cuda.matrices import MatricesSpec, Projection, in_ranges
from moec.targets.kernels.cuda.projections_columns import TOKENS
from moec.targets.kernels.cuda.projections_matrix import Matrices
from moec.targets.kernels.cuda.projections_row import Row
from moec.targets.kernels.specs import NormSpec

MOST_WARPS = 16
LANE_BYTES = 96  # of weights that a lane has under way, at most: 24 registers
MOST_TILES = 12  # of a block, beyond which two blocks a multiprocessor are better: a lm head of 3144 tiles takes 18.2 us, with 24 19.7


@dataclass(frozen=True)
class ProjectionsSpec(MatricesSpec):
    """The kernel for some matrices [N_i, K].

    Args:
        norm: of the whole row (one group).
        written: whether the normalised row is a result too.
        warps: of a block.
        splits: how many of them share a tile of 16 rows; at most the blocks of 128 columns.
        tiles: that a warp works on.
        unroll: bytes of weights that a lane has under way.
        tokens: T, one of `TOKENS`.
    """

    norm: NormSpec | None = None
    written: bool = False
    warps: int = MOST_WARPS
    splits: int = MOST_WARPS
    tiles: int = 1
    unroll: int = LANE_BYTES
    tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.splits <= self.blocks and self.warps % self.splits == 0, self
        assert self.norm is None or (self.norm.groups, self.norm.size) == (1, self.k), self.norm
        assert self.norm is not None or not self.written
        assert self.tokens in TOKENS, self.tokens

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps * WARP

    @property
    def block_tiles(self) -> int:
        """Tiles of a block of threads."""
        return self.tiles * self.warps // self.splits

    @property
    def outputs(self) -> int:
        """Rows of a block of threads."""
        return self.block_tiles * ROWS

    def blocks_of(self, index: int) -> int:
        """Blocks of threads that a matrix has."""
        return ceil_div(self.matrices[index].layout.tiles, self.block_tiles)

    @property
    def grid(self) -> int:
        """Blocks of threads."""
        return sum(self.blocks_of(i) for i in range(len(self.matrices)))

    @property
    def words(self) -> int:
        """Words of shared memory of a block."""
        return Row.words(self) + ceil_div(self.splits * self.outputs * self.tokens, 4) * 4

    def suits(self, gpu: Gpu) -> bool:
        """Whether the kernel is right for so many tokens; `linear` is what there is otherwise.

        Each block reads and stages all tokens. Of one and two that is little, and two blocks share a multiprocessor, so that one stages
        while the other multiplies. Of more it takes a microsecond or two, and registers for one block a multiprocessor: there should be
        no second one in turn. A matrix of more rows takes as long as its bytes in either kernel.
        """
        if self.tokens == 1:
            return True
        return 4 * self.words <= gpu.shared_bytes and (self.tokens == 2 or self.grid <= gpu.multiprocessors)

    @classmethod
    def of(
        cls, matrices: Sequence[Projection], multiprocessors: int, norm: NormSpec | None = None, written: bool = False, tokens: int = 1
    ) -> ProjectionsSpec:
        """The kernel with the options that suit the shapes and a GPU of so many multiprocessors.

        All columns are shared out over up to 16 warps of a block: no work is smaller than 16 rows and 128 columns, so this makes
        the chain of products as short as it can be, and a fragment of activations is loaded once for all rows. A block takes the
        tiles that make the grid one for each multiprocessor: q, k and v of 2048 rows each are 384 tiles, 3 for each of 129 blocks
        on an H100. Where these are few, all of them are under way before the kernel waits (3 tiles of 4 bits: 96 bytes a lane, 48
        KB a multiprocessor, of which 20 KB would saturate the memory); a lm head goes through its 12 with as many under way. Where
        columns are few (up to 8 blocks), warps that they leave idle take tiles of their own.
        """
        blocks = matrices[0].layout.blocks
        splits = MOST_WARPS
        while splits > blocks:
            splits //= 2
        tiles = sum(matrix.layout.tiles for matrix in matrices)
        block_tiles = ceil_div(tiles, multiprocessors)
        if block_tiles > MOST_TILES:
            block_tiles = ceil_div(block_tiles, ceil_div(block_tiles, MOST_TILES))
        warps = splits * min(MOST_WARPS // splits, max(1, block_tiles))
        found = cls(tuple(matrices), norm, written, warps, splits, ceil_div(block_tiles, warps // splits), tokens=tokens)
        if tokens > 1 and found.grid > multiprocessors >= found.grid - len(matrices):  # a last block of each that is not full
            return replace(found, tiles=found.tiles + 1)
        return found


class ProjectionsKernel:
    """The parts of a kernel, to which another one may add."""

    def __init__(self, spec: ProjectionsSpec) -> None:
        self.spec = spec
        self.grid = spec.grid

    def arguments(self) -> None:
        """Declare the parameters."""
        spec, norm = self.spec, self.spec.norm
        wide = (spec.tokens, spec.k)
        x = argument("x", wide, "float32")
        residual = argument("residual", wide, "float32") if norm and norm.residual else None
        weight = argument("weight", (spec.k,), "float32") if norm and norm.weight else None
        bias = argument("bias", (spec.k,), "float32") if norm and norm.bias else None
        arrays, biases = spec.weights()
        total = argument("total", wide, "float32") if norm and norm.residual else None
        normal = argument("normal", wide, "float32") if spec.written else None
        self.outs = spec.results(spec.tokens)
        self._row = Row(spec, x, residual, weight, bias, total, normal)
        self._matrices = [Matrices(spec, members, arrays, biases, self.outs) for members in spec.by_format]

    def body(self, _: Any, memory: Shared, part: Expr, thread: Expr) -> None:
        """Compute all results."""
        spec, row = self.spec, self._row
        row.take(memory)
        partial = memory.take((spec.splits, spec.outputs * spec.tokens), "float32")

        def run(number: int, first: int) -> None:
            matrices = self._matrices[number]
            matrices.begin(part - first, thread, row)
            grid_wait()
            grid_launch()
            row.stage(part)
            matrices.multiply(row, partial)
            sync()
            row.finish(thread)
            matrices.finish(partial, row.factor)
            self.then(thread)
            row.write(part)

        in_ranges(part, [sum(spec.blocks_of(i) for i in matrices.members) for matrices in self._matrices], run)

    def then(self, thread: Expr) -> None:
        """What is done once a block has written its results, in front of the row."""

    def build(self, name: str) -> tirx.PrimFunc:
        """The kernel."""
        return kernel(name, self.spec.threads, self.arguments, lambda _: [self.grid], self.body, words=self.spec.words)


def projections_func(spec: ProjectionsSpec) -> tirx.PrimFunc:
    """PrimFunc (x f32 [T, K], [residual], [norm weight [K]], [norm bias], arrays of each matrix..., biases..., [sum], [row], outs...).

    Arrays have the shapes of `FragmentLayout.arrays()`; outs are f32 [T, N_i].
    """
    return ProjectionsKernel(spec).build("projections")
