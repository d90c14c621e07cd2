"""The routing trace of calibration text, as weights, and what a graph's rules make of it."""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler import ops
from moec.compiler.calibration.statistics import LayerStatistics
from moec.compiler.ir import Graph
from moec.compiler.layers import MoeLayer


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
