"""Weights with codes: quantised when they are asked for, or layer by layer while calibration text runs through the model.

The second way (`quantize_in_order`) gives each weight the second moment of the inputs that it really gets, after everything before it
has been quantised (https://arxiv.org/abs/2210.17323), and never holds more than the moment of one weight or expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from moec.compiler.calibration.collect import batches_of
from moec.compiler.calibration.text import Text
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Graph, Node
from moec.compiler.layers import MoeLayer, moe_layers
from moec.compiler.model import Model
from moec.compiler.ops import expert_activation
from moec.compiler.packed import Quantized, integer_format
from moec.compiler.progress import Progress
from moec.compiler.quantizers import Quantizer
from moec.compiler.weights import WeightSource, packed_of

Moments = Callable[[str, int | None], Tensor | None]
"""The second moment of a weight's inputs, by parameter and expert: [K] or [K, K], or None where it is not known."""


@dataclass(frozen=True)
class QuantizedWeights:
    """A source some of whose weights are quantised; `load` gives the values that the codes stand for.

    Args:
        base: the values before.
        graph: says the formats.
        quantizers: by parameter; others are passed through.
        moments: what the quantisers may read of the inputs.
        codes: codes that are there already, by parameter and expert; `keep` adds those that are made.
    """

    base: WeightSource
    graph: Graph
    quantizers: Mapping[str, Quantizer]
    moments: Moments | None = None
    codes: dict[tuple[str, int | None], Quantized] = field(default_factory=dict)
    keep: bool = True

    def packed(self, name: str, expert: int | None = None) -> Quantized | None:
        """See `PackedSource`."""
        if name not in self.quantizers:
            return packed_of(self.base, name, expert)
        if (found := self.codes.get((name, expert))) is not None:
            return found
        if (fmt := integer_format(self.graph.params[name], expert)) is None:
            return None
        weight = self.base.load(name, expert).to(torch.get_default_device()).float()
        made = self.quantizers[name].quantize(weight.reshape(-1, weight.shape[-1]), fmt, self.moments and self.moments(name, expert))
        if self.keep:
            self.codes[name, expert] = made
        return made

    def load(self, name: str, expert: int | None = None) -> Tensor:
        """See `PackedSource`."""
        if name not in self.quantizers:
            return self.base.load(name, expert)
        param = self.graph.params[name]
        shape = tuple(int(d) for d in param.type.shape)
        if expert is None and _stacked(self.graph, name):
            return torch.stack([self.load(name, e) for e in range(shape[0])])
        if (packed := self.packed(name, expert)) is None:
            return self.base.load(name, expert)
        fmt = integer_format(param, expert)
        assert fmt is not None
        return packed.values(fmt).view(shape if expert is None else shape[1:])


def _stacked(graph: Graph, name: str) -> bool:
    return any(n.op == "experts" and name in n.inputs[3:5] for n in graph.users.get(name, ()))


def quantize_in_order(model: Model, quantizers: Mapping[str, Quantizer], text: Text, progress: Progress, weighted: bool = True) -> Model:
    """Quantise weights while calibration text runs through the model, each with the inputs that it gets from quantised predecessors.

    Args:
        model: its graph says the formats.
        quantizers: by parameter.
        weighted: the moments of an expert count each token with the square of its routing weight, as its output does.
    """
    weights = QuantizedWeights(model.weights, model.graph, quantizers)
    observer = _InOrder(Model(model.graph, weights), weights, weighted)
    with progress.counter("quantise") as count:
        Interpreter(model.graph, weights).run(batches_of(text), lambda *_: None, count, observer)
    return Model(model.graph, weights)


