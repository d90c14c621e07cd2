"""The factors themselves, layer by layer, each expert with the inputs that it gets from predecessors that have theirs already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.calibration.collect import batches_of
from moec.compiler.context import Context
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Node
from moec.compiler.layers import MoeLayer
from moec.compiler.low_rank import Norm, factorize
from moec.compiler.model import Model
from moec.compiler.moments import SAMPLE_TOKENS, blended, moment_of
from moec.compiler.observed import joined, parted
from moec.compiler.ops import expert_activation

Ranks = Mapping[tuple[str, int], int]
"""The rank of a projection of an expert; those that stay whole have none."""

Fitted = dict[tuple[str, int], tuple[Tensor, ...]]
"""Of a projection of an expert its factors, left and right, or the one matrix that it becomes; float32 on the CPU."""


def fit(model: Model, layers: Sequence[MoeLayer], ranks: Ranks, ridge: float | None, context: Context) -> Fitted:
    """Factors of the projections that have a rank, and what becomes of others.

    Args:
        ridge: down projections are fitted to give, from what the factors of the up projection leave, what they gave before, with this
            share of the mean square of their inputs pulling to what they were; None fits them to what they were.
    """
    observer = _Fit(model, {layer.name: layer for layer in layers}, ranks, ridge)
    with context.progress.counter("factors") as count:
        Interpreter(model.graph, model.weights).run(batches_of(context.need_text("low_rank")), lambda *_: None, count, observer)
    return observer.found


@dataclass
class _Fit:
    """The observer that replaces matrices before their layer runs."""

    model: Model
    layers: Mapping[str, MoeLayer]
    ranks: Ranks
    ridge: float | None
    found: Fitted = field(default_factory=dict)

    @torch.no_grad()
    def visit(self, node: Node, inputs: Sequence[Sequence[Tensor | None]]) -> Sequence[tuple[Tensor, ...]] | None:
        """See `Observer`."""
        layer = self.layers.get(node.name)
        if layer is None:
            return None
        x, ids, weights = (joined(inputs, i) for i in range(3))  # [N, D], [N, K], [N, K]
        sample, result = x[:: max(1, len(x) // SAMPLE_TOKENS)], torch.zeros_like(x)
        common = moment_of([sample])
        for expert in range(layer.count):
            token, slot = torch.where(ids == expert)
            g = weights[token, slot]
            result.index_add_(0, token, self._expert(layer, expert, x[token], g, sample, common) * g[:, None])
        return parted(result, inputs)

    def _expert(self, layer: MoeLayer, expert: int, x: Tensor, g: Tensor, sample: Tensor, common: Tensor) -> Tensor:
        """Fit an expert; its new outputs [n, D]."""
        up, down = (self.model.load(name, expert).to(x.device) for name in (layer.up, layer.down))
        biases = [None if bias is None else bias.to(x.device)[expert] for bias in layer.load_biases(self.model)]

        def hidden(tokens: Tensor, matrix: Tensor) -> Tensor:
            return expert_activation(F.linear(tokens, matrix, biases[0]), **layer.activation)

        new_up = self._factored(layer.up, expert, up, lambda: blended(x, g, lambda: common))
        h = hidden(x, new_up)
        if self.ridge is not None and new_up is not up and len(x):
            down = refitted(down, hidden(x, up) * g[:, None], h * g[:, None], self.ridge)
            self.found[layer.down, expert] = (down.cpu(),)
        down = self._factored(layer.down, expert, down, lambda: blended(h, g, lambda: moment_of([hidden(sample, new_up)])))
        return F.linear(h, down, biases[1])

    def _factored(self, name: str, expert: int, matrix: Tensor, moment: Callable[[], Tensor]) -> Tensor:
        if (rank := self.ranks.get((name, expert))) is None:
            return matrix
        left, right = factorize(matrix, Norm.of(moment(), matrix.shape[1]), rank)
        self.found[name, expert] = left.cpu(), right.cpu()
        return left @ right


def refitted(down: Tensor, before: Tensor, after: Tensor, ridge: float) -> Tensor:
    """The matrix [D, F] that gives of inputs `after` [n, F] what `down` gave of `before` [n, F], by least squares."""
    wide, old, new = down.double(), before.double(), after.double()
    moment = new.T @ new
    pull = ridge * float(moment.diagonal().mean()) + 1e-12
    moment.diagonal().add_(pull)
    solved: Tensor = torch.linalg.solve(moment, ((wide @ old.T) @ new + pull * wide).T)
    return solved.T.to(down.dtype).contiguous()
