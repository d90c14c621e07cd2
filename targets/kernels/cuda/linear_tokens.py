"""linear_tokens: rows times several packed matrices in one kernel, for 9 to some hundred tokens.

    out_i = x @ W_i^T (+ b_i)               float32 [T, N_i] of x float32 [T, K], each W_i of a format of its own

So few tokens leave most of a GPU idle where a block of threads has 128 rows of a matrix and all of its columns, one block of 128 after the
other. Here

 1. the rows of all matrices of a format are one sequence of tiles, of which a block of threads has 64 for each of its warpgroups,
 2. the columns are shared out over the blocks of a cluster (`splits`), which add up what they have by reading each other's shared memory,
    each a part of the results,
 3. a block's weights are on their way before it waits for the kernel before, and all its columns of x are staged at once where they fit,
    as terms of bfloat16 that it makes of float32 itself, so that nothing is written to memory in between.

How many rows and columns a block has is chosen by what a round of blocks takes (`TokensSpec.clocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.calls import Gpu
from moec.targets.kernels.cuda.cluster import MOST, cluster_sync
from moec.targets.kernels.cuda.emit import Expr, Shared, argument, kernel, local, sync
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import BLOCK, ROWS, FragmentLayout, ceil_div
from moec.targets.kernels.cuda.linear_matrices import Matrices
from moec.targets.kernels.cuda.linear_rows import Rows
from moec.targets.kernels.cuda.matrices import MatricesSpec, Projection, in_ranges
from moec.targets.kernels.cuda.shape import Shape

TERMS = 2
PADDING = 4  # words after the sums of a token: lanes of a warp write to different banks
MOST_TOKENS = 64  # of a block
MOST_CALL = 256  # tokens of a call, beyond which there are blocks enough
MOST_GROUPS = 4  # warpgroups of a block
HELD = {1: 32, 2: 32, 3: 32, 4: 8}  # registers of a thread for weights on their way: of so many warpgroups, a thread has 128 in all
WIDE = 8  # words of a lane beyond which making operands of them takes registers too (6 and 7 bits)

# What `clocks` counts with: of a multiprocessor, bytes out of the L2 cache and multiply-adds of the tensor cores; and clocks from the
# start of a block to its products and from there to its results, of a cluster that adds up and of a block alone.
CACHE_BYTES, MULTIPLY_ADDS = 48, 2048
TOGETHER, ALONE = 900, 600


@dataclass(frozen=True)
class TokensSpec(MatricesSpec):
    """The kernel for some matrices [N_i, K] and any number of tokens.

    Args:
        tokens: of a block of threads, a multiple of 8.
        groups: warpgroups of a block, each with 64 rows.
        splits: blocks of a cluster, which share the columns.
        stages: of 128 columns of activations in shared memory.
        held: registers of a thread for weights that are on their way.
    """

    tokens: int
    groups: int = 2
    splits: int = 1
    stages: int = 1
    held: int = HELD[2]

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.splits <= min(self.blocks, MOST) and self.tokens % 8 == 0, self

    @property
    def share(self) -> int:
        """Blocks of columns of a thread block, at most."""
        return ceil_div(self.blocks, self.splits)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * self.groups

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return 64 * self.groups

    @property
    def columns(self) -> tuple[int, ...]:
        """How many tokens products are made for, the fewest that are enough."""
        return tuple(range(self.tokens % 16 or 16, self.tokens + 1, 16)) if self.tokens <= 48 else (self.tokens // 16 * 8, self.tokens)

    def parts(self, members: Sequence[int]) -> int:
        """Blocks of threads, or clusters, that the rows of matrices of a format take."""
        return ceil_div(sum(self.matrices[i].layout.tiles for i in members), self.rows // ROWS)

    @property
    def grid(self) -> int:
        """Blocks of threads for a tile of tokens."""
        return self.splits * sum(self.parts(members) for members in self.by_format)

    def shape(self, layout: FragmentLayout) -> Shape:
        """The product of a warpgroup with weights of a format: as many as may be are on their way, and one set more is being used."""
        most = self.held // layout.unit_words if layout.unit_words <= WIDE else 1
        sets = min(self.share * layout.units, max(1, most)) + 1
        whole = sets // layout.units * layout.units  # fewer blocks until the sets are used in the same order again
        return Shape(self.tokens, 1, self.stages, TERMS, depth=max(2, whole))

    @property
    def words(self) -> int:
        """Words of shared memory of a block."""
        return self.shape(self.matrices[0].layout).words + self.tokens * (self.rows + PADDING)

    def clocks(self, most: int, multiprocessors: int) -> float:
        """About how long so many tokens take: turns of blocks, each of activations and then products or weights, and what is around that.

        The blocks of a cluster are in one part of the GPU, whose multiprocessors are no multiple of theirs, so that some are left over: on
        an H100 with 132, 96 blocks in clusters of 4 run at once, and 128 do not.
        """
        places = multiprocessors if self.splits == 1 else max(multiprocessors * 7 // 8 // self.splits * self.splits, self.splits)
        turns = ceil_div(self.grid * ceil_div(most, self.tokens), places)
        bits = max(matrix.layout.bits for matrix in self.matrices)
        weights, activations = self.rows * BLOCK * bits // 8, self.tokens * BLOCK * 4
        products = self.rows * BLOCK * self.tokens * TERMS / MULTIPLY_ADDS
        block = max(products, weights / CACHE_BYTES) + activations / CACHE_BYTES  # terms are made before products begin
        rounds = ceil_div(self.share, self.stages)
        return turns * (self.share * block + rounds * ALONE + (TOGETHER - ALONE if self.splits > 1 else 0))

    @classmethod
    def suits(cls, matrices: Sequence[Projection], gpu: Gpu, most: int | None) -> bool:
        """Whether there are so few rows, and tokens, that blocks of 128 rows and all columns leave much of a GPU idle.

        Args:
            most: the most tokens, None for no limit.
        """
        fits = 4 * cls(tuple(matrices), MOST_TOKENS, 1).words <= gpu.shared_bytes
        rows = sum(matrix.layout.tiles for matrix in matrices) * ROWS
        return fits and gpu.clusters and most is not None and most <= MOST_CALL and ceil_div(rows, 128) <= gpu.multiprocessors

    @classmethod
    def of(cls, matrices: Sequence[Projection], gpu: Gpu, most: int) -> TokensSpec:
        """The kernel that takes the fewest clocks for the most tokens there are and for as many as a block has, together."""
        tokens = ceil_div(ceil_div(most, ceil_div(most, MOST_TOKENS)), 8) * 8
        found = list[TokensSpec]()
        for groups in range(1, MOST_GROUPS + 1):
            for splits in (1, 2, 4, MOST):
                if splits <= matrices[0].layout.blocks:
                    one = cls(tuple(matrices), tokens, groups, splits, held=HELD[groups])
                    stage = tokens * BLOCK * TERMS // 2  # words
                    stages = min(one.share, (gpu.shared_bytes // 4 - one.words) // stage + 1)
                    if stages > 0:
                        found.append(replace(one, stages=stages))
        return min(found, key=lambda spec: sum(spec.clocks(count, gpu.multiprocessors) for count in (tokens, most)))


class _Kernel:
    def __init__(self, spec: TokensSpec) -> None:
        self.spec = spec

    def arguments(self) -> Expr:
        """Declare the parameters -> T."""
        spec, tokens = self.spec, T.int64()
        self.x = argument("x", (tokens, spec.k), "float32")
        arrays, biases = spec.weights()
        outs = spec.results(tokens)
        self._matrices = [Matrices(spec, members, arrays, biases, outs) for members in spec.by_format]
        return tokens

    def grid(self, tokens: Expr) -> list[Expr]:
        """Blocks of threads by rows and columns of the matrices, and by tokens."""
        return [self.spec.grid, T.cast((tokens + self.spec.tokens - 1) // self.spec.tokens, "int32")]

    def body(self, tokens: Expr, memory: Shared, block: Expr, turn: Expr, thread: Expr) -> None:
        """Compute all results."""
        spec = self.spec
        shape = spec.shape(spec.matrices[0].layout)
        ring, partial = memory.take((shape.words,), "uint32"), memory.take((spec.tokens, spec.rows + PADDING), "float32")
        part, rank, first = T.Bind(block // spec.splits), T.Bind(block % spec.splits), T.Bind(turn * spec.tokens)
        count = T.Bind(T.min(T.cast(tokens, "int32") - first, spec.tokens))
        start, stop = T.Bind(rank * spec.blocks // spec.splits), T.Bind((rank + 1) * spec.blocks // spec.splits)
        share = spec.share if spec.blocks % spec.splits == 0 else T.Bind(stop - start)
        rows = Rows(shape, spec.threads, ring, self.x, spec.share, thread)
        rows.locate(first, count, start, share)

        def run(number: int, begin: int) -> None:
            matrices, sums = self._matrices[number], local(shape.sums, "float32")
            matrices.begin(part - begin, start, share, thread)
            grid_wait()
            grid_launch()
            rows.begin()
            self._by_columns(count, spec.columns, lambda columns: matrices.multiply(rows, sums, columns, partial))
            if spec.splits > 1:
                cluster_sync()
            else:
                sync()
            matrices.finish(partial, rank, first, count)
            if spec.splits > 1:
                cluster_sync()  # others read this block's memory

        in_ranges(part, [spec.parts(matrices.members) for matrices in self._matrices], run)

    def _by_columns(self, count: Expr, columns: Sequence[int], act: Callable[[int], None]) -> None:
        """Act for the fewest tokens that are enough."""
        with ExitStack() as stack:
            for some in columns[:-1]:
                stack.enter_context(T.If(count <= some))
                with T.Then():
                    act(some)
                stack.enter_context(T.Else())
            act(columns[-1])


def linear_tokens_func(spec: TokensSpec) -> tirx.PrimFunc:
    """PrimFunc (x f32 [T, K], arrays of each matrix..., biases..., outs...).

    Arrays have the shapes of `FragmentLayout.arrays()`; outs are f32 [T, N_i].
    """
    found = _Kernel(spec)
    return kernel("linear_tokens", spec.threads, found.arguments, found.grid, found.body, words=spec.words, cluster=spec.splits)
