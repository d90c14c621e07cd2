"""The values that an artifact would hold: every weight after its format has rounded it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ir import Graph
from moec.compiler.model import Model
from moec.compiler.packed import Quantized, format_name, integer_format
from moec.compiler.quantizers import get_quantizer
from moec.compiler.weights import WeightSource, packed_of

_FLOATS = {"bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class StoredWeights:
    """A source that gives each weight as its format keeps it: the codes that passes made, or rounded to nearest."""

    base: WeightSource
    graph: Graph

    def load(self, name: str, expert: int | None = None) -> Tensor:
        """See `WeightSource`."""
        param = self.graph.params[name]
        stacked = integer_format(param, expert or 0) is not None and len(param.type.shape) > 2
        if expert is None and (stacked or not isinstance(param.format, str)):
            return torch.stack([self.load(name, e) for e in range(int(param.type.shape[0]))])
        if (fmt := integer_format(param, expert)) is not None and packed_of(self.base, name, expert) is None:
            value = self.base.load(name, expert)
            made = get_quantizer("rtn").quantize(value.float().reshape(-1, value.shape[-1]), fmt)
            return made.values(fmt).view(value.shape)
        value = self.base.load(name, expert)
        if format_name(param, expert) == "zero":
            return torch.zeros_like(value)
        plain = _FLOATS.get(format_name(param, expert))
        return value.to(plain) if plain is not None and value.is_floating_point() else value

    def packed(self, name: str, expert: int | None = None) -> Quantized | None:
        """See `PackedSource`."""
        return packed_of(self.base, name, expert)


def as_stored(model: Model) -> Model:
    """A model whose weights have the values that an artifact of it would hold."""
    return Model(model.graph, StoredWeights(model.weights, model.graph))
