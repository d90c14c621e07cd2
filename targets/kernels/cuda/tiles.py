"""The tiles of tokens that a block of threads works through, one after the other."""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Buffer, Expr, local, store, sync, when
from moec.targets.kernels.cuda.layout import ceil_div


class Tile:
    """The tile that a block of threads works on, and the next: (expert, first position, positions, part of the rows, number).

    Args:
        parts: of the rows; the blocks of a cluster take `each` that follow each other.
        rank: of the block in its cluster.
    """

    def __init__(self, tiles: Buffer, parts: int, each: int = 1, rank: Expr = 0) -> None:
        self._tiles, self._each, self._rank, self.parts = tiles, each, rank, ceil_div(parts, each)
        self._state, self._next, self._kept = (local(5, "int32") for _ in range(3))

    def look(self, work: Expr) -> None:
        """Read the tile of a piece of work as the next one: the parts of a tile follow each other."""
        for i in range(3):
            store(self._next, self._tiles[work // self.parts, i], i)
        store(self._next, work % self.parts * self._each + self._rank, 3)
        store(self._next, work // self.parts, 4)

    def advance(self) -> None:
        """Take the next one, and keep this one for what is left to do."""
        for i in range(5):
            store(self._kept, self._state[i], i)
            store(self._state, self._next[i], i)

    def now(self) -> list[Expr]:
        """The tile that is worked on."""
        return [T.Bind(self._state[i]) for i in range(5)]

    def kept(self) -> list[Expr]:
        """What was kept."""
        return [T.Bind(self._kept[i]) for i in range(5)]


def each_tile(
    tile: Tile, total: Expr, block: Expr, blocks: Expr, begin: Callable[[bool], None], run: Callable[[], None],
    finish: Callable[[], None],
) -> None:  # fmt: skip
    """One piece of work after the other, the next one's first loads under way while the last one's results are written."""
    with when(block < total):
        tile.look(block)
        tile.advance()
        begin(True)
        with T.serial((total - block + blocks - 1) // blocks) as i:
            following = T.Bind(block + (i + 1) * blocks)
            with when(following < total):
                tile.look(following)
            run()
            sync()  # all warps are done with the stages
            tile.advance()
            with when(following < total):
                begin(False)
            finish()
