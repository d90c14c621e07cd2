"""Weights with codes: quantised when they are asked for, or layer by layer while calibration text runs through the model.

The second way (`quantize_in_order`) gives each weight the second moment of the inputs that it really gets, after everything before it
has been quantised (https://arxiv.org/abs/2210.17323), and never holds more moments than there are threads at work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from moec.compiler.calibration.collect import batches_of, fingerprint
from moec.compiler.calibration.text import Text
from moec.compiler.codes import CodesOnDisk
from moec.compiler.corrections import Corrected
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Graph, Node
from moec.compiler.layers import MoeLayer, moe_layers
from moec.compiler.model import Model
from moec.compiler.moments import SAMPLE_TOKENS, Moments, blended, moment_of
from moec.compiler.observed import rows
from moec.compiler.ops import EXPERT_MATRICES, expert_activation
from moec.compiler.packed import Quantized, coded_format
from moec.compiler.progress import Progress
from moec.compiler.quantizers import Quantizer
from moec.compiler.weights import WeightSource, packed_of
from moec.runtime.host import physical_cores


@dataclass(frozen=True)
class QuantizedWeights:
    """A source some of whose weights are quantised; `load` gives the values that the codes stand for.

    Args:
        base: the values before.
        graph: says the formats.
        quantizers: by parameter; others are passed through.
        moments: what the quantisers may read of the inputs.
        codes: codes that are there already, by parameter and expert; `keep` adds those that are made.
        corrections: by projection, the low-rank factors of what its codes lose, which are among `quantizers` too.
    """

    base: WeightSource
    graph: Graph
    quantizers: Mapping[str, Quantizer]
    moments: Moments | None = None
    codes: MutableMapping[tuple[str, int | None], Quantized] = field(default_factory=dict)
    keep: bool = True
    corrections: Mapping[str, Corrected] = field(default_factory=dict)

    @cached_property
    def _owners(self) -> dict[str, str]:
        """The projections that factors belong to."""
        return {factor: name for name, corrected in self.corrections.items() for factor in (corrected.left, corrected.right)}

    def packed(self, name: str, expert: int | None = None) -> Quantized | None:
        """See `PackedSource`."""
        if name not in self.quantizers:
            return packed_of(self.base, name, expert)
        if (found := self.codes.get((name, expert))) is not None:
            return found
        owner = self._owners.get(name, name)
        made = self.make(owner, expert, self.moments and self.moments(owner, expert))
        if self.keep:
            self.codes.update({(part, expert): packed for part, packed in made.items()})
        return made.get(name)

    def make(self, name: str, expert: int | None, moment: Tensor | None) -> dict[str, Quantized]:
        """The codes of a weight, and of the factors of what they lose where there are any, by parameter.

        Args:
            moment: [K, K] or [K], of what the weight is multiplied with; None where it is not known.
        """
        corrected, fmt = self.corrections.get(name), coded_format(self.graph.params[name], expert)
        if fmt is None and corrected is None:
            return {}
        weight = self.base.load(name, expert).to(torch.get_default_device()).float()
        if fmt is None:  # an expert that keeps its values, in a stack of which others do not
            return {} if corrected is None else corrected.nothing(self.graph)
        weight, quantizer = weight.reshape(-1, weight.shape[-1]), self.quantizers[name]
        read = moment.diagonal() if moment is not None and moment.ndim == 2 and quantizer.needs == "diagonal" else moment
        quantize = partial(quantizer.quantize, fmt=fmt, moment=None if quantizer.needs == "none" else read)
        if corrected is None:
            return {name: quantize(weight)}
        parts = corrected.how.corrected(weight, fmt, quantize, moment, corrected.rank(self.graph))
        return dict(zip((name, corrected.left, corrected.right), parts, strict=True))

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
        fmt = coded_format(param, expert)
        assert fmt is not None
        return packed.values(fmt).view(shape if expert is None else shape[1:])


def _stacked(graph: Graph, name: str) -> bool:
    return any(n.op == "experts" and n.inputs.index(name) in EXPERT_MATRICES for n in graph.users.get(name, ()))


def quantize_in_order(
    model: Model, quantizers: Mapping[str, Quantizer], text: Text, progress: Progress, *,
    weighted: bool = True, sequential: bool = True, work: Path | None = None, corrections: Mapping[str, Corrected] | None = None,
) -> Model:  # fmt: skip
    """Quantise weights while calibration text runs through the model.

    Args:
        model: its graph says the formats.
        quantizers: by parameter.
        weighted: the moments of an expert count each token with the square of its routing weight, as its output does.
        sequential: each weight gets the inputs that its quantised predecessors make; otherwise those of the model before.
        work: a folder for codes: they are read from there when they are needed, and work that was interrupted goes on from there.
        corrections: as in `QuantizedWeights`.
    """
    codes: MutableMapping[tuple[str, int | None], Quantized] = {}
    if work is not None:
        methods = sorted((name, quantizer.description) for name, quantizer in quantizers.items())
        facts = f"{fingerprint(model, text)} {methods} {weighted} {sequential} {sorted((corrections or {}).items())}"
        codes = CodesOnDisk(work, hashlib.sha256(facts.encode()).hexdigest())
    weights = QuantizedWeights(model.weights, model.graph, quantizers, codes=codes, corrections=corrections or {})
    running = Model(model.graph, weights if sequential else model.weights)
    with progress.counter("quantise") as count, ThreadPoolExecutor(physical_cores(), "expert", torch.set_num_threads, (1,)) as pool:
        Interpreter(model.graph, running.weights).run(batches_of(text), lambda *_: None, count, _InOrder(running, weights, weighted, pool))
    return Model(model.graph, weights)


@dataclass
class _InOrder:
    """The observer that quantises what is about to be used."""

    model: Model
    weights: QuantizedWeights
    weighted: bool
    pool: ThreadPoolExecutor

    def __post_init__(self) -> None:
        self._layers = {layer.name: layer for layer in moe_layers(self.model.graph)}

    def visit(self, node: Node, inputs: Sequence[Sequence[Tensor | None]]) -> Sequence[tuple[Tensor, ...]] | None:
        """See `Observer`."""
        codes = self.weights.codes
        layer, name = self._layers.get(node.name), node.inputs[1] if node.op == "linear" else ""
        if layer is None and (name not in self.weights.quantizers or (name, None) in codes):
            # Nobody reads the graph's results, and the logits are a large part of the work.
            last = node.name in self.model.graph.outputs and node.name not in self.model.graph.users
            return [(torch.empty(0),) * len(node.outputs)] * len(inputs) if last else None
        if layer is not None and set(layer.stacks).isdisjoint(self.weights.quantizers):
            return None
        work = node.name if layer is not None else name
        if isinstance(codes, CodesOnDisk) and codes.resume(work):
            return None
        result = None
        if layer is not None:
            result = self._experts(layer, inputs)
        else:
            self._quantize(name, None, partial(moment_of, [rows(batch[0]) for batch in inputs]))
        if isinstance(codes, CodesOnDisk):
            codes.finish(work)
        return result

    def _quantize(self, name: str, expert: int | None, moment: Callable[[], Tensor]) -> None:
        quantizer, corrected = self.weights.quantizers.get(name), self.weights.corrections.get(name)
        if quantizer is None or (corrected is None and coded_format(self.model.graph.params[name], expert) is None):
            return
        reads = quantizer.needs != "none" or (corrected is not None and corrected.how.weighted)
        made = self.weights.make(name, expert, moment() if reads else None)
        self.weights.codes.update({(part, expert): packed for part, packed in made.items()})

    def _experts(self, layer: MoeLayer, inputs: Sequence[Sequence[Tensor | None]]) -> list[tuple[Tensor, ...]]:
        """Quantise the experts of a layer, several at a time, and run them."""
        parts = [tuple(map(rows, batch[:3])) for batch in inputs]  # of each batch x [n, D], ids [n, K] and weights [n, K]
        results = [torch.zeros_like(x) for x, _, _ in parts]
        step = max(1, sum(len(x) for x, _, _ in parts) // SAMPLE_TOKENS)
        sample = torch.cat([x[::step] for x, _, _ in parts])
        common = moment_of([sample])
        biases = [None if bias is None else bias.to(sample.device) for bias in layer.load_biases(self.model)]
        experts, most = range(layer.count), 2 * physical_cores()  # outputs of so many experts are in memory
        for some in (experts[at : at + most] for at in range(0, layer.count, most)):
            work = partial(self._expert, layer, parts, sample, common, biases)
            made = self.pool.map(work, some) if sample.is_cpu else map(work, some)
            for chosen, added in zip((_chosen(parts, e) for e in some), made, strict=True):
                for result, (token, _), part in zip(results, chosen, added, strict=True):
                    result.index_add_(0, token, part)
        shapes = [batch[0].shape for batch in inputs if batch[0] is not None]
        return [(result.view(shape),) for result, shape in zip(results, shapes, strict=True)]

    @torch.no_grad()
    def _expert(
        self, layer: MoeLayer, parts: Sequence[tuple[Tensor, ...]], sample: Tensor, common: Tensor, biases: list[Tensor | None], expert: int
    ) -> list[Tensor]:
        """Quantise one expert; what it adds to the outputs of its tokens, by batch."""
        chosen = _chosen(parts, expert)
        x = torch.cat([part[0][token] for part, (token, _) in zip(parts, chosen, strict=True)])  # [n, D]
        g = torch.cat([part[2][token, slot] for part, (token, slot) in zip(parts, chosen, strict=True)])  # [n]
        scale = g if self.weighted else None
        bias = [None if b is None else b[expert] for b in biases]

        def load(name: str) -> Tensor:
            return layer.matrix(self.model, name, expert).to(x.device)

        def hidden(tokens: Tensor) -> Tensor:
            return expert_activation(torch.nn.functional.linear(tokens, load(layer.up), bias[0]), **layer.activation)

        self._projection(layer, layer.up, expert, x, scale, lambda: sample, common)
        h = hidden(x)
        self._projection(layer, layer.down, expert, h, scale, lambda: hidden(sample), None)
        f = torch.nn.functional.linear(h, load(layer.down), bias[1]) * g[:, None]
        return list(f.split([len(token) for token, _ in chosen]))

    def _projection(
        self, layer: MoeLayer, name: str, expert: int, x: Tensor, scale: Tensor | None, others: Callable[[], Tensor], common: Tensor | None
    ) -> None:
        """Quantise one projection of an expert, and the factors that are its own weights and no correction.

        Args:
            x: [n, K], what the projection is multiplied with.
            others: the same for tokens of the whole layer.
            common: their moment, where it is known.
        """
        self._quantize(name, expert, partial(blended, x, scale, lambda: moment_of([others()]) if common is None else common))
        if (pair := layer.factors.get(name)) is None or name in self.weights.corrections:
            return
        left, right = pair
        self._quantize(right, expert, partial(blended, x, scale, lambda: moment_of([others()]) if common is None else common))

        def inner(tokens: Tensor) -> Tensor:
            return tokens @ self.model.load(right, expert).to(tokens.device).T

        self._quantize(left, expert, partial(blended, inner(x), scale, lambda: moment_of([inner(others())])))


def _chosen(parts: Sequence[tuple[Tensor, ...]], expert: int) -> list[tuple[Tensor, ...]]:
    """Of each batch the tokens of an expert and the slots that they have it in."""
    return [torch.where(ids == expert) for _, ids, _ in parts]
