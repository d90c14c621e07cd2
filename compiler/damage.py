"""How far a model has moved from its reference: KL divergence, perplexity and agreement on windows of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model

BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 32768

_REFERENCE_BYTES = 1 << 28
"""The reference's log-probabilities are kept up to this size; with more windows than fit, the first ones are used."""

_PART_BYTES = 1 << 26
"""Logits that are compared at a time: a few copies of them are made."""


@dataclass(frozen=True)
class Distance:
    """A model on windows of text, in nats a token; the last three against a reference.

    `kl_divergence` is the mean of KL(reference || model), `top1_agreement` the share of tokens where both have the same best.
    """

    tokens: int
    nll: float
    kl_divergence: float
    top1_agreement: float
    reference_nll: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "perplexity": self.perplexity}


class Tally:
    """Sums over tokens of what a `Distance` says."""

    def __init__(self) -> None:
        self._sums, self._tokens = torch.zeros(4, dtype=torch.float64), 0

    def add(self, truth: Tensor, logits: Tensor, wanted: Tensor) -> None:
        """Tokens [...]: the reference's log-probabilities and a model's logits [..., V], and what came next."""
        rows = max(1, _PART_BYTES // (4 * truth.shape[-1]))
        for t, x, w in zip(*(a.split(rows) for a in (truth.flatten(0, -2), logits.flatten(0, -2), wanted.flatten()[:, None])), strict=True):
            logp = x.float().log_softmax(-1)
            kl = (t.exp() * (t - logp)).sum(-1)
            parts = (-logp.gather(-1, w), kl, t.argmax(-1) == logp.argmax(-1), -t.gather(-1, w))
            self._sums.add_(torch.stack([part.double().sum() for part in parts]))
        self._tokens += wanted.numel()

    def distance(self) -> Distance:
        """The means."""
        return Distance(self._tokens, *(self._sums / self._tokens).tolist())


def each_logits(model: Model, ids: Tensor, consume: Callable[[int, Tensor], None]) -> None:
    """Run windows [W, T] through a model, some at a time.

    Args:
        consume: called in order with the index of the first window of a batch and the batch's logits [B, T, V].
    """
    parts = batches(ids)
    size = len(parts[0]["ids"])
    Interpreter(model.graph, model.weights).run(parts, lambda index, outputs: consume(index * size, outputs[0]))


def batches(ids: Tensor) -> list[dict[str, Tensor]]:
    """Windows [W, T] as inputs of a graph, as many at a time as make products efficient."""
    tokens = BATCH_TOKENS if torch.get_default_device().type == "cpu" else GPU_BATCH_TOKENS
    positions = torch.arange(ids.shape[1])
    return [{"ids": part, "positions": positions.expand(len(part), -1)} for part in ids.split(max(1, tokens // ids.shape[1]))]


class Damage:
    """Measures models against a reference on the same windows.

    Args:
        reference: the model whose logits are the truth.
        windows: [W, T + 1] tokens; the last one is only predicted.
    """

    def __init__(self, reference: Model, windows: Tensor) -> None:
        vocabulary = int(reference.graph.type_of(reference.graph.outputs[0]).shape[-1])
        most = max(1, _REFERENCE_BYTES // (4 * vocabulary * (windows.shape[1] - 1)))
        self.ids, self.targets = windows[:most, :-1], windows[:most, 1:].to(torch.get_default_device())
        self._truth = torch.empty(*self.ids.shape, vocabulary)

        def keep(at: int, found: Tensor) -> None:
            for i, window in enumerate(found, at):
                self._truth[i] = window.log_softmax(-1)

        each_logits(reference, self.ids, keep)

    @torch.no_grad()
    def __call__(self, model: Model) -> Distance:
        """The distance of a model."""
        tally = Tally()

        def score(at: int, found: Tensor) -> None:
            tally.add(self._truth[at : at + len(found)], found, self.targets[at : at + len(found)])

        each_logits(model, self.ids, score)
        return tally.distance()
