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
        together: tiles that are worked on at about the same time, so that weights cross the memory once for them.
        rank: of the block in its cluster.
    """

    def __init__(self, tiles: Buffer, parts: int, each: int = 1, rank: Expr = 0, together: int = 1) -> None:
        self._tiles, self._each, self._rank, self.parts, self._together = tiles, each, rank, ceil_div(parts, each), together
        self._state, self._next, self._kept = (local(5, "int32") for _ in range(3))

    def look(self, work: Expr) -> None:
        """Read the tile of a piece of work as the next one: some tiles with one part of the rows, then with the next."""
        group = T.Bind(work // (self._together * self.parts))
        inner = T.Bind(work - group * (self._together * self.parts))
        here = T.Bind(T.min(self._tiles[self._tiles.shape[0] - 1, 0] - group * self._together, self._together))
        number = T.Bind(group * self._together + inner % here)
        for i in range(3):
            store(self._next, self._tiles[number, i], i)
        store(self._next, inner // here * self._each + self._rank, 3)
        store(self._next, number, 4)

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
