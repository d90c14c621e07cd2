"""MoE layers of a graph, and surgery on them: keep, combine and renumber experts; read and replace their routers.

%l: f32[B, T, E] = linear(%x, @gate)                              %l: f32[B, T, E'] = linear(%x, @gate)      @gate: rows kept
%w, %i = router(%l) {top_k=K}                                 ->  %w, %i = router(%l) {top_k=K}
%y = experts(%x, %i, %w, @up, @down)                              %y = experts(%x, %i, %w, @up, @down)       E' of E experts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph, Node, Param, TensorType, Value
from moec.compiler.model import Model
from moec.compiler.packed import is_quantized
from moec.compiler.roles import layer_of
from moec.compiler.weights import Edit, combine, constant, select


@dataclass(frozen=True)
class MoeLayer:
    """An `experts` node with what routes to it.

    `gate` is the linear node that makes the router's logits; None where the logits come from elsewhere. `index` counts the MoE layers
    of the graph from 0; `number` is the layer's number in the model by the names of its weights, or None. `count` is of the experts that
    there are. `table` is a node that leads from what the router chooses to an expert, where that is not the same number: a router can
    choose among more rows than there are experts (see `moec.compiler.regroup`).
    """

    index: int
    experts: Node
    router: Node
    gate: Node | None
    count: int
    top_k: int
    hidden: int
    width: int
    table: Node | None = None

    @property
    def name(self) -> str:
        """The name of the `experts` node, by which statistics know the layer."""
        return self.experts.name

    @property
    def up(self) -> str:
        return self.experts.inputs[3]

    @property
    def down(self) -> str:
        return self.experts.inputs[4]

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of up_bias and down_bias, those that there are."""
        return tuple(name for name in self.experts.inputs[5:7] if name)

    @property
    def factors(self) -> dict[str, tuple[str, str]]:
        """The names of the low-rank factors, left and right, by the name of the projection (`up` or `down`) that they add to."""
        left_right = (*self.experts.inputs[7:11], "", "", "", "")[:4]
        found = {self.up: left_right[:2], self.down: left_right[2:]}
        return {name: (left, right) for name, (left, right) in found.items() if left}

    @property
    def stacks(self) -> tuple[str, ...]:
        """Names of all that has the expert axis first: projections, biases, factors."""
        return (self.up, self.down, *self.biases, *(name for pair in self.factors.values() for name in pair))

    def matrix(self, model: Model, name: str, expert: int) -> Tensor:
        """What one expert's `up` or `down` multiplies with, factors included: float32 [N, K]."""
        weight = model.load(name, expert)
        if (pair := self.factors.get(name)) is None:
            return weight
        left, right = (model.load(factor, expert) for factor in pair)
        return torch.addmm(weight, left, right)

    @property
    def activation(self) -> dict[str, Any]:
        """What `expert_activation` is told."""
        return {name: value for name, value in self.experts.attrs.items() if name in ("activation", "gated", "limit")}

    def load_biases(self, model: Model) -> list[Tensor | None]:
        """The values of up_bias [E, ...] and down_bias [E, D]; None for one that there is not."""
        return [model.load(name) if name else None for name in (*self.experts.inputs[5:7], "", "")[:2]]

    @property
    def gated(self) -> bool:
        return bool(self.experts.attrs.get("gated", True))

    @property
    def number(self) -> int | None:
        return layer_of(self.up)

    @property
    def normalized(self) -> bool:
        """Whether the weights of the chosen experts do not depend on the scores of the others."""
        return bool(self.router.attrs.get("normalize")) or self.router.attrs.get("score") in ("softmax_topk", "sigmoid", "identity")

    def require_gate(self, what: str) -> Node:
        """The linear node of the router.

        Raises:
            MoecError: the router's logits are not the result of one.
        """
        if self.gate is None:
            raise MoecError(f"{what}: the router of %{self.name} is not a linear layer of its own; this layer cannot be rewritten")
        return self.gate


