"""Registers that the formats of a stack share: a block of threads has weights of one of them at a time.

Arrays of its own for each format would all be kept for as long as one of them is: what is written in one branch is read in another, later.
"""

from __future__ import annotations

from moec.targets.kernels.cuda.emit import Buffer, local


class Registers:
    """Sets of registers for weights and for their scales.

    Args:
        words, sides: uint32 of a set of either, as many as any format takes.
    """

    def __init__(self, words: int, sides: int) -> None:
        self._sizes = {"words": words, "sides": sides}
        self._sets: dict[str, list[Buffer]] = {name: [] for name in self._sizes}

    def words(self, count: int) -> list[Buffer]:
        """So many sets for weights."""
        return self._take("words", count)

    def sides(self, count: int) -> list[Buffer]:
        """So many sets for scales."""
        return self._take("sides", count)

    def _take(self, name: str, count: int) -> list[Buffer]:
        sets = self._sets[name]
        sets += [local(self._sizes[name], "uint32") for _ in range(count - len(sets))]
        return sets[:count]
