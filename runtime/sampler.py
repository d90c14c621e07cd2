"""From logits to a token: penalties, temperature, top-k, top-p, min-p (in this order), then a draw.

Everything is deterministic for a seed: equal logits are ordered by token id, the draw inverts the cumulative distribution at one
number of a numpy generator.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moec.runtime.errors import MoecError

BAD_LOGITS = "the model computed logits that are NaN or infinite: the artifact's weights do not suit it; see `moec verify`"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token (the lowest id among equals).
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities sum to at least this.
        min_p: drop tokens less likely than this times the likeliest.
        repetition_penalty: logits of tokens that occurred are divided by it where positive, multiplied where negative.
        presence_penalty: taken off the logits of tokens that were generated.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0.0, 100.0),
            "top_k": (0, 2**31),
            "top_p": (0.0, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (0.01, 100.0),
            "presence_penalty": (-100.0, 100.0),
        }
        for field in fields(self):
            low, high = ranges[field.name]
            if not low <= (value := getattr(self, field.name)) <= high:  # a NaN fails too
                raise MoecError(f"{field.name} {value}: expected {low:g} to {high:g}")

    def distribution(
        self, logits: NDArray[np.float32], prompt: Collection[int] = (), generated: Collection[int] = ()
    ) -> NDArray[np.float64]:
        """Probabilities [V] from which a token is drawn.

        Raises:
            MoecError: a logit is NaN or infinite.
        """
        values = check(logits).astype(np.float64)
        if self.repetition_penalty != 1.0 and (seen := np.unique([*prompt, *generated]).astype(np.int64)).size:
            scaled = values[seen]
            values[seen] = np.where(scaled > 0, scaled / self.repetition_penalty, scaled * self.repetition_penalty)
        if self.presence_penalty and generated:
            values[np.unique(list(generated))] -= self.presence_penalty
        if self.temperature == 0.0:
            probabilities = np.zeros(values.size)
            probabilities[int(values.argmax())] = 1.0
            return probabilities
        probabilities = softmax(values / self.temperature)
        if 0 < self.top_k < probabilities.size:
            probabilities = _keep_top_k(probabilities, self.top_k)
        if self.top_p < 1.0:
            probabilities = _keep_top_p(probabilities, self.top_p)
        if self.min_p > 0.0:
            probabilities = np.where(probabilities >= self.min_p * probabilities.max(), probabilities, 0.0)
        total: NDArray[np.float64] = probabilities / probabilities.sum()
        return total

    @property
    def greedy(self) -> bool:
        """Whether the choice is the argmax of the logits as they are."""
        return self.temperature == 0.0 and self.repetition_penalty == 1.0 and self.presence_penalty == 0.0

    def choose(
        self,
        logits: NDArray[np.float32],
        generator: np.random.Generator,
        prompt: Collection[int] = (),
        generated: Collection[int] = (),
    ) -> int:
        """A token for these logits [V].

        Raises:
            MoecError: a logit is NaN or infinite.
        """
        if self.greedy:
            return int(check(logits).argmax())
        cumulative = self.distribution(logits, prompt, generated).cumsum()
        drawn = int(np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right"))
        return min(drawn, int(np.searchsorted(cumulative, cumulative[-1])))  # never a token after the last possible one


def check(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The logits, if the largest is a number (-inf is a token that cannot come).

    Raises:
        MoecError: it is not.
    """
    if not np.isfinite(logits.max()):  # the maximum of anything with a NaN is NaN
        raise MoecError(BAD_LOGITS)
    return logits


class Best(NamedTuple):
    """The likeliest token after each of some steps, the lowest of several, and the logarithm of its probability.

    Args:
        ids: int64 [N].
        logprobs: float64 [N].
    """

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]

    @classmethod
    def of(cls, logits: NDArray[np.float32]) -> Best:
        """Of rows of logits [N, V].

        Raises:
            MoecError: a logit is NaN or infinite.
        """
        ids = check(logits).argmax(-1) if logits.size else np.zeros(0, np.int64)
        return cls(ids, np.array([logprob(row, int(token)) for row, token in zip(logits, ids, strict=True)], np.float64))

    @classmethod
    def found(cls, rows: NDArray[np.float32]) -> Best:
        """Of what a device has found [N, 3]: token, its logit, and the logarithm of the sum of exponentials of the row's logits.

        Raises:
            MoecError: a logit was NaN or infinite.
        """
        if not np.isfinite(rows).all():
            raise MoecError(BAD_LOGITS)
        return cls(rows[:, 0].astype(np.int64), rows[:, 1].astype(np.float64) - rows[:, 2])


def softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(values) scaled to sum to 1."""
    exponentials = np.exp(values - values.max())
    result: NDArray[np.float64] = exponentials / exponentials.sum()
    return result


def logprob(logits: NDArray[np.float32], token: int) -> float:
    """The logarithm of a token's probability under the model: log-softmax of the logits as they are."""
    values = logits - logits.max()
    return float(values[token]) - float(np.log(np.exp(values).sum(dtype=np.float64)))


def _keep_top_k(probabilities: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Zero all but the k largest; among equals the lowest ids stay."""
    threshold = np.partition(probabilities, -k)[-k]
    kept = probabilities > threshold
    equal = np.flatnonzero(probabilities == threshold)
    kept[equal[: k - int(kept.sum())]] = True
    return np.where(kept, probabilities, 0.0)


def _keep_top_p(probabilities: NDArray[np.float64], p: float) -> NDArray[np.float64]:
    """Zero all but the fewest largest that sum to at least p of the whole; among equals the lowest ids stay. One always stays."""
    order = np.argsort(-probabilities, kind="stable")
    cumulative = probabilities[order].cumsum()
    count = int(np.searchsorted(cumulative, p * cumulative[-1])) + 1
    kept = np.zeros_like(probabilities)
    kept[order[:count]] = probabilities[order[:count]]
    return kept
