"""Routing in ONNX: `router`, `skip`, and what `experts` is fed.

Where the ids and weights of an `experts` node come straight from a router, QMoE and MoE choose the experts themselves from the router's
scores; the router's own results are then computed only if something else reads them. Everything else is fed the final weights of all
experts, scattered to [tokens, E] with zeros for experts that were not chosen. An id that is no expert's is a skipped slot: its weight
counts as zero, whatever it says. QMoE and the unrolled experts do not compute what has weight zero. Measured with ONNX Runtime 1.31.1,
one token, one thread of a Sapphire Rapids machine, 16 experts of 2 x 192 x 384 and 384 x 192 in 4 bits, int8 activations: QMoE with 4,
3, 2, 1 and no weight above zero 45, 29, 20, 11 and 4 us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.compiler.backends.onnx.placement import Experts, fixed
from moec.compiler.ir import Graph, Node

if TYPE_CHECKING:
    from moec.compiler.backends.onnx.lower import Lowering


@dataclass(frozen=True)
class Routing:
    """What QMoE or MoE is fed.

    Args:
        scores: [tokens, E], of which the best K are chosen.
        weights: [tokens, E] to mix with; "": the softmax of the chosen scores.
        normalize: the chosen weights are divided by their sum; for MoE, whether its softmax is that of the chosen scores only.
        factor: what the result is multiplied with, "" for nothing.
        top_k: K.
    """

    scores: str
    weights: str
    normalize: bool
    factor: str
    top_k: int


def direct(graph: Graph, node: Node, plan: Experts) -> Node | None:
    """The router whose choice an `experts` node that runs as planned can leave to its operator; None if it cannot."""
    router = graph.producers.get(node.inputs[1])
    if plan.rows or router is None or router.op != "router" or not _results(node, router):
        return None
    if graph.type_of(router.inputs[0]).shape[-1] != fixed(graph.params[node.inputs[3]].type.shape)[0]:
        return None
    score, groups = router.attrs.get("score", "softmax"), router.attrs.get("groups", 1)
    biased = router.has(1)
    possible = {
        "qmoe": score != "softmax_topk" or not biased,
        # MoE's shares of a softmax over all experts are not what the router's are (ONNX Runtime 1.31.1): it gets normalised weights only.
        "moe": not biased and (score == "softmax_topk" or (score == "softmax" and groups == 1 and bool(router.attrs.get("normalize")))),
    }
    return router if possible.get(plan.mode) else None


def _results(node: Node, source: Node) -> bool:
    """Whether the weights and ids of an `experts` node are the results of one node."""
    return (node.inputs[2], node.inputs[1]) == tuple(o.name for o in source.outputs)


def only_direct(low: Lowering, router: Node) -> bool:
    """Whether all that read a router's results choose for themselves, so that it need not be computed."""
    plans, graph = low.weights.placement.experts, low.graph
    users = [user for output in router.outputs for user in graph.users.get(output.name, ())]
    read = {o.name for o in router.outputs} & set(graph.outputs)
    return not read and all(u.op == "experts" and direct(graph, u, plans[u.name]) is router for u in users)


def direct_routing(low: Lowering, router: Node) -> Routing:
    """The routing of `experts` nodes that choose for themselves."""
    e, a = low.e, router.attrs
    score, top_k = a.get("score", "softmax"), int(a["top_k"])
    factor = low.number(float(scale), "f32") if (scale := a.get("scale", 1.0)) != 1.0 else ""
    plain = a.get("groups", 1) == 1
    if score == "softmax_topk" or (score == "softmax" and plain and not router.has(1) and a.get("normalize")):
        logits = low.value(router.inputs[0]) if plain else _best_groups(low, router, low.value(router.inputs[0]))
        of_chosen = score == "softmax_topk" or bool(a.get("normalize"))
        return Routing(_rows(low, router, logits), "", of_chosen, factor, top_k)
    scores, choice = _scores(low, router)
    weights, normalize = _rows(low, router, scores), bool(a.get("normalize"))
    if factor and not normalize:
        weights, factor = e.op("Mul", weights, factor), ""
    return Routing(_rows(low, router, choice), weights, normalize, factor, top_k)


def _rows(low: Lowering, router: Node, scores: str) -> str:
    """[..., E] as [tokens, E]."""
    shape = low.shape(router.inputs[0])
    experts = shape[-1]
    assert isinstance(experts, int)
    return scores if len(shape) == 2 else low.e.op("Reshape", scores, low.e.const([-1, experts]))


def scattered(low: Lowering, node: Node) -> str:
    """The weights of all experts: [tokens, E], zero for those not chosen. Weights of an expert chosen twice add up."""
    e, count = low.e, fixed(low.graph.params[node.inputs[3]].type.shape)[0]
    ids, weights = choices(low, node)
    zeros = e.op("Expand", low.number(0.0, "f32"), e.op("Concat", e.op("Shape", weights, end=1), e.const([count]), axis=0))
    return e.op("ScatterElements", zeros, ids, weights, axis=1, reduction="add")


