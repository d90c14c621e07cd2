"""How many experts each layer keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from moec.compiler.calibration.text import Text
from moec.compiler.candidates import Candidates, Choice
from moec.compiler.errors import MoecError
from moec.compiler.layers import MoeLayer
from moec.compiler.model import Model
from moec.compiler.progress import Progress

BUDGETS = ("per_layer", "global", "moe_i2")

IMPORTANCE_TOKENS = 1024
"""Tokens on which the importance of layers is measured."""


def check_keep(keep: object, what: str) -> None:
    """Check the option `keep`.

    Raises:
        MoecError: it is neither a number of experts nor a share of them.
    """
    whole = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if keep is not None and not whole and not (isinstance(keep, float) and 0 < keep <= 1):
        raise MoecError(f"{what}: keep is {keep!r}; expected a number of experts a layer (8) or a share of them (0.5)")


def kept_count(layer: MoeLayer, keep: float, what: str, least: int | None = None) -> int:
    """How many experts of a layer `keep` stands for.

    Args:
        keep: a number of experts, or as a float a share of them.
        least: the fewest that the layer can do with; what its router chooses unless given.

    Raises:
        MoecError: more than there are, or fewer than the layer can do with.
    """
    least = layer.top_k if least is None else least
    count = keep if isinstance(keep, int) else max(1, round(layer.count * keep))
    groups = int(layer.router.attrs.get("groups", 1))
    if not isinstance(keep, int):
        count = max(groups, count // groups * groups)
    if count > layer.count:
        raise MoecError(f"{what}: keep is {keep}, and %{layer.name} has {layer.count} experts: keep at most so many")
    if count < least:
        raise MoecError(f"{what}: keep={keep} leaves {count} experts of %{layer.name}, which needs {least} for each token: keep more")
    return count


def global_counts(scores: Sequence[Tensor], layers: Sequence[MoeLayer], counts: Sequence[int]) -> list[int]:
    """Counts with the same sum that keep the best experts of all layers together, each layer's scores as shares of its mean.

    Every layer keeps what its router chooses for a token.
    """
    left = [layer.top_k for layer in layers]
    ranked: list[tuple[float, int]] = []
    for at, score in enumerate(scores):
        shares = (score / score.mean().clamp_min(1e-30)).sort(descending=True).values.tolist()
        ranked += [(share, at) for share in shares[layers[at].top_k :]]
    for _, at in sorted(ranked, key=lambda pair: -pair[0])[: max(0, sum(counts) - sum(left))]:
        left[at] += 1
    return left


def importance(model: Model, text: Text, progress: Progress) -> list[float]:
    """How much each layer's experts matter: the sum of the KL divergences that removing one at a time causes, in nats a token.

    The first stage of MoE-I2 (https://arxiv.org/abs/2411.01016).
    """
    windows = text.sample(IMPORTANCE_TOKENS).ids
    candidates = Candidates(model, windows, "the budget moe_i2")
    truth = candidates.logits([None] * len(candidates.layers)).log_softmax(-1)
    found = [0.0] * len(candidates.layers)
    single = [(at, e) for at, layer in enumerate(candidates.layers) for e in range(layer.count)]
    for at, expert in progress.track(single, "importance of layers"):
        count = candidates.layers[at].count
        choices: list[Choice | None] = [None] * len(found)
        choices[at] = Choice.keep([e for e in range(count) if e != expert], count)
        logits = candidates.logits(choices).log_softmax(-1)
        found[at] += float((truth.exp() * (truth - logits)).sum(-1).mean())
    return found


def counts_by_importance(matter: Sequence[float], layers: Sequence[MoeLayer], counts: Sequence[int]) -> list[int]:
    """Counts with the same sum, in which each layer loses experts in proportion to 1 / importance, as far as it can."""
    total = sum(layer.count - count for layer, count in zip(layers, counts, strict=True))
    most = [layer.count - layer.top_k for layer in layers]
    weight = [1 / max(m, 1e-12) for m in matter]
    lost = [0] * len(layers)
    while total > 0 and (open_ := [i for i in range(len(layers)) if lost[i] < most[i]]):
        # The layer that is furthest behind its share loses the next one.
        share = sum(weight[i] for i in open_)
        at = max(open_, key=lambda i: weight[i] / share / (lost[i] + 1))
        lost[at] += 1
        total -= 1
    return [layer.count - n for layer, n in zip(layers, lost, strict=True)]


def at_step(layers: Sequence[MoeLayer], final: Sequence[int], done: float) -> list[int]:
    """Counts part of the way: `done` from 0 to 1 of what each layer loses, rounded down."""
    return [layer.count - math.floor((layer.count - count) * done + 1e-9) for layer, count in zip(layers, final, strict=True)]