def moe_layers(graph: Graph) -> list[MoeLayer]:
    """The MoE layers that passes can rewrite, in the order of the graph: experts whose ids and weights come from one `router` op.

    Routing that has been rewritten already (`skip` or a table of numbers after `router`) is looked through.
    """
    layers: list[MoeLayer] = []
    for node in graph.nodes:
        router, table = _router(graph, node) if node.op == "experts" else (None, None)
        if router is None or node.inputs[3] not in graph.params:
            continue
        gate = graph.producers.get(router.inputs[0])
        plain = gate is not None and gate.op == "linear" and gate.inputs[1] in graph.params and len(graph.users[gate.inputs[1]]) == 1
        count, hidden, width = (int(d) for d in graph.type_of(node.inputs[4]).shape)
        top_k = int(router.attrs["top_k"])
        layers.append(MoeLayer(len(layers), node, router, gate if plain else None, count, top_k, hidden, width, table))
    return layers


def _router(graph: Graph, experts: Node) -> tuple[Node | None, Node | None]:
    """The router of an `experts` node, and the table between the two."""
    node, table = graph.producers.get(experts.inputs[1]), None
    while node is not None and (node.op == "skip" or _is_table(graph, node)):
        table = table if node.op == "skip" else table or node
        node = graph.producers.get(node.inputs[1])
    return (node if node is not None and node.op == "router" else None), table


def _is_table(graph: Graph, node: Node) -> bool:
    return node.op == "aten.index.Tensor" and node.attrs.get("indices") == 1 and node.inputs[0] in graph.params


def need_layers(graph: Graph, what: str) -> list[MoeLayer]:
    """`moe_layers`, of which there must be one.

    Raises:
        MoecError: there is none, or one cannot be rewritten.
    """
    layers = moe_layers(graph)
    if not layers:
        raise MoecError(f"{what}: the model has no Mixture-of-Experts layer whose router is known")
    return layers


def require_values(model: Model, names: Sequence[str], what: str) -> None:
    """Check that weights are not quantised yet.

    Raises:
        MoecError: one is; the message says where the pass has to stand.
    """
    for name in names:
        if is_quantized(model.graph.params[name]):
            raise MoecError(
                f"{what}: @{name} is already {model.graph.params[name].format}; put {what} before the passes that choose formats"
            )


