"""The inputs of MoE layers on calibration text, for what sums over tokens do not tell: every expert on every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.calibration.collect import batches_of, expert_outputs
from moec.compiler.calibration.text import Text
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Node
from moec.compiler.layers import MoeLayer, moe_layers
from moec.compiler.model import Model
from moec.compiler.observed import joined
from moec.compiler.progress import Progress


@dataclass(frozen=True)
class LayerInputs:
    """What enters one MoE layer: x [N, D], and the router's logits [N, E] with the weights [N, K] and rows [N, K] that it made of them."""

    x: Tensor
    logits: Tensor
    weights: Tensor
    rows: Tensor


def capture(model: Model, text: Text, tokens: int, progress: Progress | None = None) -> dict[str, LayerInputs]:
    """The inputs of every MoE layer on about `tokens` tokens, from windows all over the text, by the name of the `experts` node.

    About 4 N (D + E) bytes a layer are held.
    """
    observer = _Capture(moe_layers(model.graph))
    with (progress or Progress(quiet=True)).counter("inputs of experts") as count:
        Interpreter(model.graph, model.weights).run(batches_of(text.sample(tokens)), lambda *_: None, count, observer)
    return observer.found


class _Capture:
    """The observer that keeps inputs."""

    def __init__(self, layers: Sequence[MoeLayer]) -> None:
        self._experts = {m.name: m for m in layers}
        self._last = {m.router.name: m.name for m in layers}  # several may have one router
        self._logits: dict[str, Tensor] = {}
        self.found: dict[str, LayerInputs] = {}

    def visit(self, node: Node, inputs: Sequence[Sequence[Tensor | None]]) -> None:
        """See `Observer`."""
        if node.name in self._last:
            self._logits[node.name] = joined(inputs, 0)
        if (layer := self._experts.get(node.name)) is not None:
            logits = self._logits[router := layer.router.name]
            self.found[node.name] = LayerInputs(joined(inputs, 0), logits, joined(inputs, 2), joined(inputs, 1))
            if self._last[router] == node.name:
                del self._logits[router]


@torch.no_grad()
def mean_outputs(model: Model, layer: MoeLayer, x: Tensor) -> Tensor:
    """The mean output of each expert over all tokens, routed to it or not: x [N, D] -> [E, D]."""
    return torch.stack([expert_outputs(model, layer, expert, x)[0].mean(0) for expert in range(layer.count)])


@torch.no_grad()
def output_products(model: Model, layer: MoeLayer, x: Tensor) -> Tensor:
    """For each token the inner products of all experts' outputs: x [N, D] -> [N, E, E].

    The squared error of any change d [N, E] of the routing weights is the sum of d_n^T P_n d_n.
    """
    found = torch.empty(len(x), layer.count, layer.count)
    for at in range(0, len(x), 128):  # E outputs of D at a time
        part = x[at : at + 128]
        outputs = torch.stack([expert_outputs(model, layer, expert, part)[0] for expert in range(layer.count)], 1)  # [n, E, D]
        found[at : at + 128] = outputs @ outputs.transpose(1, 2)
    return found
