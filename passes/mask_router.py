"""A learned number of experts for each token: OTP of MC# (https://arxiv.org/abs/2510.10962).

    %f = aten.cat(%x, aten.log(%w))                                # what the layer reads and its K routing weights
    %m: f32[B, T, K] = linear(%f, @mask.weight, @mask.bias)        # the mask router: logits of keeping the first 1, 2, ... K
    %c: i64[B, T, 1] = aten.argmax(%m) + 1
    %sw, %si = skip(%w, %i, %c)
    %y = experts(%x, %si, %sw, @up, @down)

Each layer's mask router starts as the rule `ratio` and is fitted to the layer's own result on calibration text, with one layer in memory
at a time; the layers' parts of the target follow from the damage that each does alone. Then, with `joint_steps`, all are trained
together by Gumbel-softmax against the model's next-token distribution plus a price on the expected number of experts. A step of this
that does not lessen the damage is undone. Last, a shift of the logits makes arg max hit the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.ir import Node, Param, TensorType, Value
from moec.compiler.layers import MoeLayer, need_layers
from moec.compiler.model import Model
from moec.compiler.weights import constant
from moec.passes.routing.allocate import allocate, within_limit
from moec.passes.routing.insert import insert_skip, like, namer
from moec.passes.routing.masks import LEAST_WEIGHT, MaskRouter, fit_locally, keep_errors, shift_for
from moec.passes.routing.observe import Block, each_block
from moec.passes.routing.tune import mask_logits, tune

_SHIFT_WINDOWS = 16
"""Windows on which the last shift is measured."""


@dataclass(frozen=True)
class MaskRouterPass:
    """Learn how many experts each token needs.

    Args:
        target: the fraction of all expert activations to drop; None changes nothing.
        joint_steps: steps of the joint training, which holds all weights in float32; 0 for none.
        local_steps: steps of each layer's own fit; 0 keeps the rule.
        windows: windows of calibration text that layers are fitted on, at most.
        normalize: scale the weights that are left, so that their sum stays what it was.
    """

    target: float | None = None
    joint_steps: int = 300
    local_steps: int = 300
    windows: int = 64
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.target is not None and not 0 < self.target < 1:
            raise MoecError(f"mask_router: target={self.target} must be a fraction of the activations, between 0 and 1")
        for name in ("joint_steps", "local_steps", "windows"):
            if int(getattr(self, name)) < (1 if name == "windows" else 0):
                raise MoecError(f"mask_router: {name}={getattr(self, name)} is too small")

    def run(self, model: Model, context: Context) -> Model:
        if self.target is None:
            return model
        context.need_text("mask_router")
        layers = [layer for layer in need_layers(model.graph, "mask_router") if layer.top_k > 1]
        if not layers or self.target > min((layer.top_k - 1) / layer.top_k for layer in layers):
            raise MoecError(f"mask_router: target={self.target} leaves some layer less than one expert a token")
        local = _fit_layers(self, model, layers, self.target, context)
        build: Callable[[float], Model] = local.build
        if self.joint_steps:
            joint = _train_together(self, model, layers, local.at(self.target), context)
            damage = [context.damage(made(self.target), "mask_router").kl_divergence for made in (local.build, joint)]
            context.note("mask_router: joint training", damage_before=damage[0], damage_after=damage[1])
            build = joint if damage[1] < damage[0] else local.build
        result, reached = within_limit(build, self.target, context, "mask_router")
        context.note("mask_router", target=self.target, reached=reached, errors=local.errors)
        return result


@dataclass(frozen=True)
class _Local:
    """What was fitted layer by layer: routers, their logits [N, K] on calibration text, each layer's part of the target."""

    options: MaskRouterPass
    model: Model
    layers: list[MoeLayer]
    routers: dict[str, MaskRouter]
    logits: dict[str, Tensor]
    errors: dict[str, dict[str, float]]
    shape: dict[str, float]

    def rewrite(self, fractions: Mapping[str, float]) -> Model:
        """The model in which these layers drop these fractions."""
        return _rewritten(self.model, self.layers, self.shifted(fractions), normalize=self.options.normalize)

    def shifted(self, fractions: Mapping[str, float]) -> dict[str, MaskRouter]:
        return {n: self.routers[n].shifted(shift_for([self.logits[n]], f)) for n, f in fractions.items() if f > 0}

    def at(self, target: float) -> dict[str, MaskRouter]:
        """The routers that drop `target` of all together."""
        whole = float(self.options.target or 1)
        return self.shifted({n: min(f * target / whole, 1.0) for n, f in self.shape.items()})

    def build(self, target: float) -> Model:
        return _rewritten(self.model, self.layers, self.at(target), normalize=self.options.normalize)


