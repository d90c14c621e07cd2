"""What executes a model: the interface behind a session, which each backend's executor implements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moec.runtime.counters import ExpertCounters
from moec.runtime.sampler import Best

Step = tuple[int, NDArray[np.int64]]
"""A sequence's handle and the tokens that come next in it."""


class Executor(Protocol):
    """A loaded model with a cache of keys and values for several sequences."""

    vocab_size: int
    context_length: int
    counters: ExpertCounters | None
    """What its experts did; None where the model has none, or the backend cannot tell."""
    portion: int
    """Tokens that one call of `ahead` should find while someone waits for them: 1 where it is no faster than `best`."""

    def add(self) -> int:
        """Start an empty sequence and return its handle."""
        ...

    def remove(self, sequence: int) -> None:
        """Forget a sequence and give its cache back."""
        ...

    def length(self, sequence: int) -> int:
        """Tokens that the sequence holds."""
        ...

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens of a sequence."""
        ...

    def forward(self, steps: Sequence[Step], all_logits: bool = False) -> NDArray[np.float32]:
        """Append tokens to sequences (any number to each, each sequence once) and return logits.

        Returns:
            [len(steps), V]: the logits after the last token of each step; or with `all_logits` [sum of tokens, V], in order.

        Raises:
            MoecError: a sequence would grow past the context.
        """
        ...

    def best(self, steps: Sequence[Step]) -> Best:
        """Append tokens like `forward`, and return the likeliest token after each step, for which a device need not hand out its logits.

        Raises:
            MoecError: as `forward`, or the logits are no numbers.
        """
        ...

    def ahead(self, steps: Sequence[Step], count: int) -> Best:
        """What `best` would find `count` times (at least once), each time but the first with the tokens that the last call found.

        Each sequence grows by its step and the first count - 1 of its tokens; where an error is raised, none does. A caller that finds out
        that a token ended a sequence truncates it. Counters count all that ran.

        Returns:
            Arrays [count, len(steps)].

        Raises:
            MoecError: as `best`; also where only a later step would raise it.
        """
        ...


def repeated(executor: Executor, steps: Sequence[Step], count: int) -> Best:
    """`Executor.ahead` by one call of `best` after the other."""
    sequences = [sequence for sequence, _ in steps]
    before = [executor.length(sequence) for sequence in sequences]
    found = [executor.best(steps)]
    try:
        for _ in range(count - 1):
            found.append(executor.best([(sequence, found[-1].ids[i : i + 1]) for i, sequence in enumerate(sequences)]))
    except BaseException:
        for sequence, length in zip(sequences, before, strict=True):
            executor.truncate(sequence, length)
        raise
    return Best(np.stack([best.ids for best in found]), np.stack([best.logprobs for best in found]))
