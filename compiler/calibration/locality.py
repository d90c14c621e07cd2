"""Figures derived from a routing trace: how evenly experts are used, by whom, and how long they stay in use.

SRP and SCH are the local routing consistency of https://arxiv.org/abs/2505.16056: the F1 score of the best router that decides once for a
segment of m tokens, and the hit rate of a cache of rho K experts that evicts, knowing the next m tokens, what is used least in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.compiler.calibration.statistics import LayerStatistics, Statistics

SEGMENT = 16
"""Tokens of a segment, m."""

CACHES = (1, 2, 3)
"""Sizes of the cache, in active experts: rho."""


@dataclass(frozen=True)
class Locality:
    """Of one layer.

    Args:
        srp: segment routing best performance, from 0 to 1.
        srp_experts: experts that the best segment router keeps active, in K.
        sch: segment cache best hit rate by cache size in K.
    """

    srp: float
    srp_experts: float
    sch: dict[int, float]


@dataclass(frozen=True)
class Use:
    """How one layer used its experts.

    Args:
        share: [E]: part of all choices that each expert got.
        domain_share: [domains, E]: the same on each domain.
        entropy: of `share`, over its largest value log E: 1 is even, 0 is one expert for all.
        variation: coefficient of variation of the counts: deviation over mean.
        domain_distance: how far domains differ: the mean over domains of the total variation distance between `domain_share` and `share`.
    """

    layer: str
    tokens: int
    top_k: int
    share: tuple[float, ...]
    domain_share: tuple[tuple[float, ...], ...]
    entropy: float
    variation: float
    domain_distance: float
    locality: Locality | None = None

    @property
    def used(self) -> int:
        """Experts that were chosen at all."""
        return sum(s > 0 for s in self.share)

    @property
    def most(self) -> tuple[int, float]:
        """The expert that was chosen most, and its share."""
        return max(enumerate(self.share), key=lambda pair: pair[1])

    @property
    def least(self) -> tuple[int, float]:
        """The expert that was chosen least, and its share."""
        return min(enumerate(self.share), key=lambda pair: pair[1])

    def to_json(self) -> dict[str, Any]:
        found = {"experts": len(self.share), "used": self.used, **{k: v for k, v in vars(self).items() if k != "locality"}}
        return found if self.locality is None else {**found, **vars(self.locality)}


def expert_use(statistics: Statistics, *, locality: bool = False) -> list[Use]:
    """The use of every layer's experts; with `locality` SRP and SCH as well."""
    return [_use(name, layer, statistics.window, locality) for name, layer in statistics.layers.items()]


def _use(name: str, layer: LayerStatistics, window: int, locality: bool) -> Use:
    count = layer.count.double()
    share = count / count.sum().clamp_min(1)
    domains = layer.domain_count.double()
    domain_share = domains / domains.sum(1, keepdim=True).clamp_min(1)
    return Use(
        name, layer.tokens, layer.ids.shape[1], tuple(share.tolist()), tuple(map(tuple, domain_share.tolist())), load_entropy(share),
        float(count.std(correction=0) / count.mean().clamp_min(1e-30)), float((domain_share - share).abs().sum(1).mean() / 2),
        layer_locality(layer.ids, layer.experts, window) if locality else None,
    )  # fmt: skip


def load_entropy(share: Tensor) -> float:
    """The entropy of shares [E] over log E.

    >>> load_entropy(torch.tensor([0.25, 0.25, 0.25, 0.25])), load_entropy(torch.tensor([1.0, 0.0]))
    (1.0, 0.0)
    """
    return float(torch.special.entr(share.double()).sum()) / math.log(len(share)) if len(share) > 1 else 1.0


def layer_locality(ids: Tensor, experts: int, window: int, segment: int = SEGMENT, caches: Sequence[int] = CACHES) -> Locality:
    """SRP and SCH of a trace.

    Args:
        ids: [N, K] the experts of each token; others than 0 to E - 1 are skipped slots.
        window: tokens that follow each other: neither segments nor caches reach over its end.
        segment: m, at most `window`.
        caches: rho.
    """
    chosen = _chosen(ids, experts).view(-1, window, experts)  # [W, T, E]
    segment = min(segment, window)
    total = torch.zeros(chosen.shape[0], window + 1, experts, dtype=torch.int32)
    torch.cumsum(chosen.int(), 1, out=total[:, 1:])
    uses = total[:, segment:] - total[:, :-segment]  # [W, T - m + 1, E]: f of every segment
    srp, active = segment_routing(torch.bincount(uses.flatten(), minlength=segment + 1), segment)
    k = ids.shape[1]
    sch = {rho: _hit_rate(chosen, total, min(experts, rho * k), segment) for rho in caches}
    return Locality(srp, active * experts / k, sch)


def segment_routing(histogram: Tensor, segment: int) -> tuple[float, float]:
    """The best F1 of a router that activates an expert for a whole segment if it is used at least alpha times in it.

    Args:
        histogram: [m + 1]: how many pairs of segment and expert have each number of uses.

    Returns:
        The score, and the share of pairs that are active.
    """
    f, h = torch.arange(segment + 1, dtype=torch.float64), histogram.double()
    # Sums over f >= alpha, for alpha = 1 to m.
    above = {name: value.flip(0).cumsum(0).flip(0)[1:] for name, value in (("tp", h * f), ("fp", h * (segment - f)), ("active", h))}
    missed = float((h * f).sum()) - above["tp"]
    score = 2 * above["tp"] / (2 * above["tp"] + above["fp"] + missed).clamp_min(1e-30)
    best = int(score.argmax())
    return float(score[best]), float(above["active"][best] / h.sum().clamp_min(1))


def _chosen(ids: Tensor, experts: int) -> Tensor:
    """[N, E] bool: which experts each token uses."""
    inside = (ids >= 0) & (ids < experts)
    safe = ids.long().where(inside, torch.tensor(experts))
    return torch.zeros(len(ids), experts + 1, dtype=torch.bool).scatter_(1, safe, True)[:, :experts]


def _hit_rate(chosen: Tensor, total: Tensor, size: int, segment: int) -> float:
    """Hits over uses of caches that start empty with each window.

    Args:
        chosen: [W, T, E].
        total: [W, T + 1, E]: uses before each token.
        size: experts in the cache.
    """
    windows, tokens, experts = chosen.shape
    cached = torch.zeros(windows, experts, dtype=torch.bool)
    hits = 0
    for t in range(tokens):
        now = chosen[:, t]
        hits += int((cached & now).sum())
        soon = total[:, min(tokens, t + 1 + segment)] - total[:, t + 1]  # [W, E]: uses in the next m tokens
        # What this token uses stays in any case; of the others those that are cached and used most.
        rank = torch.where(now, soon + (segment + 2), torch.where(cached, soon + 1, 0))
        best = rank.topk(size, 1)
        cached = torch.zeros_like(cached).scatter_(1, best.indices, best.values > 0)
    return hits / max(1, int(chosen.sum()))
