"""A small model of two MoE layers for passes that rewrite routing, and how its tokens are routed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Graph, Node
from moec.compiler.model import Model
from moec.compiler.text import parse_graph
from tests import graphs


def two_layers(top_k: int = 3, *, normalize: bool = True) -> Graph:
    """The layer of `graphs.MOE` twice, with 3 of 6 experts a token unless said otherwise."""
    lines = graphs.MOE.replace("top_k=2", f"top_k={top_k}").replace("normalize=true", f"normalize={str(normalize).lower()}")
    lines = lines.replace("%w: f32[B, T, 2], %i: i64[B, T, 2]", f"%w: f32[B, T, {top_k}], %i: i64[B, T, {top_k}]")
    params = re.findall(r"  param @layers\.0.*\n", lines)
    body = lines[lines.index("  %n: ") : lines.index("  %n2: ")]
    second = re.sub(r"%(\w+)", r"%\1_b", body).replace("layers.0", "layers.1")
    second = re.sub(r"%h_b\b", "%h2", second)
    lines = lines.replace(params[-1], params[-1] + "".join(params).replace("layers.0", "layers.1"))
    return parse_graph(lines.replace(body, body + second).replace("rms_norm(%h2, @norm", "rms_norm(%h2_b, @norm"))


def model(top_k: int = 3, *, normalize: bool = True, seed: int = 0) -> Model:
    """`two_layers` with random weights."""
    graph = two_layers(top_k, normalize=normalize)
    return Model(graph, graphs.random_weights(graph, seed))


@dataclass
class Routing:
    """Sees what each `experts` node is given."""

    ids: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    x: dict[str, Tensor] = field(default_factory=dict)

    def visit(self, node: Node, inputs: Sequence[Sequence[Tensor | None]]) -> None:
        """See `Observer`."""
        if node.op == "experts":
            x, ids, weights = inputs[0][:3]
            assert x is not None and ids is not None and weights is not None
            self.x[node.name], self.ids[node.name], self.weights[node.name] = x, ids, weights


def routing(subject: Model, ids: Tensor) -> Routing:
    """How a model routes windows [W, T]."""
    found = Routing()
    inputs = {"ids": ids, "positions": torch.arange(ids.shape[1]).expand(len(ids), -1)}
    Interpreter(subject.graph, subject.weights).run([inputs], lambda *_: None, None, found)
    return found


def dropped(subject: Model, ids: Tensor) -> dict[str, float]:
    """The fraction of the activations that a model skips, by layer."""
    counts = {n: int(p.type.shape[0]) for n, p in subject.graph.params.items()}
    experts = {n.name: counts[n.inputs[3]] for n in subject.graph.nodes if n.op == "experts"}
    return {name: float(((i < 0) | (i >= experts[name])).float().mean()) for name, i in routing(subject, ids).ids.items()}
