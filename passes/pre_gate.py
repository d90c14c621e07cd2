"""The router of a MoE layer, read one MoE layer early (https://arxiv.org/abs/2308.12066): its experts can be fetched during that layer.

    %x0 = rms_norm(%h0)                                        %l1 = linear(%x0, @pre, @pre_bias)      # known before layer 0 runs
    %y0 = experts(%x0, ...)                                    %y0 = experts(%x0, ...)
    %x1 = rms_norm(%h1)                                ->      %x1 = rms_norm(%h1)
    %l1 = linear(%x1, @gate)
    %y1 = experts(%x1, router(%l1), ...)                       %y1 = experts(%x1, router(%l1), ...)

The paper trains the whole model with such routers; here the early router is fitted to the logits of the real one on calibration text:
ridge regression, then (by `steps`) descent of the cross entropy to the real router's distribution. The first MoE layer keeps its own.

`predict` changes nothing in the graph, whose results stay those of the real routers (a graph has no second kind of result): it measures
how many of the real choice the early routers know, and writes them to a file for whoever fetches experts ahead. `replace` routes by them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moec.compiler import ops
from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.ir import Node, Param, TensorType
from moec.compiler.layers import MoeLayer, need_layers
from moec.compiler.model import Model
from moec.compiler.tensor_file import save_tensors
from moec.compiler.weights import constant
from moec.passes.routing.draws import Draws
from moec.passes.routing.insert import namer
from moec.passes.routing.observe import Block, each_block

MODES = ("predict", "replace")
_TEST_EVERY = 8
"""One window in so many is not fitted on: recall is measured there."""


@dataclass(frozen=True)
class PreGate:
    """Routers that read the layer before.

    Args:
        mode: `predict` or `replace`; None changes nothing.
        ridge: weight of the penalty, relative to the mean square of a feature.
        steps: of the descent after the regression; 0 for none.
        save: a safetensors file for the early routers: `<experts node>.weight` [E, D] and `.bias` [E], float32, with the recalls as
            metadata.
    """

    mode: str | None = None
    ridge: float = 1e-3
    steps: int = 200
    save: str | None = None

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise MoecError(f"pre_gate: mode={self.mode!r} is none of {', '.join(MODES)}")
        if self.ridge <= 0 or self.steps < 0:
            raise MoecError(f"pre_gate: ridge={self.ridge} must be above 0 and steps={self.steps} at least 0")
        if self.save is not None and not Path(self.save).resolve().parent.is_dir():
            raise MoecError(f"pre_gate: the folder of save={self.save!r} does not exist")

    def run(self, model: Model, context: Context) -> Model:
        if self.mode is None:
            return model
        text = context.need_text("pre_gate")
        layers = need_layers(model.graph, "pre_gate")
        if len(layers) < 2:
            raise MoecError("pre_gate: the model has one MoE layer; an early router reads the one before")
        for layer in layers[1:]:
            layer.require_gate("pre_gate")
        early: dict[str, tuple[Tensor, Tensor]] = {}
        recalls: dict[str, dict[str, float]] = {}
        before: list[Tensor] = []
        window = torch.arange(len(text.ids)).repeat_interleave(text.ids.shape[1])
        test = window % _TEST_EVERY == _TEST_EVERY - 1 if len(text.ids) >= _TEST_EVERY else window == len(text.ids) - 1

        def fit(block: Block) -> None:
            layer = block.layer
            if before:
                x, logits = before.pop(), real_logits(model, layer, block.x)
                ridge = fit_ridge(x[~test], logits[~test], self.ridge)
                early[layer.name] = descend(x[~test], logits[~test], ridge, steps=self.steps, seed=context.seed)
                gate = layer.require_gate("pre_gate")
                found = {
                    "real_router_on_early_input": (model.load(gate.inputs[1]), torch.zeros(layer.count)),
                    "ridge": ridge,
                    "fitted": early[layer.name],
                }
                recalls[layer.name] = {n: round(recall(model, layer, x[test] @ w.T + b, block.ids[test]), 4) for n, (w, b) in found.items()}
            before.append(block.x)

        each_block(model, text, fit, context.progress, "fit early routers")
        context.note("pre_gate", mode=self.mode, recall=recalls)
        if self.save is not None:
            parts = {f"{name}.{part}": v for name, pair in early.items() for part, v in zip(("weight", "bias"), pair, strict=True)}
            save_tensors(Path(self.save), parts, {"recall": json.dumps(recalls)}, "pre_gate's early routers")
        return self._replaced(model, layers, early) if self.mode == "replace" else model

    def _replaced(self, model: Model, layers: list[MoeLayer], early: Mapping[str, tuple[Tensor, Tensor]]) -> Model:
        """The model that routes by the early routers."""
        for index in range(1, len(layers)):
            layer, source = layers[index], layers[index - 1].experts
            gate, (weight, bias) = layer.require_gate("pre_gate"), early[layer.name]
            name = namer(model.graph, gate.name)("pre_bias")
            param = model.graph.params[gate.inputs[1]]
            params = [replace(param, type=TensorType("f32", tuple(weight.shape))), Param(name, TensorType("f32", (layer.count,)), "f32")]
            node = Node("linear", (source.inputs[0], param.name, name), gate.outputs)
            nodes = [m for n in model.graph.nodes if n is not gate for m in ((node, n) if n is source else (n,))]
            edited = model.with_params(params, {param.name: constant(weight), name: constant(bias)})
            model = Model(edited.graph.with_nodes(nodes), edited.weights)
        return model


def real_logits(model: Model, layer: MoeLayer, x: Tensor) -> Tensor:
    """What a layer's own router says: x [N, D] -> [N, E]."""
    gate = layer.require_gate("pre_gate")
    bias = model.load(gate.inputs[2]) if len(gate.inputs) > 2 and gate.inputs[2] else None
    return ops.linear(x, model.load(gate.inputs[1]), bias)


