"""Second moments of what weights are multiplied with: [K] or [K, K], means over the tokens that reach the weight.

The moments of an expert count each token with the square of its routing weight where `weighted`, as the expert's output does. An expert
that saw few tokens leans on those of all tokens: `PRIOR_TOKENS` of these are mixed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from moec.compiler.calibration.statistics import LayerStatistics, Statistics
from moec.compiler.ir import Graph
from moec.compiler.layers import moe_layers

Moments = Callable[[str, "int | None"], "Tensor | None"]
"""The second moment of a weight's inputs, by parameter and expert: [K] or [K, K], or None where it is not known."""

PRIOR_TOKENS = 32
"""So many tokens of the whole layer are mixed into an expert's moment, which few tokens alone would not determine."""

SAMPLE_TOKENS = 2048
"""Tokens that stand for all of a layer's."""

_STRIP = 512
"""Columns of a moment computed at once: the half below the diagonal is copied, not computed."""


def moment_of(parts: Sequence[Tensor], scale: Tensor | None = None) -> Tensor:
    """The mean of x x^T over rows: [K, K] float32.

    Args:
        parts: inputs [n, K] each.
        scale: of each row of the only part, [n].
    """
    k, rows = parts[0].shape[1], sum(map(len, parts))
    total = parts[0].new_zeros(k, k)
    for part in parts:
        x = part if scale is None else part * scale[:, None]
        for at in range(0, k, _STRIP):
            total[at : at + _STRIP, at:].addmm_(x[:, at : at + _STRIP].T, x[:, at:])
    for at in range(0, k, _STRIP):
        total[at + _STRIP :, at : at + _STRIP] = total[at : at + _STRIP, at + _STRIP :].T
    return total.div_(max(1, rows))


def blended(x: Tensor, scale: Tensor | None, of_all: Callable[[], Tensor]) -> Tensor:
    """The moment of an expert's tokens [n, K], with a little of all tokens' where they are fewer than would determine it.

    Args:
        of_all: makes the moment of all tokens.
    """
    own = moment_of([x], scale)
    return own if len(x) >= 2 * x.shape[1] else mix(own, len(x), of_all())


def mix(own: Tensor, count: float, common: Tensor) -> Tensor:
    """A moment [K] or [K, K] of `count` tokens with PRIOR_TOKENS of another's shape.

    Routing weights make the expert's moment smaller; the mixture is of shapes, not of sizes.
    """
    sizes = [float(m.diagonal().sum() if m.ndim == 2 else m.sum()) for m in (own, common)]
    if sizes[0] > 0:
        common = common * (sizes[0] / max(sizes[1], 1e-30))
    return (own * count + common * PRIOR_TOKENS) / (count + PRIOR_TOKENS)


def diagonal_moments(graph: Graph, statistics: Statistics, weighted: bool) -> Moments:
    """Mean squares of inputs [K], read off statistics of a model with this graph's layers and linear weights."""
    owners = {name: (layer.name, name == layer.down) for layer in moe_layers(graph) for name in (layer.up, layer.down)}

    def moments(name: str, expert: int | None) -> Tensor | None:
        if name not in owners or expert is None:
            return statistics.linear_square.get(name)
        layer, hidden = owners[name]
        return _of_expert(statistics.layer(layer), expert, hidden, weighted)

    return moments


def _of_expert(layer: LayerStatistics, expert: int, hidden: bool, weighted: bool) -> Tensor:
    sums = layer.hidden_square if hidden else layer.input_square
    chosen = (layer.weighted_hidden_square if hidden else layer.weighted_input_square) if weighted else sums
    count = int(layer.count[expert])
    return mix(chosen[expert] / max(1, count), count, sums.sum(0) / max(1, int(layer.count.sum())))
