"""The functions of a library of the TVM backend: which one a call takes, and how a call that is smaller than it is filled up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
"""The inputs of a call by role: `ids`, `positions` [T], `rows` [R] and `blocks` [NB, 4], integers."""


MOST = 64
"""Calls of different shapes that are kept."""

Key = TypeVar("Key")
Kept = TypeVar("Kept")


def latest(kept: dict[Key, Kept], key: Key, make: Callable[[], Kept], most: int = MOST) -> Kept:
    """What is kept under a key, or is made; beyond `most`, what was used longest ago is forgotten."""
    found = kept.pop(key) if key in kept else make()
    kept[key] = found  # the last one now
    if len(kept) > most:
        del kept[next(iter(kept))]
    return found


Piece = tuple[int, int, int]
"""Part of a step: its index, the first token, and the end."""


def in_turn(call: Callable[..., Any], names: Sequence[str], arguments: Sequence[Any]) -> Any:
    """Call the first function, and each other one with what the one before returned."""
    first, *rest = names
    found = call(first, *arguments)
    for name in rest:
        found = call(name, found)
    return found


def chunks(counts: Sequence[int], most: int) -> Iterator[list[Piece]]:
    """Cut steps of so many tokens into calls of at most `most`."""
    pieces: list[Piece] = []
    room = most
    for index, count in enumerate(counts):
        begin = 0
        while begin < count:
            end = min(begin + room, count)
            pieces.append((index, begin, end))
            room -= end - begin
            begin = end
            if not room:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces


@dataclass(frozen=True)
class Function:
    """A function.

    Args:
        name: its name in the library.
        tokens, rows: exactly so many; a call of fewer is filled up. None: any number.
        most: the most tokens; None: any number.
    """

    name: str
    tokens: int | None = None
    rows: int | None = None
    most: int | None = None

    def takes(self, tokens: int, rows: int) -> bool:
        """Whether it can be called with so many tokens and rows of logits."""
        return (self.most is None or tokens <= self.most) and (self.rows is None or rows <= self.rows)

    def filling(self, tokens: int, rows: int) -> tuple[int, int]:
        """How many tokens and rows a call of so many lacks."""
        return 0 if self.tokens is None else self.tokens - tokens, 0 if self.rows is None else self.rows - rows

    def fill(self, arrays: Arrays) -> Arrays:
        """The inputs with as many tokens and rows as it has: the last token again, at its own position, as a block of its own.

        So the same keys and values are written twice, and no expert runs that would not run without.
        """
        more, rows = self.filling(len(arrays["ids"]), len(arrays["rows"]))
        filled = dict(arrays)
        if more:
            row, first, count, position = arrays["blocks"][-1]
            again = [[row, first + count + i, 1, position + count - 1] for i in range(more)]
            filled["ids"] = np.append(arrays["ids"], np.repeat(arrays["ids"][-1:], more))
            filled["positions"] = np.append(arrays["positions"], np.repeat(arrays["positions"][-1:], more))
            filled["blocks"] = np.concatenate([arrays["blocks"], np.array(again, arrays["blocks"].dtype)])
        if rows:
            filled["rows"] = np.append(arrays["rows"], np.repeat(arrays["rows"][-1:], rows))
        return filled


class Functions:
    """All of them, those for fewer tokens first.

    Args:
        section: what `TvmBackend.build` returned; `most` may be missing, as it was before there were ranges.
    """

    def __init__(self, section: Mapping[str, Any]) -> None:
        found = [Function(name, f["tokens"], f["rows"], f.get("most", f["tokens"])) for name, f in section.items()]
        self._all = sorted(found, key=lambda function: (function.most is None, function.most or 0))

    def choose(self, tokens: int, rows: int, exact: bool = False) -> Function:
        """The function for a call; where `exact`, one that needs no filling up."""
        return next(f for f in self._all if f.takes(tokens, rows) and not (exact and f.filling(tokens, rows) != (0, 0)))
