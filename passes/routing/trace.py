"""The routing trace of calibration text, as weights, and what a graph's rules make of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moec.compiler import ops
from moec.compiler.calibration.collect import batches_of
from moec.compiler.calibration.statistics import LayerStatistics
from moec.compiler.calibration.text import Text
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Graph
from moec.compiler.layers import MoeLayer
from moec.compiler.model import Model


def trace_of(statistics: LayerStatistics, layer: MoeLayer) -> Tensor:
    """The routing weights [N, K] of a layer, float32, zero where a slot was skipped."""
    ids = statistics.ids.long()
    return statistics.weights.float().masked_fill((ids < 0) | (ids >= layer.count), 0.0)


def kept_fraction(graph: Graph, experts: str, weights: Tensor) -> float:
    """The fraction of activations that run in a layer of a graph whose skipping reads nothing but weights [N, K]."""
    node = graph.producers[experts]
    skip = graph.producers.get(node.inputs[1])
    if skip is None or skip.op != "skip" or len(skip.inputs) > 2:
        return 1.0
    ids = torch.zeros(weights.shape, dtype=torch.int64)
    found = ops.skip(weights, ids, **skip.attrs)[1]
    return float(((found == 0) & (weights > 0)).sum() / max(1, int((weights > 0).sum())))


def skipped_on_text(after: Model, layers: Sequence[MoeLayer], text: Text) -> dict[str, float]:
    """By layer the fraction of its activations that a model skips on text, whatever decides about them.

    Args:
        after: the model with the skipping, which is in the earlier layers too.
        layers: as they are without it.
    """
    graph = after.graph
    pairs = [(layer.experts.inputs[1], graph.producers[layer.name].inputs[1]) for layer in layers]
    counts = torch.zeros(len(layers), 2, dtype=torch.int64)

    def consume(_: int, outputs: tuple[Tensor, ...]) -> None:
        for index, (layer, *ids) in enumerate(zip(layers, outputs[::2], outputs[1::2], strict=True)):
            counts[index] += torch.stack([((i >= 0) & (i < layer.count)).sum() for i in ids])

    names = [name for pair in pairs for name in pair]
    Interpreter(graph.with_nodes(graph.nodes, names), after.weights).run(batches_of(text), consume)
    return {layer.name: 1 - int(kept) / max(1, int(ran)) for layer, (ran, kept) in zip(layers, counts, strict=True)}
