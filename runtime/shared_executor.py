"""An executor that several iterators and threads may share: it counts sequences, and runs one thing at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moec.runtime.counters import ExpertCount
from moec.runtime.errors import MoecError
from moec.runtime.executor import Executor, Step
from moec.runtime.sampler import Best


class SharedExecutor:
    """Wraps an executor. Once closed, it refuses work and lets sequences be removed in silence."""

    def __init__(self, executor: Executor, max_sequences: int) -> None:
        self._executor: Executor | None = executor
        self._lock = threading.RLock()
        self._open: set[int] = set()
        self._max_sequences = max_sequences
        self.vocab_size = executor.vocab_size
        self.context_length = executor.context_length
        self.portion = executor.portion

    @property
    def free(self) -> int:
        """Sequences that can be added now."""
        return self._max_sequences - len(self._open)

    def add(self) -> int:
        """Start an empty sequence.

        Raises:
            MoecError: all are in use.
        """
        with self._lock:
            if not self.free:
                raise MoecError(
                    f"all {self._max_sequences} sequences are in use: finish or close other iterators, or load with a larger max_sequences"
                )
            handle = self._inner().add()
            self._open.add(handle)
            return handle

    def remove(self, sequence: int) -> None:
        """Forget a sequence."""
        with self._lock:
            if sequence in self._open:
                self._open.discard(sequence)
                self._inner().remove(sequence)

    def length(self, sequence: int) -> int:
        """Tokens that the sequence holds."""
        with self._lock:
            return self._inner().length(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens of a sequence."""
        with self._lock:
            self._inner().truncate(sequence, length)

    def forward(self, steps: Sequence[Step], all_logits: bool = False) -> NDArray[np.float32]:
        """Append tokens to sequences and return logits, as `Executor.forward`."""
        with self._lock:
            return self._inner().forward(steps, all_logits)

    def best(self, steps: Sequence[Step]) -> Best:
        """Append tokens to sequences and return the likeliest next ones, as `Executor.best`."""
        with self._lock:
            return self._inner().best(steps)

    def ahead(self, steps: Sequence[Step], count: int) -> Best:
        """Append tokens to sequences and those that are found, as `Executor.ahead`."""
        with self._lock:
            return self._inner().ahead(steps, count)

    def counts(self, reset: bool = False) -> list[ExpertCount] | None:
        """What the experts of each layer did since the last reset, between two forwards; None if the executor does not count."""
        with self._lock:
            if (counters := self._inner().counters) is None:
                return None
            found = counters.read()
            if reset:
                counters.reset()
            return found

    def close(self) -> None:
        """Remove every sequence and let go of the executor."""
        with self._lock:
            for sequence in list(self._open):
                self.remove(sequence)
            self._executor = None

    def _inner(self) -> Executor:
        if self._executor is None:
            raise MoecError("this session is closed: load the artifact again")
        return self._executor
