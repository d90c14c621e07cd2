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