def keep_experts(model: Model, layer: MoeLayer, keep: Sequence[int], what: str) -> Model:
    """A model in which a layer has only some of its experts, in the order of `keep`, and the router only their rows.

    Where the chosen weights are normalised (`MoeLayer.normalized`) the result is that of the router choosing among the kept experts with
    unchanged scores; where they are shares of a softmax over all experts, the softmax now runs over the kept ones alone.

    Raises:
        MoecError: fewer experts than the router chooses, or unequal groups.
    """
    gate, attrs = layer.require_gate(what), layer.router.attrs
    keep = [int(e) for e in keep]
    check_kept(layer, keep, what)
    require_no_table(layer, what)
    groups = int(attrs.get("groups", 1))
    if groups > 1:
        size = layer.count // groups
        kept = [sum(e // size == g for e in keep) for g in range(groups)]
        if len(set(kept)) > 1 or sorted(keep) != keep:
            raise MoecError(f"{what}: the router of %{layer.name} chooses among {groups} groups, which must keep equal numbers; got {kept}")
    require_values(model, layer.stacks, what)
    names = [*layer.stacks, *(n for n in gate.inputs[1:3] if n), *(n for n in layer.router.inputs[1:2] if n)]
    return _resized(model, layer, gate, len(keep), {name: select(model.weights, name, keep) for name in names})


def combine_experts(model: Model, layer: MoeLayer, merge: Tensor, route: Tensor, what: str) -> Model:
    """A model in which the experts of a layer are weighted sums of the old ones, and the rows of the router too.

    Args:
        merge: [E', E], new expert j = sum over i of merge[j, i] old expert i (weights and biases).
        route: [E', E], the same for the rows of the router's matrix and biases.
    """
    gate = layer.require_gate(what)
    check_kept(layer, range(len(merge)), what)
    require_no_table(layer, what)
    if int(layer.router.attrs.get("groups", 1)) > 1:
        raise MoecError(f"{what}: the router of %{layer.name} chooses among groups of experts, which merging does not keep")
    require_values(model, layer.stacks, what)
    if layer.factors:
        raise MoecError(f"{what}: the experts of %{layer.name} have low-rank factors, which must be added to their projections first")
    edits: dict[str, Edit] = {name: combine(model.weights, name, merge) for name in (layer.up, layer.down, *layer.biases)}
    for name in (*gate.inputs[1:3], *layer.router.inputs[1:2]):
        if name:
            edits[name] = combine(model.weights, name, route)
    return _resized(model, layer, gate, len(merge), edits)


def require_no_table(layer: MoeLayer, what: str) -> None:
    """Check that the router's rows are the layer's experts.

    Raises:
        MoecError: they have been led to fewer experts already.
    """
    if layer.table is not None:
        raise MoecError(
            f"{what}: the router of %{layer.name} chooses among more rows than there are experts "
            "(they were merged, or removed behind a mask); do it in one pass"
        )


def check_kept(layer: MoeLayer, keep: Sequence[int], what: str) -> None:
    """Check which experts of a layer are to stay.

    Raises:
        MoecError: more than there are, or fewer than the router chooses for a token.
    """
    if len(keep) > layer.count or any(not 0 <= e < layer.count for e in keep):
        raise MoecError(f"{what}: %{layer.name} has {layer.count} experts; {len(keep)} cannot be kept")
    if len(keep) < layer.top_k:
        raise MoecError(
            f"{what}: %{layer.name} chooses {layer.top_k} experts a token and would have {len(keep)}: keep more, or lower top_k first"
        )


def _resized(model: Model, layer: MoeLayer, gate: Node, count: int, edits: Mapping[str, Edit]) -> Model:
    """The layer with another number of experts."""
    graph = model.graph
    params = []
    for name in edits:
        param = graph.params[name]
        fmt = param.format if isinstance(param.format, str) else param.format[0]
        params.append(replace(param, type=TensorType(param.type.dtype, (count, *param.type.shape[1:])), format=fmt))
    shape = (*gate.outputs[0].type.shape[:-1], count)
    logits = Value(gate.name, TensorType(gate.outputs[0].type.dtype, shape))
    renamed = {gate.name: replace(gate, outputs=(logits,))}
    renamed |= {skip.name: replace(skip, attrs={**skip.attrs, "experts": count}) for skip in _skips(graph, layer)}
    nodes = [renamed.get(n.name, n) for n in graph.nodes]
    for node in graph.users[gate.name]:
        if node is not layer.router:
            raise MoecError(f"the router's logits %{gate.name} have another use (%{node.name}); this layer cannot be resized")
    return model.edited(graph.with_params(params).with_nodes(nodes), edits)


def _skips(graph: Graph, layer: MoeLayer) -> list[Node]:
    """The `skip` nodes between a layer's router and its experts, which name a skipped slot by the number of experts."""
    found, node = list[Node](), graph.producers.get(layer.experts.inputs[1])
    while node is not None and node is not layer.router:
        found += [node] if node.op == "skip" else []
        node = graph.producers.get(node.inputs[1])
    return found


def replace_node(graph: Graph, old: Node, new: Sequence[Node]) -> Graph:
    """The graph with a node replaced by others, the last of which defines the old one's results."""
    nodes = [m for n in graph.nodes for m in (new if n is old else (n,))]
    return graph.with_nodes(nodes)


def add_constant(model: Model, name: str, value: Tensor, fmt: str = "f32") -> Model:
    """The model with one more parameter, whose value is in memory."""
    dtype = "f32" if value.is_floating_point() else {torch.int64: "i64", torch.int32: "i32", torch.bool: "bool"}[value.dtype]
    param = Param(name, TensorType(dtype, tuple(value.shape)), fmt if dtype == "f32" else dtype)
    return model.with_params([param], {name: constant(value)})
