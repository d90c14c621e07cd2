"""Refit down projections to the neurons that are kept, layer by layer, each with the inputs that it gets from slimmed predecessors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moec.compiler.calibration.collect import batches_of, expert_outputs
from moec.compiler.context import Context
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Node
from moec.compiler.layers import MoeLayer
from moec.compiler.model import Model
from moec.compiler.observed import joined, parted


def refit(model: Model, kept: Mapping[str, Tensor], layers: Sequence[MoeLayer], ridge: float, context: Context) -> dict[str, list[Tensor]]:
    """The down projections of slimmed experts.

    Args:
        kept: by the name of the `experts` node, the neurons that stay: [E, F'].
        ridge: pulls towards the kept columns as they were; a share of the mean square of the neurons.

    Returns:
        By the name of the `experts` node, [D, F'] for every expert, float32 on the CPU.
    """
    text = context.need_text("slim_experts with repair")
    observer = _Refit(model, {layer.name: layer for layer in layers}, kept, ridge)
    with context.progress.counter("refit") as count:
        Interpreter(model.graph, model.weights).run(batches_of(text), lambda *_: None, count, observer)
    return observer.found


@dataclass
class _Refit:
    """The observer that refits a layer before it lets it run."""

    model: Model
    layers: Mapping[str, MoeLayer]
    kept: Mapping[str, Tensor]
    ridge: float
    found: dict[str, list[Tensor]] = field(default_factory=dict)

    def visit(self, node: Node, inputs: Sequence[Sequence[Tensor | None]]) -> Sequence[tuple[Tensor, ...]] | None:
        """See `Observer`."""
        layer = self.layers.get(node.name)
        if layer is None:
            return None
        x, ids, weights = (joined(inputs, i) for i in range(3))  # [N, D], [N, K], [N, K]
        result, self.found[layer.name] = torch.zeros_like(x), []
        _, bias = layer.load_biases(self.model)
        for expert in range(layer.count):
            token, slot = torch.where(ids == expert)
            g = weights[token, slot, None]
            _, h = expert_outputs(self.model, layer, expert, x[token])
            kept = self.kept[layer.name][expert].to(x.device)
            down = self._solve(self.model.load(layer.down, expert).to(x.device), (h * g).double(), kept)
            self.found[layer.name].append(down.cpu())
            result.index_add_(
                0, token, g * torch.nn.functional.linear(h[:, kept], down, None if bias is None else bias.to(x.device)[expert])
            )
        return parted(result, inputs)

    def _solve(self, down: Tensor, h: Tensor, kept: Tensor) -> Tensor:
        """down [D, F] refitted on weighted neurons h [n, F]: [D, F']."""
        some, plain = h[:, kept], down[:, kept].double()
        moment = some.T @ some
        pull = self.ridge * float(moment.diagonal().mean()) + 1e-12
        moment.diagonal().add_(pull)
        target = (down.double() @ h.T) @ some + pull * plain
        solved: Tensor = torch.linalg.solve(moment, target.T)
        return solved.T.to(down.dtype).contiguous()