def choices(low: Lowering, node: Node) -> tuple[str, str]:
    """The experts of each token and their weights: [tokens, K] each. Skipped slots name some expert, with weight zero."""
    e, count = low.e, fixed(low.graph.params[node.inputs[3]].type.shape)[0]
    top_k = low.shape(node.inputs[1])[-1]
    assert isinstance(top_k, int)
    ids, weights = (low.cast(node.inputs[1], "i64"), low.value(node.inputs[2]))
    ids, weights = (e.op("Reshape", v, e.const([-1, top_k])) for v in (ids, weights))
    source = low.graph.producers.get(node.inputs[1])
    if source is not None and source.op == "skip" and source.attrs["experts"] == count and _results(node, source):
        ids = e.op("Min", ids, low.number(count - 1, "i64"))  # skipped slots have weight zero
    elif source is None or source.op != "router" or low.shape(source.inputs[0])[-1] != count:
        valid = e.op("And", e.op("GreaterOrEqual", ids, low.number(0, "i64")), e.op("Less", ids, low.number(count, "i64")))
        ids, weights = e.op("Where", valid, ids, low.number(0, "i64")), e.op("Where", valid, weights, low.number(0.0, "f32"))
    return ids, weights


def lower_router(low: Lowering, node: Node) -> Sequence[str]:
    """The `router` op."""
    e, a = low.e, node.attrs
    if only_direct(low, node):
        return "", ""
    scores, choice = _scores(low, node)
    best, ids = e.multi("TopK", [choice, e.const([a["top_k"]])], 2, axis=-1, stem=node.name)
    weights = best if choice == scores else e.op("GatherElements", scores, ids, axis=-1)
    if a.get("score") == "softmax_topk":
        weights = e.op("Softmax", weights, axis=-1)
    if a.get("normalize"):
        weights = e.op("Div", weights, e.op("ReduceSum", weights, e.const([-1]), keepdims=1))
    if (scale := a.get("scale", 1.0)) != 1.0:
        weights = e.op("Mul", weights, low.number(float(scale), "f32"))
    return weights, ids


def lower_skip(low: Lowering, node: Node) -> Sequence[str]:
    """The `skip` op."""
    e, a = low.e, node.attrs
    weights, ids = low.value(node.inputs[0]), low.value(node.inputs[1])
    top_k = low.shape(node.inputs[0])[-1]
    assert isinstance(top_k, int)
    zero, total = low.number(0.0, "f32"), _sum(low, weights)
    rules = []
    if ratio := float(a.get("ratio", 0.0)):
        best = e.op("Slice", weights, e.const([0]), e.const([1]), e.const([-1]))
        rules.append(e.op("Less", weights, e.op("Mul", best, low.number(ratio, "f32"))))
    if (top_p := float(a.get("top_p", 1.0))) < 1:
        before = e.op("CumSum", weights, e.const(np.int64(-1)), exclusive=1)
        rules.append(e.op("GreaterOrEqual", before, e.op("Mul", total, low.number(top_p, "f32"))))
    if len(node.inputs) > 2 and node.inputs[2]:
        rules.append(e.op("GreaterOrEqual", e.const(np.arange(top_k)), low.cast(node.inputs[2], "i64")))
    if not rules:
        return weights, ids
    found = rules[0]
    for rule in rules[1:]:
        found = e.op("Or", found, rule)
    skipped = e.op("And", found, e.const(np.arange(top_k) > 0))
    kept = e.op("Where", skipped, zero, weights)
    ids = e.op("Where", skipped, low.number(int(a["experts"]), "i64"), ids)
    if a.get("normalize"):
        left = _sum(low, kept)
        kept = e.op("Mul", kept, e.op("Where", e.op("Equal", left, total), low.number(1.0, "f32"), e.op("Div", total, left)))
    return kept, ids


def _sum(low: Lowering, x: str) -> str:
    """The sum over the last axis [..., 1], added in order."""
    e = low.e
    return e.op("Slice", e.op("CumSum", x, e.const(np.int64(-1))), e.const([-1]), e.const([np.iinfo(np.int64).max]), e.const([-1]))


def _scores(low: Lowering, node: Node) -> tuple[str, str]:
    """Of a router, the scores of all experts and what the choice goes by."""
    e, logits = low.e, low.value(node.inputs[0])
    match node.attrs.get("score", "softmax"):
        case "softmax":
            scores = e.op("Softmax", logits, axis=-1)
        case "sigmoid":
            scores = e.op("Sigmoid", logits)
        case _:
            scores = logits
    choice = e.op("Add", scores, low.value(node.inputs[1])) if node.has(1) else scores
    return scores, choice if node.attrs.get("groups", 1) == 1 else _best_groups(low, node, choice)


def _best_groups(low: Lowering, node: Node, choice: str) -> str:
    """The choice with minus infinity for experts outside of the best groups."""
    e, a = low.e, node.attrs
    *lead, experts = low.shape(node.inputs[0])
    assert isinstance(experts, int)
    groups = a["groups"]
    grouped = low.shapes.reshape(choice, (*lead, experts), (*lead, groups, experts // groups))
    if a.get("group_score", "max") == "max":
        merit = e.op("ReduceMax", grouped, e.const([-1]), keepdims=0)
    else:
        merit = e.op("ReduceSum", e.multi("TopK", [grouped, e.const([2])], 2, axis=-1)[0], e.const([-1]), keepdims=0)
    _, best = e.multi("TopK", [merit, e.const([a["top_groups"]])], 2, axis=-1)
    ones = e.op("Expand", low.number(1.0, "f32"), e.op("Shape", best))
    chosen = e.op("ScatterElements", e.op("Mul", merit, low.number(0.0, "f32")), best, ones, axis=-1)
    keep = e.op("Unsqueeze", e.op("Greater", chosen, low.number(0.5, "f32")), e.const([-1]))
    kept = e.op("Where", keep, grouped, low.number(-np.inf, "f32"))
    return low.shapes.reshape(kept, (*lead, groups, experts // groups), (*lead, experts))
