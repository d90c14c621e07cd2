"""Routers that choose among other rows than there are experts: behind a mask, by a table, or through a matrix of scores.

A table leads from what the router chooses to an expert. Rows that lead nowhere have a bias of minus infinity, so that the scores of the
others stay what they were; rows that lead to the same expert are that expert's together.

    %w, %i = router(%l) {top_k=K}              %w, %i0 = router(%l, @experts.mask) {top_k=K}
    %y = experts(%x, %i, %w, @up, @down)   ->  %i = aten.index.Tensor(@experts.table, %i0) {indices=1}
                                               %y = experts(%x, %i, %w, @up, @down)                          E' of E experts

A matrix W [E', E] makes the scores of E' new experts of those of the E old ones (https://arxiv.org/abs/2407.00945):

    %l = linear(%x, @gate)                     %l = linear(%x, @gate)
    %w, %i = router(%l) {score="softmax"}  ->  %s = aten._softmax.default(%l) {dim=-1, half_to_float=false}
                                               %m = linear(%s, @experts.map)
                                               %w, %i = router(%m) {score="identity"}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.factors import folded
from moec.compiler.ir import Graph, Node, Param, TensorType, Value
from moec.compiler.layers import MoeLayer, add_constant, check_kept, require_no_table, require_values
from moec.compiler.model import Model
from moec.compiler.weights import Edit, combine, constant, select


def mask_experts(model: Model, layer: MoeLayer, keep: Sequence[int], what: str) -> Model:
    """A model in which a layer has only some of its experts, in the order of `keep`, and every score is what it was.

    The router's matrix keeps all its rows: the weights of a token's experts are the same shares of a softmax over all rows as before.

    Raises:
        MoecError: fewer experts than the router chooses, or a choice of groups could find too few.
    """
    keep = [int(e) for e in keep]
    check_kept(layer, keep, what)
    require_no_table(layer, what)
    require_values(model, layer.stacks, what)
    rows = router_rows(model.graph, layer)
    groups, top_groups = (int(layer.router.attrs.get(name, 1)) for name in ("groups", "top_groups"))
    left = sorted(sum(e * groups // rows == g for e in keep) for g in range(groups))
    if sum(left[:top_groups]) < layer.top_k:
        raise MoecError(
            f"{what}: the router of %{layer.name} chooses {layer.top_k} experts from {top_groups} of {groups} groups, which would have "
            f"{left} experts: keep more, or as many of each"
        )
    table = torch.full((rows,), -1, dtype=torch.int64)
    table[keep] = torch.arange(len(keep))
    return tie_experts(model, layer, table, {name: select(model.weights, name, keep) for name in layer.stacks})


def tie_experts(model: Model, layer: MoeLayer, table: Tensor, edits: Mapping[str, Edit]) -> Model:
    """A model in which the rows of a layer's router lead to other experts.

    Args:
        table: int64 [E], the new expert of each row, or -1 for a row that cannot be chosen.
        edits: the values of the new experts, by the names of the stacks (projections and biases).
    """
    graph, count = model.graph, int(table.max()) + 1
    params = []
    for name in edits:
        param = graph.params[name]
        fmt = param.format if isinstance(param.format, str) else param.format[0]
        params.append(replace(param, type=TensorType(param.type.dtype, (count, *param.type.shape[1:])), format=fmt))
    model = model.edited(graph.with_params(params), edits)
    router, renamed = layer.router, graph.fresh(f"{layer.router.outputs[1].name}_rows")
    if bool((table < 0).any()):
        model, router = _masked(model, layer, table)
    ids = router.outputs[1]
    router = replace(router, outputs=(router.outputs[0], Value(renamed, ids.type)))
    name = model.graph.fresh(f"{layer.name}.table")
    # The last entry is what a skipped slot leads to: an id that no expert has.
    model = add_constant(model, name, torch.cat([torch.where(table < 0, count, table), torch.tensor([count])]))
    lookup = Node("aten.index.Tensor", (name, renamed), (ids,), {"indices": 1})
    nodes = [m for n in model.graph.nodes for m in ((router, lookup) if n is layer.router else (n,))]
    return Model(model.graph.with_nodes(nodes), model.weights)


def _masked(model: Model, layer: MoeLayer, table: Tensor) -> tuple[Model, Node]:
    """The router with a bias of minus infinity on the rows that lead nowhere."""
    old = layer.router.inputs[1] if len(layer.router.inputs) > 1 else ""
    bias = torch.zeros(len(table)) if not old else model.load(old).clone()
    bias[table < 0] = -torch.inf
    name = old or model.graph.fresh(f"{layer.name}.mask")
    model = (
        model.with_params([replace(model.graph.params[old], format="f32")], {old: constant(bias)})
        if old
        else add_constant(model, name, bias)
    )
    return model, replace(layer.router, inputs=(layer.router.inputs[0], name))


def map_experts(model: Model, layer: MoeLayer, merge: Tensor, route: Tensor, what: str) -> Model:
    """A model whose experts are weighted sums of the old ones, chosen by weighted sums of their scores.

    Args:
        merge: [E', E], new expert j = sum over i of merge[j, i] old expert i (weights and biases).
        route: [E', E], the same for the scores: of the softmax over all old experts (also where only the chosen ones took part in it,
            since their weights are normalised then), or of the sigmoids.

    Raises:
        MoecError: the router chooses among groups, or the layer was changed in this manner before.
    """
    check_kept(layer, range(len(merge)), what)
    require_no_table(layer, what)
    require_values(model, layer.stacks, what)
    model = folded(model, [layer])
    attrs = dict(layer.router.attrs)
    if int(attrs.get("groups", 1)) > 1:
        raise MoecError(f"{what}: the router of %{layer.name} chooses among groups of experts, which merging does not keep")
    score = str(attrs.get("score", "softmax"))
    graph, count = model.graph, len(merge)
    edits: dict[str, Edit] = {name: combine(model.weights, name, merge) for name in (layer.up, layer.down, *layer.biases)}
    logits = graph.type_of(layer.router.inputs[0])
    params, nodes, scores = [_resized(graph, name, count) for name in edits], list[Node](), layer.router.inputs[0]
    if score != "identity":
        op, extra = ("aten.sigmoid.default", {}) if score == "sigmoid" else ("aten._softmax.default", {"dim": -1, "half_to_float": False})
        scores = graph.fresh(f"{layer.name}.scores")
        nodes.append(Node(op, (layer.router.inputs[0],), (Value(scores, logits),), extra))
    name, mapped = graph.fresh(f"{layer.name}.map"), graph.fresh(f"{layer.name}.mapped")
    nodes.append(Node("linear", (scores, name), (Value(mapped, TensorType(logits.dtype, (*logits.shape[:-1], count))),)))
    inputs: tuple[str, ...] = (mapped,)
    if len(layer.router.inputs) > 1 and (bias := layer.router.inputs[1]):
        edits[bias] = constant(route.float() @ model.load(bias))
        params.append(_resized(graph, bias, count))
        inputs = (mapped, bias)
    attrs |= {"score": "identity", "normalize": bool(attrs.get("normalize")) or score == "softmax_topk"}
    nodes.append(replace(layer.router, inputs=inputs, attrs=attrs))
    model = add_constant(model.edited(graph.with_params(params), edits), name, route.detach().float())
    return Model(model.graph.with_nodes(m for n in graph.nodes for m in (nodes if n is layer.router else (n,))), model.weights)


def router_rows(graph: Graph, layer: MoeLayer) -> int:
    """How many rows a layer's router chooses among."""
    return int(graph.type_of(layer.router.inputs[0]).shape[-1])


def with_top_k(graph: Graph, layer: MoeLayer, top_k: int, what: str) -> Graph:
    """The graph with another number of experts a token in one layer.

    Raises:
        MoecError: something stands between the router and the experts that counts on the old number.
    """
    changed = [layer.router] + ([] if layer.table is None else [layer.table])
    known = {layer.name, *(node.name for node in changed)}
    between = {node.name for output in layer.router.outputs for node in graph.users[output.name]} - known
    if between:
        raise MoecError(f"{what}: top_k of %{layer.name} cannot change behind %{', %'.join(sorted(between))}; put {what} before that pass")
    resized = {
        n.name: replace(
            n,
            attrs={**n.attrs, "top_k": top_k} if n is layer.router else n.attrs,
            outputs=tuple(Value(o.name, TensorType(o.type.dtype, (*o.type.shape[:-1], top_k))) for o in n.outputs),
        )
        for n in changed
    }
    return graph.with_nodes(resized.get(n.name, n) for n in graph.nodes)


def _resized(graph: Graph, name: str, count: int) -> Param:
    param = graph.params[name]
    fmt = param.format if isinstance(param.format, str) else param.format[0]
    return replace(param, type=TensorType(param.type.dtype, (count, *param.type.shape[1:])), format=fmt)
