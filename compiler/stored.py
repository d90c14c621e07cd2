"""What an artifact holds of a weight: its codes, or the values after its format has rounded them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ir import Graph, Param
from moec.compiler.model import Model
from moec.compiler.packed import CodedFormat, Packed, Quantized, coded_format, format_name, pack_plain, rounded
from moec.compiler.quantizers import get_quantizer
from moec.compiler.weights import WeightSource, packed_of


@dataclass(frozen=True)
class StoredWeights:
    """A source that gives each weight as its format keeps it: the codes that passes made, or rounded to nearest."""

    base: WeightSource
    graph: Graph

    def load(self, name: str, expert: int | None = None) -> Tensor:
        """See `WeightSource`."""
        param = self.graph.params[name]
        stacked = coded_format(param, expert or 0) is not None and len(param.type.shape) > 2
        if expert is None and (stacked or not isinstance(param.format, str)):
            return torch.stack([self.load(name, e) for e in range(int(param.type.shape[0]))])
        if (fmt := coded_format(param, expert)) is not None and packed_of(self.base, name, expert) is None:
            shape = [int(d) for d in (param.type.shape if expert is None else param.type.shape[1:])]
            return _codes(self.base, param, expert, fmt).values(fmt).view(shape)
        return rounded(self.base.load(name, expert), format_name(param, expert))

    def packed(self, name: str, expert: int | None = None) -> Quantized | None:
        """See `PackedSource`."""
        return packed_of(self.base, name, expert)


def as_stored(model: Model) -> Model:
    """A model whose weights have the values that an artifact of it would hold."""
    return Model(model.graph, StoredWeights(model.weights, model.graph))


def pack(weights: WeightSource, param: Param, expert: int | None) -> Packed:
    """A weight (or one expert of a stacked weight) in the parameter's format: the codes that passes made, or rounded to nearest."""
    if (fmt := coded_format(param, expert)) is None:
        return pack_plain(param, weights.load(param.name, expert), expert)
    return _codes(weights, param, expert, fmt)


def _codes(weights: WeightSource, param: Param, expert: int | None, fmt: CodedFormat) -> Quantized:
    if (made := packed_of(weights, param.name, expert)) is not None:
        return made
    value = weights.load(param.name, expert)
    return get_quantizer("rtn").quantize(value.reshape(-1, value.shape[-1]), fmt)
