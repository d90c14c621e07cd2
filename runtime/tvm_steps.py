"""The inputs of the functions of a library of the TVM backend: what a call of an executor asks for, as arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import add
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moec.runtime.counters import ExpertCounters
from moec.runtime.errors import MoecError
from moec.runtime.executor import Step
from moec.runtime.tvm_arrays import Array, aligned
from moec.runtime.tvm_functions import Function, Functions, chunks, latest
from moec.runtime.tvm_pages import Pages

BLOCK = 16
"""Tokens of a sequence that attention computes together."""

Inputs = dict[str, Array]
"""By role: `ids`, `positions` int64 [T], `rows` int32 [R], `blocks` int32 [NB, 4]."""


class Batch(NamedTuple):
    """Steps that were checked.

    Args:
        tokens: of each step, int64.
        ids: all of them, one step after the other.
        rows: of the page table, of each step.
        before: tokens that the sequences have already, of each step.
        counts: tokens of each step.
    """

    tokens: Sequence[NDArray[np.int64]]
    ids: NDArray[np.int64]
    rows: Sequence[int]
    before: Sequence[int]
    counts: Sequence[int]

    @classmethod
    def of(cls, steps: Sequence[Step], pages: Pages, vocab_size: int, context_length: int, ahead: int = 0) -> Batch:
        """Of at least one step, after each of which `ahead` more tokens will follow.

        Raises:
            MoecError: a sequence occurs twice, or would grow past the context; a step has no tokens, or one that is not in the vocabulary.
        """
        handles = [sequence for sequence, _ in steps]
        if len(set(handles)) != len(handles):
            raise MoecError("forward: a sequence occurs twice in one call")
        tokens = [np.asarray(found, np.int64) for _, found in steps]
        for found in tokens:
            if found.ndim != 1 or found.size == 0:
                raise MoecError(f"forward: expected at least one token for each sequence, got the shape {list(found.shape)}")
        ids = np.concatenate(tokens) if len(tokens) > 1 else tokens[0]
        values = ids.tolist()
        if min(values) < 0 or max(values) >= vocab_size:
            bad = next(value for value in values if not 0 <= value < vocab_size)
            raise MoecError(f"token id {bad} is not in the vocabulary of {vocab_size}")
        rows, counts = pages.rows(handles), [len(found) for found in tokens]
        before = pages.lengths(rows)
        if (total := max(map(add, before, counts)) + ahead) > context_length:
            raise MoecError(f"a sequence of {total} tokens is longer than the context of {context_length}: shorten it")
        return cls(tokens, ids, rows, before, counts)

    def after(self, more: int = 0) -> list[int]:
        """Tokens that the sequences have once they have got theirs, and some more."""
        return [before + count + more for before, count in zip(self.before, self.counts, strict=True)]

    @property
    def single(self) -> bool:
        """Whether each step is one token."""
        return len(self.ids) == len(self.tokens)

    def pieces(self, most: int, all_logits: bool) -> Iterator[tuple[Inputs, int]]:
        """The inputs of calls of at most `most` tokens, and how many rows of logits are wanted (one is computed where none is)."""
        for pieces in chunks(self.counts, most):
            ids: list[NDArray[np.int64]] = []
            positions: list[NDArray[np.int64]] = []
            blocks: list[tuple[int, int, int, int]] = []
            wanted: list[int] = []
            first = 0
            for index, begin, end in pieces:
                row, start, count = self.rows[index], self.before[index] + begin, end - begin
                ids.append(self.tokens[index][begin:end])
                positions.append(np.arange(start, start + count))
                blocks += [(row, first + at, min(BLOCK, count - at), start + at) for at in range(0, count, BLOCK)]
                first += count
                if all_logits:
                    wanted += range(first - count, first)
                elif end == len(self.tokens[index]):
                    wanted.append(first - 1)
            streams = {"ids": np.concatenate(ids), "positions": np.concatenate(positions)}
            yield {**streams, "rows": np.array(wanted or [0], np.int32), "blocks": np.array(blocks, np.int32)}, len(wanted)


class Singles:
    """The inputs of a function for one token of each of `count` sequences, in memory that is used again.

    They are what `Function.fill` makes of such a call: the last token again.
    """

    def __init__(self, function: Function, count: int) -> None:
        more, rows = function.filling(count, count)
        self._count, index = count, np.arange(count + max(more, rows))
        self._ids, self._positions = aligned(count + more, np.int64), aligned(count + more, np.int64)
        self._blocks, wanted = aligned((count + more, 4), np.int32), aligned(count + rows, np.int32)
        wanted[:] = np.minimum(index, count - 1)[: count + rows]
        self._blocks[:, 1], self._blocks[:, 2] = index[: count + more], 1
        self.inputs: Inputs = {"ids": self._ids, "positions": self._positions, "rows": wanted, "blocks": self._blocks}

    def set(self, batch: Batch) -> Inputs:
        """Those of a batch."""
        count = self._count
        self._ids[:count], self._positions[:count], self._blocks[:count, 0] = batch.ids, batch.before, batch.rows
        if count < len(self._ids):
            self._ids[count:], self._positions[count:], self._blocks[count:, 0] = batch.ids[-1], batch.before[-1], batch.rows[-1]
        self._blocks[:, 3] = self._positions
        return self.inputs


class Calls:
    """Which function a batch takes, and with what.

    Args:
        functions: of the library.
        counters: of the experts, which are told what calls are filled up with; where they cannot leave that out, nothing is.
    """

    def __init__(self, functions: Functions, counters: ExpertCounters | None) -> None:
        self._functions, self._counters = functions, counters
        self._exact = counters is not None and not counters.can_leave_out
        self._singles: dict[tuple[str, int], Singles] = {}

    def single(self, batch: Batch, times: int = 1) -> tuple[str, Inputs]:
        """The function and the inputs of a batch of single tokens that is no larger than a call; it will be called so many times."""
        count = len(batch.ids)
        function = self._choose(count, count, times)
        found = latest(self._singles, (function.name, count), lambda: Singles(function, count))
        return function.name, found.set(batch)

    def any(self, batch: Batch, most: int, all_logits: bool) -> Iterator[tuple[str, Inputs, int]]:
        """The functions, the inputs and the wanted rows of logits of a batch, in parts of at most `most` tokens."""
        for inputs, wanted in batch.pieces(most, all_logits):
            function = self._choose(len(inputs["ids"]), len(inputs["rows"]), 1)
            yield function.name, function.fill(inputs), wanted

    def _choose(self, tokens: int, rows: int, times: int) -> Function:
        function = self._functions.choose(tokens, rows, self._exact)
        if self._counters is not None:
            more = function.filling(tokens, rows)
            self._counters.leave_out(times * more[0], times * more[1])
        return function