def fit_ridge(x: Tensor, logits: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight [E, D] and bias [E] of the least squares |x W^T + b - logits|^2 + penalty N mean(x^2) |W|^2, with centred features."""
    wide, wanted = x.double(), logits.double()
    mean, level = wide.mean(0), wanted.mean(0)
    wide, wanted = wide - mean, wanted - level
    moment = wide.T @ wide
    moment.diagonal().add_(penalty * float(moment.diagonal().mean()) + 1e-12)
    weight = torch.linalg.solve(moment, wide.T @ wanted).T
    return weight.float(), (level - weight @ mean).float()


def descend(x: Tensor, logits: Tensor, start: tuple[Tensor, Tensor], *, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """The early router after some steps of Adam on the cross entropy to softmax(logits)."""
    weight, bias = (value.clone().requires_grad_() for value in start)
    spread = x.std(0).clamp(min=1e-6)  # steps are taken over standardised features
    scaled = (weight.detach() * spread).requires_grad_()
    optimiser = torch.optim.Adam([scaled, bias], lr=5e-3)
    draws = Draws(seed)
    truth = logits.softmax(-1)
    for _ in range(steps):
        rows = draws.below(len(x), min(len(x), 4096))
        loss = -(truth[rows] * ops.linear(x[rows] / spread, scaled, bias).log_softmax(-1)).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return (scaled / spread).detach(), bias.detach()


def recall(model: Model, layer: MoeLayer, logits: Tensor, ids: Tensor) -> float:
    """The share of a layer's real choice ids [N, K] that its router would choose by other logits [N, E]."""
    router = layer.router
    bias = model.load(router.inputs[1]) if len(router.inputs) > 1 and router.inputs[1] else None
    guess = ops.router(logits, bias, **router.attrs)[1]
    return float((guess[:, :, None] == ids[:, None]).any(1).float().mean())


PASS = PreGate
