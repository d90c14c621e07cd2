"""Pages of the attention caches: which sequence has which, and the memory that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moec.runtime.errors import MoecError
from moec.runtime.tvm_arrays import aligned
from moec.runtime.tvm_device import Device

FIRST = 16
"""Pages that are allocated at the start; afterwards their number doubles."""


@dataclass
class _Sequence:
    row: int
    length: int = 0
    pages: list[int] = field(default_factory=list)


class Pages:
    """The caches of a model: for each entry of `page_shapes` (K and V of each layer) an array [pages, *shape].

    Args:
        page_shapes: shapes of a page.
        page_tokens: tokens of a page.
        max_sequences: rows of the page table.
        context_length: the most tokens of a sequence.
        device: whose memory has the arrays.
        dtype: of their elements.
    """

    def __init__(
        self, page_shapes: Sequence[Sequence[int]], page_tokens: int, max_sequences: int, context_length: int, device: Device,
        dtype: str = "float32",
    ) -> None:  # fmt: skip
        self._shapes = [tuple(int(n) for n in shape) for shape in page_shapes]
        self._tokens, self._dtype = page_tokens, dtype
        self._table = aligned((max_sequences, -(-context_length // page_tokens)), np.int32)
        self._device, self._mirror, self._changed = device, device.mirror(self._table), False
        self._sequences: dict[int, _Sequence] = {}
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
            self._device.refresh(self._mirror, self._table)
            self._changed = False
        return self._mirror

    def add(self) -> int:
        """Start an empty sequence.

        Raises:
            MoecError: all rows are in use.
        """
        if not self._rows:
            raise MoecError(f"all {len(self._sequences)} sequences are in use: remove one, or load with a larger max_sequences")
        self._next += 1
        self._sequences[self._next] = _Sequence(self._rows.pop())
        return self._next

    def remove(self, sequence: int) -> None:
        """Forget a sequence."""
        self.resize(sequence, 0)
        self._rows.append(self._sequences.pop(sequence).row)

    def length(self, sequence: int) -> int:
        """Tokens that a sequence has."""
        return self._get(sequence).length

    def row(self, sequence: int) -> int:
        """The row of the page table that a sequence has."""
        return self._get(sequence).row

    def resize(self, sequence: int, length: int) -> None:
        """Give a sequence the pages for this many tokens, and take the others back."""
        found = self._get(sequence)
        count = -(-length // self._tokens)
        while len(found.pages) > count:
            self._free.append(found.pages.pop())
        while len(found.pages) < count:
            if not self._free:
                self._grow(2 * self._count)
            self._table[found.row, len(found.pages)] = self._free[-1]
            self._changed = True
            found.pages.append(self._free.pop())
        found.length = length

    def _get(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            raise MoecError(f"no sequence has the handle {sequence}: it was removed, or never added")
        return self._sequences[sequence]

    def _grow(self, pages: int) -> None:
        old: Sequence[Any] = self.pools or [None] * len(self._shapes)
        grown = [self._device.zeros((pages, *shape), self._dtype, first) for shape, first in zip(self._shapes, old, strict=True)]
        self._free += range(pages - 1, self._count - 1, -1)
        self.pools, self._count = grown, pages
