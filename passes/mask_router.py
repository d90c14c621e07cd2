"""A learned number of experts for each token: OTP of MC# (https://arxiv.org/abs/2510.10962).

    %f = aten.cat(%x, %w)                                          # what the layer reads and its K routing weights
    %m: f32[B, T, K] = linear(%f, @mask.weight, @mask.bias)        # the mask router: logits of keeping the first 1, 2, ... K
    %c: i64[B, T, 1] = aten.argmax(%m) + 1
    %sw, %si = skip(%w, %i, %c)
    %y = experts(%x, %si, %sw, @up, @down)

First each layer's mask router is fitted to the layer's own result on calibration text, with one layer in memory at a time; then, unless
`joint_steps` is 0, all are trained together by Gumbel-softmax against the model's next-token distribution plus a price on the expected
number of experts, which also shares the target out among the layers. Last, one shift of the logits makes arg max hit the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.ir import Node, Param, TensorType, Value
from moec.compiler.layers import MoeLayer, need_layers
from moec.compiler.model import Model
from moec.compiler.weights import constant
from moec.passes.routing.allocate import allocate, within_limit
from moec.passes.routing.insert import insert_skip, like, namer
from moec.passes.routing.masks import MaskRouter, fit_locally, keep_errors, shift_for
from moec.passes.routing.observe import Block, each_block
from moec.passes.routing.tune import mask_logits, tune

_SHIFT_WINDOWS = 16
"""Windows on which the last shift is measured."""


@dataclass(frozen=True)
class MaskRouterPass:
    """Learn how many experts each token needs.

    Args:
        target: the fraction of all expert activations to drop; None changes nothing.
        joint_steps: steps of the joint training; 0 keeps what was fitted layer by layer, with the target shared out by measured damage.
        local_steps: steps of each layer's own fit.
        windows: windows of calibration text that layers are fitted on, at most.
        normalize: scale the weights that are left, so that their sum stays what it was.
    """

    target: float | None = None
    joint_steps: int = 300
    local_steps: int = 300
    windows: int = 64
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.target is not None and not 0 < self.target < 1:
            raise MoecError(f"mask_router: target={self.target} must be a fraction of the activations, between 0 and 1")
        for name in ("joint_steps", "local_steps", "windows"):
            if int(getattr(self, name)) < (0 if name == "joint_steps" else 1):
                raise MoecError(f"mask_router: {name}={getattr(self, name)} is too small")

    def run(self, model: Model, context: Context) -> Model:
        if self.target is None:
            return model
        text = context.need_text("mask_router")
        layers = [layer for layer in need_layers(model.graph, "mask_router") if layer.top_k > 1]
        if not layers or self.target > min((layer.top_k - 1) / layer.top_k for layer in layers):
            raise MoecError(f"mask_router: target={self.target} leaves some layer less than one expert a token")
        routers: dict[str, MaskRouter] = {}
        logits: dict[str, Tensor] = {}

        def fit(block: Block) -> None:
            if block.layer.top_k > 1:
                errors = keep_errors(block, normalize=self.normalize)
                found = fit_locally(block, errors, float(self.target or 0), steps=self.local_steps, seed=context.seed + block.layer.index)
                routers[block.layer.name] = found
                logits[block.layer.name] = found.logits(block.x, block.weights)

        each_block(model, text.first(self.windows), fit, context.progress, "fit mask routers")
        if self.joint_steps:
            routers = tune(model, routers, self.target, context, steps=self.joint_steps, normalize=self.normalize)
            ids = text.first(_SHIFT_WINDOWS).ids
            rough = shift_for(mask_logits(model, routers, ids, normalize=self.normalize), self.target)
            found = dict(zip(routers, mask_logits(model, routers, ids, normalize=self.normalize, shift=rough), strict=True))

            def build(target: float) -> Model:
                shift = shift_for(list(found.values()), target)
                return self._rewritten(model, layers, routers, dict.fromkeys(routers, shift))
        else:

            def rewrite(fractions: Mapping[str, float]) -> Model:
                shifts = {name: shift_for([logits[name]], f) for name, f in fractions.items() if f > 0}
                return self._rewritten(model, layers, routers, shifts)

            shape = allocate(model, layers, self.target, rewrite, context, "mask_router")

            def build(target: float) -> Model:
                return rewrite({name: f * target / float(self.target or 1) for name, f in shape.items()})

        result, reached = within_limit(build, self.target, context, "mask_router")
        context.note("mask_router", target=self.target, reached=reached, joint_steps=self.joint_steps)
        return result

    def _rewritten(self, model: Model, layers: list[MoeLayer], routers: Mapping[str, MaskRouter], shifts: Mapping[str, float]) -> Model:
        """The model with the mask routers of the layers in `shifts`, whose logits are shifted so."""
        for layer in layers:
            if layer.name in shifts:
                router = routers[layer.name]
                weight, bias = router.folded()
                model = insert_mask_router(
                    model, layer, weight, bias + shifts[layer.name] * torch.arange(len(bias)), normalize=self.normalize
                )
        return model


def insert_mask_router(model: Model, layer: MoeLayer, weight: Tensor, bias: Tensor, *, normalize: bool) -> Model:
    """A model in which a layer keeps as many experts of a token as its mask router says.

    Args:
        weight: [K, D + K], over what the layer reads and its routing weights.
        bias: [K].
    """
    graph, name = model.graph, namer(model.graph, layer.name)
    x, ids, weights = layer.experts.inputs[:3]
    features = Value(name("mask_features"), like(graph, x, layer.hidden + layer.top_k, "f32"))
    logits = Value(name("mask_logits"), like(graph, x, layer.top_k, "f32"))
    best, counts = (Value(name(suffix), like(graph, ids, 1, "i64")) for suffix in ("mask_best", "counts"))
    params = [
        Param(name("mask_router.weight"), TensorType("f32", tuple(weight.shape)), "f32"),
        Param(name("mask_router.bias"), TensorType("f32", tuple(bias.shape)), "f32"),
    ]
    nodes = [
        Node("aten.cat.default", (x, weights), (features,), {"tensors": 2, "dim": -1}),
        Node("linear", (features.name, params[0].name, params[1].name), (logits,)),
        Node("aten.argmax.default", (logits.name,), (best,), {"dim": -1, "keepdim": True}),
        Node("aten.add.Tensor", (best.name,), (counts,), {"other": 1}),
    ]
    model = model.with_params(params, {params[0].name: constant(weight), params[1].name: constant(bias)})
    return Model(insert_skip(model.graph, layer, {"normalize": normalize}, nodes, counts.name, name), model.weights)


PASS = MaskRouterPass