@dataclass
class _InOrder:
    """The observer that quantises what is about to be used."""

    model: Model
    weights: QuantizedWeights
    weighted: bool

    def __post_init__(self) -> None:
        self._layers = {layer.name: layer for layer in moe_layers(self.model.graph)}

    def visit(self, node: Node, inputs: Sequence[Sequence[Tensor | None]]) -> Sequence[tuple[Tensor, ...]] | None:
        """See `Observer`."""
        name = node.inputs[1] if node.op == "linear" else ""
        if name in self.weights.quantizers and (name, None) not in self.weights.codes:
            self._quantize(name, None, partial(_moment, [_rows(batch[0]) for batch in inputs], None))
        if (layer := self._layers.get(node.name)) is not None and not {layer.up, layer.down}.isdisjoint(self.weights.quantizers):
            return self._experts(layer, inputs)
        return None

    def _quantize(self, name: str, expert: int | None, moment: Callable[[], Tensor]) -> None:
        quantizer = self.weights.quantizers.get(name)
        if quantizer is None or (fmt := integer_format(self.model.graph.params[name], expert)) is None:
            return
        weight = self.weights.base.load(name, expert).to(torch.get_default_device()).float()
        full = moment() if quantizer.needs != "none" else None
        needed = full.diagonal() if full is not None and quantizer.needs == "diagonal" else full
        self.weights.codes[name, expert] = quantizer.quantize(weight.reshape(-1, weight.shape[-1]), fmt, needed)

    def _experts(self, layer: MoeLayer, inputs: Sequence[Sequence[Tensor | None]]) -> list[tuple[Tensor, ...]]:
        x, ids, weights = (torch.cat([_rows(batch[i]) for batch in inputs]) for i in range(3))  # [N, D], [N, K], [N, K]
        result, attrs = torch.zeros_like(x), layer.experts.attrs
        common = partial(_moment, [x], None)
        cached: list[Tensor] = []  # the moment of all tokens, made when an expert needs it

        def of_all() -> Tensor:
            if not cached:
                cached.append(common())
            return cached[0]

        activation = {k: v for k, v in attrs.items() if k in ("activation", "gated", "limit")}
        biases = [self.model.load(name) if name else None for name in (*layer.experts.inputs[5:7], "", "")[:2]]
        for expert in range(layer.count):
            token, slot = torch.where(ids == expert)
            g = weights[token, slot]
            scale = g if self.weighted else None
            bias = [None if b is None else b[expert] for b in biases]
            self._quantize(layer.up, expert, partial(_blended, x[token], scale, of_all))

            def hidden(rows: Tensor, expert: int = expert, bias: list[Tensor | None] = bias) -> Tensor:
                up = torch.nn.functional.linear(rows, self.model.load(layer.up, expert), bias[0])
                return expert_activation(up, **activation)

            h = hidden(x[token])
            self._quantize(layer.down, expert, partial(_blended, h, scale, partial(_moment_of, hidden, x)))
            f = torch.nn.functional.linear(h, self.model.load(layer.down, expert), bias[1])
            result.index_add_(0, token, f * g[:, None])
        sizes = [len(_rows(batch[0])) for batch in inputs]
        shapes = [batch[0].shape for batch in inputs if batch[0] is not None]
        return [(part.view(shape),) for part, shape in zip(result.split(sizes), shapes, strict=True)]


def _rows(value: Tensor | None) -> Tensor:
    assert value is not None
    return value.reshape(-1, value.shape[-1])


def _moment(parts: Sequence[Tensor], scale: Tensor | None) -> Tensor:
    """The mean of x x^T over rows, each weighted by scale^2: [K, K] float64."""
    total = parts[0].new_zeros(parts[0].shape[1], parts[0].shape[1], dtype=torch.float64)
    rows = 0
    for part in parts:
        x = part if scale is None else part * scale[:, None]
        total += (x.T @ x).double()
        rows += len(part)
    return total / max(1, rows)


def _moment_of(hidden: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The moment of what an expert would make of a sample of all tokens."""
    return _moment([hidden(x[:: max(1, len(x) // 2048)])], None)


PRIOR_TOKENS = 32
"""So many tokens of the whole layer are mixed into an expert's moment, which few tokens alone would not determine."""


def _blended(x: Tensor, scale: Tensor | None, of_all: Callable[[], Tensor]) -> Tensor:
    """The moment of an expert's tokens with a little of all tokens' mixed in: an expert that saw few tokens leans on the others."""
    own, common = _moment([x], scale), of_all()
    # Routing weights make the expert's moment smaller; the mixture is of shapes, not of sizes.
    common = common * (own.trace() / common.trace().clamp_min(1e-30)) if len(x) else common
    return (own * len(x) + common * PRIOR_TOKENS) / (len(x) + PRIOR_TOKENS)
