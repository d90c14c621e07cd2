"""Criteria: which experts of a layer matter. A file's name is the criterion's.

A file has one of two functions, and `NEEDS`, which says what of a `View` it reads ("statistics", "inputs"):

    score(view) -> Tensor [E]                  higher = keep; the experts are judged one by one
    choose(view, keep) -> list of experts      those to keep are chosen together

Options of a criterion are keyword-only arguments of its function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.compiler.calibration.capture import LayerInputs, capture
from moec.compiler.calibration.statistics import LayerStatistics
from moec.compiler.context import Context
from moec.compiler.layers import MoeLayer
from moec.compiler.model import Model
from moec.compiler.plugins import file_names, load_file, with_options


@dataclass(frozen=True)
class View:
    """What a criterion may look at: one layer of a model.

    `statistics` and `inputs` are there for criteria whose `NEEDS` names them.
    """

    model: Model
    layer: MoeLayer
    seed: int = 0
    known: LayerStatistics | None = None
    seen: LayerInputs | None = None

    @property
    def statistics(self) -> LayerStatistics:
        """Sums over all calibration tokens."""
        assert self.known is not None
        return self.known

    @property
    def inputs(self) -> LayerInputs:
        """A sample of the layer's inputs."""
        assert self.seen is not None
        return self.seen

    @property
    def generator(self) -> torch.Generator:
        """Random numbers of this layer's own."""
        return torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + self.layer.index)


@dataclass(frozen=True)
class Criterion:
    """A criterion: its name, what it needs, and one of its two functions."""

    name: str
    needs: tuple[str, ...]
    score: Callable[[View], Tensor] | None
    choose: Callable[[View, int], list[int]] | None

    def keep(self, view: View, count: int) -> list[int]:
        """The experts of a layer to keep, in order."""
        if count >= view.layer.count:
            return list(range(view.layer.count))
        if self.choose is not None:
            return sorted(self.choose(view, count))
        return best(self.scores(view), count, int(view.layer.router.attrs.get("groups", 1)))

    def scores(self, view: View) -> Tensor:
        """The scores [E] float64."""
        assert self.score is not None
        return self.score(view).double()


def views(model: Model, layers: Sequence[MoeLayer], needs: Sequence[str], context: Context, what: str, tokens: int = 1024) -> list[View]:
    """What criteria with these needs look at, a layer each.

    Args:
        tokens: of the sample of inputs.

    Raises:
        MoecError: they need calibration text, and there is none.
    """
    statistics = context.statistics(model, what) if "statistics" in needs else None
    inputs = capture(model, context.need_text(what), tokens, context.progress) if "inputs" in needs else {}
    return [View(model, m, context.seed, statistics.layer(m.name) if statistics else None, inputs.get(m.name)) for m in layers]


def best(scores: Tensor, count: int, groups: int = 1) -> list[int]:
    """The experts of the highest scores, in order; of each group of neighbours the same number, where `count` can be shared out so.

    >>> best(torch.tensor([3.0, 2.0, 9.0, 1.0]), 2), best(torch.tensor([3.0, 2.0, 1.0, 0.0]), 2, groups=2)
    ([0, 2], [0, 2])
    """
    if groups > 1 and count % groups == 0:
        size = len(scores) // groups
        return [g * size + e for g, part in enumerate(scores.split(size)) for e in best(part, count // groups)]
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def known_criteria() -> list[str]:
    """The names of all criteria."""
    return file_names(__name__)


def get_criterion(name: str, options: Mapping[str, Any] | None = None) -> Criterion:
    """The criterion of this name.

    Args:
        options: keyword arguments of its function.

    Raises:
        MoecError: there is none, or it has no such option; the message lists those that exist.
    """
    module = load_file(__name__, "criterion", name)
    made: dict[str, Callable[..., Any]] = {
        kind: with_options(getattr(module, kind), options, f"criterion {name}") for kind in ("score", "choose") if hasattr(module, kind)
    }
    return Criterion(name, module.NEEDS, made.get("score"), made.get("choose"))