def _fit_layers(options: MaskRouterPass, model: Model, layers: list[MoeLayer], target: float, context: Context) -> _Local:
    text = context.need_text("mask_router")
    local = _Local(options, model, layers, {}, {}, {}, {})

    def fit(block: Block) -> None:
        name = block.layer.name
        if block.layer.top_k > 1:
            errors = keep_errors(block, normalize=options.normalize)
            seed = context.seed + block.layer.index
            local.routers[name], local.errors[name] = fit_locally(block, errors, target, steps=options.local_steps, seed=seed)
            local.logits[name] = local.routers[name].logits(block.x, block.weights)

    each_block(model, text.first(options.windows), fit, context.progress, "fit mask routers")
    local.shape.update(allocate(model, layers, target, local.rewrite, context, "mask_router"))
    return local


def _train_together(
    options: MaskRouterPass, model: Model, layers: list[MoeLayer], start: dict[str, MaskRouter], context: Context
) -> Callable[[float], Model]:
    """Joint training: a function from a target to the model."""
    target, normalize = float(options.target or 0), options.normalize
    routers = tune(model, start, target, context, steps=options.joint_steps, normalize=normalize)
    ids = context.need_text("mask_router").first(_SHIFT_WINDOWS).ids
    rough = shift_for(mask_logits(model, routers, ids, normalize=normalize), target)
    logits = mask_logits(model, routers, ids, normalize=normalize, shift=rough)

    def build(target: float) -> Model:
        shift = shift_for(logits, target)
        return _rewritten(model, layers, {name: router.shifted(shift) for name, router in routers.items()}, normalize=normalize)

    return build


def _rewritten(model: Model, layers: list[MoeLayer], routers: Mapping[str, MaskRouter], *, normalize: bool) -> Model:
    """The model with these mask routers."""
    for layer in layers:
        if layer.name in routers:
            model = insert_mask_router(model, layer, *routers[layer.name].folded(), normalize=normalize)
    return model


def insert_mask_router(model: Model, layer: MoeLayer, weight: Tensor, bias: Tensor, *, normalize: bool) -> Model:
    """A model in which a layer keeps as many experts of a token as its mask router says.

    Args:
        weight: [K, D + K], over what the layer reads and the logarithms of its routing weights.
        bias: [K].
    """
    graph, name = model.graph, namer(model.graph, layer.name)
    x, ids, weights = layer.experts.inputs[:3]
    features = Value(name("mask_features"), like(graph, x, layer.hidden + layer.top_k, "f32"))
    logits = Value(name("mask_logits"), like(graph, x, layer.top_k, "f32"))
    least, logs = (Value(name(suffix), graph.type_of(weights)) for suffix in ("mask_least", "mask_logs"))
    best, counts = (Value(name(suffix), like(graph, ids, 1, "i64")) for suffix in ("mask_best", "counts"))
    params = [
        Param(name("mask_router.weight"), TensorType("f32", tuple(weight.shape)), "f32"),
        Param(name("mask_router.bias"), TensorType("f32", tuple(bias.shape)), "f32"),
    ]
    nodes = [
        Node("aten.clamp.default", (weights,), (least,), {"min": LEAST_WEIGHT}),
        Node("aten.log.default", (least.name,), (logs,)),
        Node("aten.cat.default", (x, logs.name), (features,), {"tensors": 2, "dim": -1}),
        Node("linear", (features.name, params[0].name, params[1].name), (logits,)),
        Node("aten.argmax.default", (logits.name,), (best,), {"dim": -1, "keepdim": True}),
        Node("aten.add.Tensor", (best.name,), (counts,), {"other": 1}),
    ]
    model = model.with_params(params, {params[0].name: constant(weight), params[1].name: constant(bias)})
    return Model(insert_skip(model.graph, layer, {"normalize": normalize}, nodes, counts.name, name), model.weights)


PASS = MaskRouterPass
