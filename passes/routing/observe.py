"""What goes through the MoE layers of a model on calibration text, a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moec.compiler.calibration.collect import batches_of, expert_outputs
from moec.compiler.calibration.text import Text
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Node
from moec.compiler.layers import MoeLayer, moe_layers
from moec.compiler.model import Model
from moec.compiler.observed import joined, parted
from moec.compiler.progress import Progress
from moec.passes.routing.protect import residual_of


@dataclass(frozen=True)
class Block:
    """One MoE layer on N tokens.

    Args:
        x: [N, D], what router and experts read.
        residual: [N, D], the residual stream that the layer's result is added to.
        ids: [N, K] int64.
        weights: [N, K], best first.
        slots: [N, K, D], what each slot adds to the result: the weight times the expert's output.
    """

    layer: MoeLayer
    x: Tensor
    residual: Tensor
    ids: Tensor
    weights: Tensor
    slots: Tensor


def each_block(model: Model, text: Text, consume: Callable[[Block], None], progress: Progress, what: str) -> None:
    """Run calibration text through a model and show every MoE layer, one in memory at a time."""
    observer = _Blocks(model, consume)
    with progress.counter(what) as count:
        Interpreter(model.graph, model.weights).run(batches_of(text), lambda *_: None, count, observer)


@dataclass
class _Blocks:
    model: Model
    consume: Callable[[Block], None]
    _residuals: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self._layers = {layer.name: layer for layer in moe_layers(graph)}
        self._norms = {layer.experts.inputs[0]: residual_of(graph, layer) for layer in self._layers.values()}

    def visit(self, node: Node, inputs: Sequence[Sequence[Tensor | None]]) -> Sequence[tuple[Tensor, ...]] | None:
        """See `Observer`."""
        if self._norms.get(node.name) in node.inputs[:1]:
            self._residuals[node.name] = joined(inputs, 0)
        layer = self._layers.get(node.name)
        if layer is None:
            return None
        x, ids, weights = (joined(inputs, i) for i in range(3))
        slots = torch.zeros(*ids.shape, x.shape[-1])
        for expert in range(layer.count):
            token, slot = torch.where(ids == expert)
            if len(token):
                slots[token, slot] = expert_outputs(self.model, layer, expert, x[token])[0] * weights[token, slot, None]
        with torch.enable_grad():
            self.consume(Block(layer, x, self._residuals.pop(node.inputs[0], x), ids, weights, slots))
        return parted(slots.sum(1), inputs)
