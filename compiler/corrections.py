"""The graph of experts whose quantisation error is corrected by low-rank factors (see `compiler/low_rank.py`).

@up: f32[E, 2F, D] as int2_g64   ->   @up: f32[E, 2F, D] as int2_g64
                                      @up.left: f32[E, 2F, r] as int8_channel,  @up.right: f32[E, r, D] as int8_channel
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moec.compiler.allocation import Problem, member_shape
from moec.compiler.factors import with_factors
from moec.compiler.ir import Graph
from moec.compiler.layers import MoeLayer, moe_layers
from moec.compiler.low_rank import Correction
from moec.compiler.model import Model
from moec.compiler.packed import Quantized, is_quantized
from moec.compiler.plan import param_bytes
from moec.compiler.quantizers import get_quantizer
from moec.compiler.weights import Edit
from moec.runtime.formats import get_format
from moec.runtime.formats.int import IntFormat


@dataclass(frozen=True)
class Corrected:
    """The factors of a projection, by the names of their parameters, and how they are made."""

    left: str
    right: str
    how: Correction

    def rank(self, graph: Graph) -> int:
        """Their rank."""
        return int(graph.params[self.right].type.shape[1])

    def nothing(self, graph: Graph) -> dict[str, Quantized]:
        """Factors that add nothing, for an expert that keeps its values."""
        fmt, quantize = get_format(self.how.format), get_quantizer("rtn").quantize
        assert isinstance(fmt, IntFormat)
        return {name: quantize(torch.zeros([int(d) for d in graph.params[name].type.shape[1:]]), fmt) for name in (self.left, self.right)}


def with_corrections(model: Model, names: Collection[str], how: Correction) -> tuple[Model, dict[str, Corrected]]:
    """The model with low-rank factors at the quantised ones of some projections of experts; they are zero until the weights have codes.

    Args:
        names: parameters; those that are not projections of experts have no factors.

    Returns:
        The model, and the factors by projection.
    """
    found: dict[str, Corrected] = {}
    edits: dict[str, Edit] = {}
    graph = model.graph
    for layer in moe_layers(graph):
        ranks = _ranks(graph, layer, names, how)
        if ranks:
            graph = with_factors(graph, layer, ranks, dict.fromkeys(ranks, how.format))
            (changed,) = (m for m in moe_layers(graph) if m.name == layer.name)
            for name in ranks:
                pair = changed.factors[name]
                found[name] = Corrected(*pair, how)
                edits |= {factor: _zeros([int(d) for d in graph.params[factor].type.shape]) for factor in pair}
    return model.edited(graph, edits), found


def _ranks(graph: Graph, layer: MoeLayer, names: Collection[str], how: Correction) -> dict[str, int]:
    ranks = {}
    for name in (layer.up, layer.down):
        param = graph.params[name]
        if name in names and is_quantized(param) and name not in layer.factors:
            count, n, k = (int(d) for d in param.type.shape)
            ranks[name] = how.rank_of(n, k, param_bytes(param) / count)
    return ranks


def _zeros(shape: list[int]) -> Edit:
    def edit(expert: int | None) -> Tensor:
        return torch.zeros(shape if expert is None else shape[1:])

    return edit


def corrected_sizes(problem: Problem, how: Correction) -> NDArray[np.int64]:
    """Bytes of each unit in each format, those of experts with as much as the factors may take that they get: [U, O]."""
    sizes = problem.sizes.copy()
    for index, unit in enumerate(problem.units):
        if unit.expert is not None:
            shapes = [member_shape(problem.model, unit, member) for member in unit.members]
            sizes[index] += [sum(_most(how, n, k, get_format(fmt).nbytes((n, k))) for n, k in shapes) for fmt in problem.formats]
    return sizes


def _most(how: Correction, n: int, k: int, size: int) -> int:
    """Bytes that factors of a matrix [n, k] of `size` bytes add to a layer's at most; a share is one of the mean of the layer's experts."""
    if how.rank >= 1:
        return how.nbytes(n, k, how.rank_of(n, k, size))
    return max(ceil(how.rank * size), how.nbytes(n, k, 1))
