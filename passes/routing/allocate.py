"""How much each layer drops: fractions of a layer's activations, whose mean is the target, by the damage that each layer alone does.

The damage of a layer is measured at two fractions and taken to be a power law between and beyond them, KL(f) = a f^p. Damages are taken
to add up. Then the total is least where the marginal damages a p f^(p - 1) are equal, which one bisection finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moec.compiler.context import Context
from moec.compiler.layers import MoeLayer
from moec.compiler.model import Model

Fractions = dict[str, float]
"""By the name of an `experts` node, the fraction of its activations to drop."""

_LEAST_POWER, _MOST_POWER = 1.1, 6.0
"""Powers that are believed: less than a little convexity is noise and would put everything into one layer."""
_FLOOR = 1e-7
"""Nats: damages below this are taken as this."""


@dataclass(frozen=True)
class Curve:
    """KL(f) = scale f^power."""

    scale: float
    power: float

    def __call__(self, fraction: float) -> float:
        """The damage at a fraction."""
        return float(self.scale * fraction**self.power)

    def at_slope(self, slope: float) -> float:
        """The fraction where the curve's slope is this."""
        return float((slope / (self.scale * self.power)) ** (1 / (self.power - 1)))


def curve_through(first: tuple[float, float], second: tuple[float, float]) -> Curve:
    """The curve through two points (fraction, damage), the first with the smaller fraction.

    >>> curve = curve_through((0.1, 0.01), (0.2, 0.04))
    >>> round(curve.power, 6), round(curve(0.3), 6)
    (2.0, 0.09)
    """
    (f1, d1), (f2, d2) = ((f, max(d, _FLOOR)) for f, d in (first, second))
    power = min(max(math.log(d2 / d1) / math.log(f2 / f1), _LEAST_POWER), _MOST_POWER)
    return Curve(d2 / f2**power, power)


def share(curves: Sequence[Curve], most: Sequence[float], target: float) -> list[float]:
    """Fractions with the mean `target` (or all at `most`) whose total damage is least.

    >>> [round(f, 3) for f in share([Curve(1, 2), Curve(3, 2)], [0.5, 0.5], 0.2)]
    [0.3, 0.1]
    """
    if target >= sum(most) / len(most):
        return list(most)
    low, high = -60.0, 60.0
    for _ in range(100):
        middle = (low + high) / 2
        found = [min(curve.at_slope(math.exp(middle)), limit) for curve, limit in zip(curves, most, strict=True)]
        low, high = (middle, high) if sum(found) < target * len(most) else (low, middle)
    return found


def allocate(
    model: Model, layers: Sequence[MoeLayer], target: float, rewrite: Callable[[Fractions], Model], context: Context, what: str
) -> Fractions:
    """Fractions of the layers with the mean `target`, weighted by how many experts each chooses.

    Args:
        rewrite: the model in which these layers drop these fractions.

    Raises:
        MoecError: there is no calibration text.
    """
    most = [(layer.top_k - 1) / layer.top_k for layer in layers]
    before = context.damage(model, what).kl_divergence
    curves = []
    for layer, limit in context.progress.track(list(zip(layers, most, strict=True)), f"{what}: damage by layer"):
        points = [min(target, limit / 2), min(2 * target, limit)]
        found = [context.damage(rewrite({layer.name: f}), what).kl_divergence - before for f in points]
        curves.append(curve_through((points[0], found[0]), (points[1], found[1])))
    fractions = {layer.name: f for layer, f in zip(layers, share(curves, most, target), strict=True)}
    context.note(
        f"{what}: fractions by damage",
        fractions={n: round(f, 4) for n, f in fractions.items()},
        curves={layer.name: [c.scale, c.power] for layer, c in zip(layers, curves, strict=True)},
    )
    return fractions


def within_limit(build: Callable[[float], Model], target: float, context: Context, what: str, *, steps: int = 5) -> tuple[Model, float]:
    """The model of the target, or where that does more damage than `context.max_kl` that of the largest smaller target which does not.

    Args:
        build: from a target to a model.
        steps: of a bisection.
    """
    built = build(target)
    if context.max_kl is None or context.text is None or context.damage(built, what).kl_divergence <= context.max_kl:
        return built, target
    low, high, best = 0.0, target, (build(0.0), 0.0)
    for _ in range(steps):
        middle = (low + high) / 2
        built = build(middle)
        if context.damage(built, what).kl_divergence <= context.max_kl:
            low, best = middle, (built, middle)
        else:
            high = middle
    return best
