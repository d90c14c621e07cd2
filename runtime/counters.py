"""Counts of the experts that ran. The kernels that run them add to these numbers, which thus say what happened.

A model may skip experts for tokens that need fewer; how many are left decides how fast it decodes.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

COUNTS = 8
"""int64 that a layer of experts counts in, a cache line: tokens, experts that ran, and none other yet."""


@dataclass(frozen=True)
class ExpertCount:
    """What one layer's experts did since the counters were reset.

    Attributes:
        name: of the parameter with the experts' first projection.
        tokens: tokens that went through the layer (the last layer leaves out those whose logits nobody asked for).
        experts: experts that ran, summed over the tokens.
        slots: experts that the router chose, skipped ones included.
        expert_bytes: weights of one expert.
    """

    name: str
    tokens: int
    experts: int
    slots: int
    expert_bytes: int


class ExpertCounters:
    """The counters of a model, in memory that kernels write to.

    Args:
        layers: for each layer with experts its `name`, `experts_per_token` and `expert_bytes`; `chosen_run` where every expert that is
            chosen runs, `rows` where it computes only tokens whose logits were asked for.
        numbers: int64 [layers, at least 2]: tokens, and experts that ran.
        fetch, send: bring the numbers up to date with those of a device, and the other way round; None where they are the same.
    """

    def __init__(
        self, layers: Sequence[Mapping[str, Any]], numbers: NDArray[np.int64], fetch: Callable[[], None] | None = None,
        send: Callable[[], None] | None = None,
    ) -> None:  # fmt: skip
        self._layers, self._numbers, self._fetch, self._send = layers, numbers, fetch, send
        self._filled = [0, 0]

    @property
    def can_leave_out(self) -> bool:
        """Whether every token runs as many experts as it chose, so that what calls were filled up with can be left out."""
        return all(layer.get("chosen_run", False) for layer in self._layers)

    def leave_out(self, tokens: int, rows: int) -> None:
        """Do not count so many tokens, and so many of those rows whose logits were asked for: calls were filled up with them."""
        self._filled = [self._filled[0] + tokens, self._filled[1] + rows]

    def read(self) -> list[ExpertCount]:
        """The counts of each layer. Not while the model runs."""
        if self._fetch is not None:
            self._fetch()
        found = []
        for layer, (counted, ran) in zip(self._layers, self._numbers[:, :2].tolist(), strict=True):
            filled, top_k = self._filled[bool(layer.get("rows", False))], int(layer["experts_per_token"])
            tokens, experts = counted - filled, ran - filled * top_k
            slots = tokens * top_k
            found.append(ExpertCount(str(layer["name"]), tokens, experts, slots, int(layer["expert_bytes"])))
        return found

    def reset(self) -> None:
        """Start again from zero."""
        self._numbers[:] = 0
        self._filled = [0, 0]
        if self._send is not None:
            self._send()


def by_layer(counts: Sequence[ExpertCount]) -> list[ExpertCount]:
    """The counts with the parts of a layer (its experts of one weight format each) added up.

    A slot whose expert is in another part counts as chosen once, and `expert_bytes` is the mean of the experts that ran.
    """
    parts: dict[str, list[ExpertCount]] = {}
    for count in counts:
        parts.setdefault(re.sub(r"\.part\d+$", "", count.name), []).append(count)
    found = []
    for name, layer in parts.items():
        experts = sum(part.experts for part in layer)
        size = sum(part.experts * part.expert_bytes for part in layer) // experts if experts else layer[0].expert_bytes
        found.append(ExpertCount(name, max(p.tokens for p in layer), experts, max(p.slots for p in layer), size))
    return found


def experts_per_token(counts: Sequence[ExpertCount]) -> float | None:
    """Experts that ran for a token in a layer, on average over the layers; None where nothing was counted."""
    ratios = [count.experts / count.tokens for count in by_layer(counts) if count.tokens]
    return statistics.fmean(ratios) if ratios else None


def skipped_bytes_per_token(counts: Sequence[ExpertCount]) -> float:
    """Weight bytes of the experts that were chosen for a token and skipped, summed over the layers."""
    return sum((count.slots - count.experts) / count.tokens * count.expert_bytes for count in by_layer(counts) if count.tokens)
