"""Pages of the attention caches: which sequence has which, and the memory that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.errors import MoecError
from moec.runtime.tvm_device import Device

FIRST = 16
"""Pages that are allocated at the start; afterwards their number doubles."""


STORED = {"float32": "float32", "bfloat16": "uint16"}
"""The element type of the arrays, by that of the numbers: bfloat16 as its bits."""


class Pages:
    """The caches of a model: for each entry of `page_shapes` (K and V of each layer) an array [pages, *shape].

    A sequence is known by its handle, and has a row of the page table. A call for many sequences asks for their rows once. Numbers of
    sequences are in lists: they are few, and a call of numpy takes as long as a loop over ten of them.

    Args:
        page_shapes: shapes of a page.
        page_tokens: tokens of a page.
        max_sequences: rows of the page table.
        context_length: the most tokens of a sequence.
        device: whose memory has the arrays.
        dtype: of the numbers, float32 or bfloat16.

    Raises:
        MoecError: another one.
    """

    def __init__(
        self, page_shapes: Sequence[Sequence[int]], page_tokens: int, max_sequences: int, context_length: int, device: Device,
        dtype: str = "float32",
    ) -> None:  # fmt: skip
        if dtype not in STORED:
            raise MoecError(f"the artifact keeps keys and values in {dtype!r}, this moec knows {' and '.join(STORED)}: update moec")
        self._shapes = [tuple(int(n) for n in shape) for shape in page_shapes]
        self._tokens, self._dtype = page_tokens, STORED[dtype]
        self._table: NDArray[np.int32] = device.staging((max_sequences, -(-context_length // page_tokens)), np.int32)
        self._device, self._mirror = device, device.mirror(self._table)
        self._changed: list[int] = []  # places in the table, counted through its rows
        self._row: dict[int, int] = {}
        self._lengths = [0] * max_sequences
        self._pages: list[list[int]] = [[] for _ in range(max_sequences)]
        self._rows = list(range(max_sequences))[::-1]
        self._next = 0
        self._free: list[int] = []
        self._count = 0
        self.pools: list[Any] = []
        """The arrays."""
        self._grow(FIRST)

    def table(self) -> Any:
        """int32 [max_sequences, pages of a full context]: the pages of the sequence that has the row."""
        if self._changed:
            self._device.send(self._mirror, self._table, min(self._changed), max(self._changed) + 1)
            self._changed.clear()
        return self._mirror

    def add(self) -> int:
        """Start an empty sequence.

        Raises:
            MoecError: all rows are in use.
        """
        if not self._rows:
            raise MoecError(f"all {len(self._row)} sequences are in use: remove one, or load with a larger max_sequences")
        self._next += 1
        self._row[self._next] = self._rows.pop()
        return self._next

    def remove(self, sequence: int) -> None:
        """Forget a sequence."""
        self.resize(sequence, 0)
        self._rows.append(self._row.pop(sequence))

    def length(self, sequence: int) -> int:
        """Tokens that a sequence has."""
        return self._lengths[self.rows([sequence])[0]]

    def rows(self, sequences: Sequence[int]) -> list[int]:
        """The rows of the page table that sequences have."""
        try:
            return [self._row[sequence] for sequence in sequences]
        except KeyError as error:
            raise MoecError(f"no sequence has the handle {error.args[0]}: it was removed, or never added") from None

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Tokens that the sequences of some rows have."""
        return [self._lengths[row] for row in rows]

    def resize(self, sequence: int, length: int) -> None:
        """Give a sequence the pages for this many tokens, and take the others back."""
        self.set_lengths(self.rows([sequence]), [length])

    def set_lengths(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """The same for the sequences of some rows."""
        for row, length in zip(rows, lengths, strict=True):
            if not -self._tokens < length - self._tokens * len(self._pages[row]) <= 0:
                self._fit(row, -(-length // self._tokens))
            self._lengths[row] = length

    def _fit(self, row: int, count: int) -> None:
        """Give a row so many pages."""
        pages = self._pages[row]
        while len(pages) > count:
            self._free.append(pages.pop())
        while len(pages) < count:
            if not self._free:
                self._grow(2 * self._count)
            self._table[row, len(pages)] = self._free[-1]
            self._changed.append(row * self._table.shape[1] + len(pages))
            pages.append(self._free.pop())

    def _grow(self, pages: int) -> None:
        old: Sequence[Any] = self.pools or [None] * len(self._shapes)
        grown = [self._device.zeros((pages, *shape), self._dtype, first) for shape, first in zip(self._shapes, old, strict=True)]
        self._free += range(pages - 1, self._count - 1, -1)
        self.pools, self._count = grown, pages
