"""Another number of experts a token, the same for all tokens.

%w: f32[B, T, 4], %i: i64[B, T, 4] = router(%l) {top_k=4}     ->     %w: f32[B, T, 2], %i: i64[B, T, 2] = router(%l) {top_k=2}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.ir import Attr, Graph, Node, TensorType
from moec.compiler.layers import MoeLayer, need_layers
from moec.compiler.model import Model
from moec.passes.routing.insert import per_layer

NORMALIZE = ("keep", "renormalize", "rescale")


@dataclass(frozen=True)
class TopK:
    """Choose K experts a token.

    Args:
        k: K, or a list with one K for each MoE layer; None leaves a layer as it is.
        normalize: what the weights of the experts that are left become. `keep`: what the router's own rule says (shares of a softmax over
            all experts stay as they are; a router that normalises makes the new K sum to 1). `renormalize`: they sum to 1, times the
            router's scale. `rescale`: they are multiplied by one factor a layer, so that their mean sum on calibration text is what it was
            with the old K; needs text where the router does not normalise already.
    """

    k: int | Sequence[int | None] | None = None
    normalize: str = "keep"

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZE:
            raise MoecError(f"top_k: normalize={self.normalize!r} is none of {', '.join(NORMALIZE)}")
        for k in self.k if isinstance(self.k, (list, tuple)) else (self.k,):
            if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
                raise MoecError(f"top_k: k={k!r} must be a whole number of at least 1")

    def run(self, model: Model, context: Context) -> Model:
        if self.k is None:
            return model
        layers = need_layers(model.graph, "top_k")
        chosen = per_layer(self.k, layers, "top_k: k")
        changes: list[tuple[MoeLayer, int, dict[str, Attr]]] = []
        for layer, k in zip(layers, chosen, strict=True):
            if isinstance(k, int) and k != layer.top_k:
                _check(model.graph, layer, k)
                changes.append((layer, k, self._weights(model, layer, k, context)))
        if not changes:
            return model
        graph = model.graph
        for layer, k, attrs in changes:
            graph = _with_top_k(graph, layer, k, attrs)
        context.note("top_k", k={layer.name: k for layer, k, _ in changes}, normalize=self.normalize)
        return Model(graph, model.weights)

    def _weights(self, model: Model, layer: MoeLayer, k: int, context: Context) -> dict[str, Attr]:
        """Attributes of the router that decide what the weights are."""
        fixed = bool(layer.router.attrs.get("normalize")) or layer.router.attrs.get("score") == "softmax_topk"
        if self.normalize == "keep" or fixed:
            return {}
        if self.normalize == "renormalize":
            return {"normalize": True}
        if k > layer.top_k:
            raise MoecError(f"top_k: normalize='rescale' needs a k of at most {layer.top_k} in %{layer.name}, got {k}")
        trace = context.statistics(model, "top_k with normalize='rescale'").layer(layer.name).weights.float()
        factor = float(trace.sum() / trace[:, :k].sum())
        return {"scale": float(layer.router.attrs.get("scale", 1.0)) * factor}


def _check(graph: Graph, layer: MoeLayer, k: int) -> None:
    """That a layer can choose k experts."""
    if k > layer.count:
        raise MoecError(f"top_k: %{layer.name} has {layer.count} experts: k={k} is more than there are")
    groups = int(layer.router.attrs.get("groups", 1))
    reach = layer.count // groups * int(layer.router.attrs.get("top_groups", 1)) if groups > 1 else layer.count
    if k > reach:
        raise MoecError(f"top_k: the router of %{layer.name} chooses within groups of {reach} experts in all: k={k} is more than those")
    for name in [output.name for node in _chain(graph, layer) for output in node.outputs]:
        others = [user for user in graph.users.get(name, ()) if user.op not in ("skip", "experts")]
        if others:
            raise MoecError(f"top_k: %{others[0].name} reads the router of %{layer.name}: put top_k before the passes that rewrite routing")


def _chain(graph: Graph, layer: MoeLayer) -> list[Node]:
    """The router and what skips some of its choice."""
    chain, node = [layer.router], graph.producers[layer.experts.inputs[1]]
    while node is not layer.router:
        chain.append(node)
        node = graph.producers[node.inputs[1]]
    return chain


def _with_top_k(graph: Graph, layer: MoeLayer, k: int, attrs: dict[str, Attr]) -> Graph:
    chain = _chain(graph, layer)

    def resized(node: Node) -> Node:
        outputs = tuple(replace(o, type=TensorType(o.type.dtype, (*o.type.shape[:-1], k))) for o in node.outputs)
        more: dict[str, Any] = {"top_k": k, **attrs} if node is layer.router else {}
        return replace(node, outputs=outputs, attrs={**node.attrs, **more})

    return graph.with_nodes([resized(node) if any(node is c for c in chain) else node for node in graph.nodes])


PASS = TopK
