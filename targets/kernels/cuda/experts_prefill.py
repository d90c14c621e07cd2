"""The experts of many tokens: tokens are sorted by expert, and two grouped products run over tiles of tokens of one expert.

sort      positions of slots (a token and one of its experts) by expert, and where each expert begins
arrange   the tokens of each tile as an image (`image`), where blocks of threads are clusters
gate_up   hidden [position, F] in bfloat16 of tokens gathered from x, or as an image
down      y [position, D]
combine   the sum of each token's slots, times their routing weights
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cuda.emit import Buffer, Expr, Shared, argument, at, kernel, local
from moec.targets.kernels.cuda.experts_layout import ExpertsLayout
from moec.targets.kernels.cuda.experts_results import write_hidden, write_narrow_hidden, write_outputs
from moec.targets.kernels.cuda.gathered import Activations, first_tile, row_tiles
from moec.targets.kernels.cuda.image import Images, arrange_image_func, cluster_ready
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import BLOCK, ROWS, ceil_div
from moec.targets.kernels.cuda.narrow import NarrowImage, NarrowImages, arrange_narrow_func
from moec.targets.kernels.cuda.product import Weights
from moec.targets.kernels.cuda.shape import Shape
from moec.targets.kernels.cuda.sort import most_tiles
from moec.targets.kernels.cuda.tiles import Takes, Tile, each_tile


@dataclass(frozen=True)
class PrefillSpec:
    """The kernels for many tokens of a layer.

    Args:
        tokens: T, None for any number.
        dtype: of what the slots give, `float32` or `bfloat16`; x is bfloat16, `shape.terms` of them.
        shape: the size of a block's product.
    """

    layout: ExpertsLayout
    activation: ExpertActivation
    tokens: int | None
    top_k: int
    ids_dtype: str = "int64"
    biases: bool = False
    dtype: str = "float32"
    shape: Shape = field(default_factory=Shape)

    def count(self) -> Expr:
        """T, a new variable if it is any number."""
        return self.tokens if self.tokens is not None else T.int64()

    def count_slots(self) -> Expr:
        """T times k, the same."""
        return self.tokens * self.top_k if self.tokens is not None else T.int64()

    def sorted(self, slots: Expr) -> tuple[Buffer, Buffer]:
        """The parameters that `sort` writes."""
        return argument("order", (slots,), "int32"), self.table(slots)

    def table(self, slots: Expr) -> Buffer:
        """The parameter of the tiles."""
        return argument("tiles", (most_tiles(slots, self.layout.experts, self.shape.tokens) + 1, 4), "int32")

    @property
    def cluster(self) -> int:
        """Blocks of threads of a cluster."""
        return max(self.shape.cluster, 1)

    def grid(self, rows: int, slots: Expr) -> list[Expr]:
        """Blocks of threads: as many as run at once, or fewer if there is less to do."""
        parts, each = ceil_div(rows, self.shape.rows), self.cluster
        work = most_tiles(slots, self.layout.experts, self.shape.tokens) * ceil_div(parts, each)
        if most := self.shape.multiprocessors * self.shape.residency // each:
            work = min(work, most) if isinstance(work, int) else T.min(work, most)
        return [work * each if isinstance(work, int) else T.cast(work * each, "int32")]

    def takes(self, counter: Expr, memory: Shared, thread: Expr, rank: Expr) -> Takes | None:
        """How a block takes its next tiles, if it does."""
        if not self.shape.taken:
            return None
        leads = thread == 0 if self.cluster == 1 else T.And(thread == 0, rank == 0)
        return Takes(counter, memory.take((2,), "int32"), self.cluster, leads)

    def image(self, name: str, slots: Expr, columns: int) -> Any:
        """The parameter of an image of so many columns (see `image`), or the two of one of `narrow`."""
        data, *scale = self.image_types(most_tiles(slots, self.layout.experts, self.shape.tokens), columns)
        first = argument(name, *data)
        return NarrowImage(first, argument(f"{name}_scale", *scale[0])) if scale else first

    def image_types(self, most: Expr, columns: int) -> list[tuple[tuple[Expr, ...], str]]:
        """Shape and type of what `image` declares, of so many tiles at most."""
        size, blocks = self.shape.tokens, ceil_div(columns, BLOCK)
        if self.shape.narrow:
            return [((most, blocks, size * BLOCK), "uint8"), ((most, blocks, size), "float32")]
        return [((most, blocks, size * BLOCK), "uint16")]

    def activations(self, name: str, slots: Expr, columns: int) -> Any:
        """The parameter of activations [terms, S, columns], or of their image."""
        if self.shape.cluster:
            hidden = self.shape.cluster * self.shape.block_tiles * self.layout.tile_rows  # of a cluster, which writes whole blocks
            assert self.shape.terms == 1 and hidden % BLOCK == 0 and not self.layout.widths
            return self.image(name, slots, columns)
        return argument(name, (self.shape.terms, slots, columns), "uint16")


def arrange_func(spec: PrefillSpec) -> tirx.PrimFunc:
    """The kernel that writes x as an image."""
    return (arrange_narrow_func if spec.shape.narrow else arrange_image_func)(spec)


def _activations(shape: Shape, ring: Buffer, barriers: Buffer, source: Any, columns: int, thread: Expr, rank: Expr) -> Activations | Images:
    """The ring of a block of threads."""
    if shape.cluster:
        return (NarrowImages if shape.narrow else Images)(shape, ring, barriers, source, thread, rank)
    return Activations(shape, ring, source, columns, thread)


def gate_up_func(spec: PrefillSpec) -> tirx.PrimFunc:
    """PrimFunc (x uint16 [terms, T, D], order [S], tiles [most + 1, 4], arrays..., [bias], hidden uint16 [terms, S, F]).

    Of a shape with a cluster, hidden is an image, and one of x comes after x.
    """
    layout, stack, shape = spec.layout, spec.layout.gate_up, spec.shape.for_columns(spec.layout.d)
    rows = layout.f_tiles * ROWS
    parts, staged_words = ceil_div(rows, shape.rows), shape.hidden_words(layout.tile_rows)

    def arguments() -> tuple[Any, ...]:
        tokens = spec.count()
        slots = tokens * spec.top_k
        x = argument("x", (shape.terms, tokens, layout.d), "uint16")  # of an image's tokens it says how many
        if shape.cluster:
            x = spec.image("image", slots, layout.d)
        order, tiles = spec.sorted(slots)
        weights = Weights(stack, "gate_up_", narrow=shape.narrow)
        bias = argument("gate_up_bias", (layout.experts, stack.n), "float32") if spec.biases else None
        return x, order, tiles, weights, bias, spec.activations("hidden", slots, layout.padded_f), slots

    def body(operands: tuple[Any, ...], memory: Shared, block: Expr, thread: Expr) -> None:
        x, order, tiles, weights, bias, hidden, slots = operands
        ring, staged = memory.take((shape.words,), "uint32"), memory.take((staged_words,), "uint32")
        warp, group = T.Bind(thread // 32 % 4), T.Bind(thread // 128)
        barriers, rank = memory.take((shape.barrier_words,), "uint32"), T.Bind(block % spec.cluster)
        grid_wait()
        grid_launch()
        tile, sums = Tile(tiles, parts, spec.cluster, rank, shape.together), local(shape.tiles * shape.sums, "float32")
        activations = _activations(shape, ring, barriers, x, layout.d, thread, rank)
        write = write_narrow_hidden if shape.narrow else write_hidden
        weights.prepare(shape, thread, memory)

        def rows_of(part: Expr, f_tiles: Expr) -> list[Expr]:
            return row_tiles(shape, first_tile(shape, part, group, warp), f_tiles - 1)

        def begin(_: bool) -> None:
            expert, first, count, part, number = tile.now()
            with weights.tiles(expert, part * shape.block_tiles) as f_tiles:
                weights.begin(expert, rows_of(part, f_tiles))
                if isinstance(activations, Images):
                    activations.locate(number, count)
                else:
                    activations.locate(lambda token: order[first + token] // spec.top_k, count)
                activations.begin(weights.blocks)

        def run() -> None:
            expert, _, count, part, _ = tile.now()
            with weights.tiles(expert, part * shape.block_tiles) as f_tiles:
                weights.run(expert, rows_of(part, f_tiles), activations, sums, count)

        def finish() -> None:
            expert, first, count, part, number = tile.kept()
            with weights.tiles(expert, part * shape.block_tiles) as f_tiles:
                base = T.Bind(first_tile(shape, part, group, warp))
                write(spec, sums, staged, hidden, bias, expert, first, count, part, number, base, thread, f_tiles)

        total = T.Bind(tiles[tiles.shape[0] - 1, 0] * tile.parts)
        takes = spec.takes(at(tiles, tiles.shape[0] - 1, 1), memory, thread, rank)
        each_tile(tile, total, block // spec.cluster, spec.grid(rows, slots)[0] // spec.cluster, begin, run, finish, takes)
        if shape.cluster:
            cluster_ready()  # its memory is not written any more

    def grid(operands: tuple[Any, ...]) -> list[Expr]:
        return spec.grid(rows, operands[-1])

    words = shape.shared_words(stack, staged_words)
    return kernel(
        "gate_up", shape.threads, arguments, grid, body, words=words, blocks_per_multiprocessor=shape.residency, cluster=spec.cluster
    )


def down_func(spec: PrefillSpec) -> tirx.PrimFunc:
    """PrimFunc (hidden uint16 [terms, S, F], tiles [most + 1, 4], arrays..., [bias], y [S, D])."""
    layout, stack, shape = spec.layout, spec.layout.down, spec.shape.for_columns(spec.layout.f)
    parts, staged_words = ceil_div(layout.d, shape.rows), shape.output_words(spec.dtype)

    def arguments() -> tuple[Any, ...]:
        slots = spec.count_slots()
        hidden = spec.activations("hidden", slots, layout.padded_f)
        tiles, weights = spec.table(slots), Weights(stack, "down_", narrow=shape.narrow)
        bias = argument("down_bias", (layout.experts, layout.d), "float32") if spec.biases else None
        return hidden, tiles, weights, bias, argument("y", (slots, layout.d), spec.dtype), slots

    def body(operands: tuple[Any, ...], memory: Shared, block: Expr, thread: Expr) -> None:
        hidden, tiles, weights, bias, y, slots = operands
        ring, staged = memory.take((shape.words,), "uint32"), memory.take((staged_words,), "uint32")
        warp, group = T.Bind(thread // 32 % 4), T.Bind(thread // 128)
        barriers, rank = memory.take((shape.barrier_words,), "uint32"), T.Bind(block % spec.cluster)
        tile, sums = Tile(tiles, parts, spec.cluster, rank, shape.together), local(shape.tiles * shape.sums, "float32")
        activations = _activations(shape, ring, barriers, hidden, ceil_div(layout.f, 8) * 8, thread, rank)
        if stack.columns and isinstance(activations, Activations):
            activations.vary()
        weights.prepare(shape, thread, memory)

        def rows_of(part: Expr) -> list[Expr]:
            return row_tiles(shape, first_tile(shape, part, group, warp), stack.classes[0].tiles - 1)

        def begin(at_first: bool) -> None:
            expert, first, count, part, number = tile.now()  # written by the kernel before the last one
            weights.begin(expert, rows_of(part))
            if isinstance(activations, Images):
                activations.locate(number, count)
            else:
                activations.locate(lambda token: first + token, count, weights.columns_of(expert))
            if at_first:
                grid_wait()
            activations.begin(weights.blocks_of(expert))

        def run() -> None:
            expert, _, count, part, _ = tile.now()
            weights.run(expert, rows_of(part), activations, sums, count)

        def finish() -> None:
            expert, first, count, part, _ = tile.kept()
            base = T.Bind(first_tile(shape, part, group, warp))
            write_outputs(spec, sums, staged, y, bias, expert, first, count, base, thread)

        total = T.Bind(tiles[tiles.shape[0] - 1, 0] * tile.parts)
        takes = spec.takes(at(tiles, tiles.shape[0] - 1, 2), memory, thread, rank)
        each_tile(tile, total, block // spec.cluster, spec.grid(layout.d, slots)[0] // spec.cluster, begin, run, finish, takes)
        if shape.cluster:
            cluster_ready()
        grid_wait()
        grid_launch()

    def grid(operands: tuple[Any, ...]) -> list[Expr]:
        return spec.grid(layout.d, operands[-1])

    words = shape.shared_words(stack, staged_words)
    return kernel(
        "down", shape.threads, arguments, grid, body, words=words, blocks_per_multiprocessor=shape.residency, cluster=spec.cluster
    )
