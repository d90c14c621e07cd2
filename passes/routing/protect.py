"""Tokens that keep all their experts: those whose residual stream has a large norm.

%sw, %si = skip(%w, %i) {ratio=0.2}               # how many experts the rule would keep
%n = sum(aten.lt(%si, E), -1)
%t = sum(aten.abs(%h), -1)                        # ||t||_1 of what the norm before the router reads
%c = aten.where(%t >= threshold, K, %n)
%w', %i' = skip(%w, %i, %c)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moec.compiler.calibration.collect import batches_of
from moec.compiler.context import Context
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Attr, Graph, Node, Value
from moec.compiler.layers import MoeLayer
from moec.compiler.model import Model
from moec.passes.routing.insert import Namer, insert_skip, like, namer, skip_node


def residual_of(graph: Graph, layer: MoeLayer) -> str:
    """The residual stream before a layer: what the norm reads whose result the experts read (else what they read)."""
    x = layer.experts.inputs[0]
    producer = graph.producers.get(x)
    return producer.inputs[0] if producer is not None and producer.op in ("rms_norm", "layer_norm") else x


def _norm(graph: Graph, layer: MoeLayer, name: Namer) -> list[Node]:
    """Nodes for ||t||_1 [..., 1]."""
    residual = residual_of(graph, layer)
    size = Value(name("abs"), graph.type_of(residual))
    norm = Value(name("norm"), like(graph, residual, 1, "f32"))
    attrs: dict[str, Attr] = {"dim": (-1,), "keepdim": True}
    return [Node("aten.abs.default", (residual,), (size,)), Node("aten.sum.dim_IntList", (size.name,), (norm,), attrs)]


def norm_thresholds(model: Model, layers: Sequence[MoeLayer], fraction: float, context: Context) -> dict[str, float]:
    """By layer, the norm that this fraction of the tokens of calibration text exceeds."""
    text, graph, wanted, extra = context.need_text("skip_experts with protect"), model.graph, list[str](), list[Node]()
    for layer in layers:
        extra += _norm(graph, layer, namer(graph, layer.name))
        wanted.append(extra[-1].name)
    norms: list[list[Tensor]] = [[] for _ in layers]

    def consume(_: int, outputs: tuple[Tensor, ...]) -> None:
        for found, output in zip(norms, outputs, strict=True):
            found.append(output.flatten())

    Interpreter(graph.with_nodes([*graph.nodes, *extra], wanted), model.weights).run(batches_of(text), consume)
    result = {}
    for layer, found in zip(layers, norms, strict=True):
        ordered = torch.cat(found).sort(descending=True).values
        result[layer.name] = float(ordered[round(fraction * (len(ordered) - 1))])
    return result


def insert_protected_skip(graph: Graph, layer: MoeLayer, attrs: Mapping[str, Attr], threshold: float, *, normalize: bool) -> Graph:
    """The graph in which a layer skips by a rule, but for tokens whose norm reaches the threshold."""
    name = namer(graph, layer.name)
    rule = skip_node(graph, layer, attrs, "", name)
    ids, kind = rule.outputs[1].name, layer.experts.inputs[1]
    norm = _norm(graph, layer, name)
    runs = Value(name("runs"), like(graph, kind, layer.top_k, "bool"))
    many = Value(name("many"), like(graph, kind, 1, "i64"))
    large = Value(name("large"), like(graph, kind, 1, "bool"))
    counts = Value(name("counts"), like(graph, kind, 1, "i64"))
    nodes = [
        rule,
        Node("aten.lt.Scalar", (ids,), (runs,), {"other": layer.count}),
        Node("aten.sum.dim_IntList", (runs.name,), (many,), {"dim": (-1,), "keepdim": True}),
        *norm,
        Node("aten.ge.Scalar", (norm[-1].name,), (large,), {"other": threshold}),
        Node("aten.where.self", (large.name, many.name), (counts,), {"self": layer.top_k}),
    ]
    return insert_skip(graph, layer, {"normalize": normalize}, nodes, counts.name, name)
