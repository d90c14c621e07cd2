"""The choice of experts becomes `router`, by propose and verify: no model family has code here.

What lies between the router's logits and the (ids, weights) that the experts read is collected, candidates of
`moec.compiler.ops.router` are proposed from what occurs in it (numbers of top-k, group sizes, bias parameters), and each is held
against the collected nodes on random logits and biases in float64. One that agrees for all draws replaces them; if none does, the
ATen ops stay: correct, just not raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from moec.compiler.frontend.layout import Layout
from moec.compiler.frontend.rewrite import AnySize, Rewriter
from moec.compiler.frontend.rules.canonical import view
from moec.compiler.frontend.rules.params import relaid
from moec.compiler.interpreter import concrete, evaluate
from moec.compiler.ir import Node, TensorType
from moec.compiler.ops import OPS, router
from moec.compiler.text import format_attr

_SYMBOLS = AnySize({"B": 3, "T": 37}, 5)
_DRAWS = 3
_TOLERANCE = 2e-6  # of a weight; implementations add up to 1e-6 to the sum they divide by


@dataclass(frozen=True)
class _Region:
    """The nodes from `logits` to (ids, weights), in order, and the parameters that they read."""

    logits: str
    nodes: tuple[Node, ...]
    params: tuple[str, ...]
    ids: str
    weights: str


def _collect(b: Rewriter, ids: str, weights: str, stop: str = "") -> _Region | None:
    """The region of (ids, weights) above `stop`, or above the one semantic op or input that it starts from."""
    seen: dict[str, None] = {}
    nodes: list[Node] = []
    params: dict[str, None] = {}
    sources: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in seen:
            return
        seen[name] = None
        node = b.made(name)
        if b.is_param(name):
            params[name] = None
        elif name == stop or node is None or node.op in OPS:
            sources[name] = None
        elif len(nodes) < 200:
            for operand in filter(None, node.inputs):
                visit(operand)
            if node not in nodes:
                nodes.append(node)

    visit(ids), visit(weights)
    if len(sources) != 1:
        return None
    return _Region(next(iter(sources)), tuple(nodes), tuple(params), ids, weights)


def _run(region: _Region, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, weights) of the collected nodes, [N, K] each."""
    values = dict(values)
    for node in region.nodes:
        tensors = [values[name] if name else None for name in node.inputs]
        values.update(zip((o.name for o in node.outputs), evaluate(node, tensors, _SYMBOLS, torch.float64, "cpu"), strict=True))
    ids, weights = values[region.ids], values[region.weights]
    return ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1])


def _groups(region: _Region, experts: int) -> Iterator[dict[str, Any]]:
    """No groups, and every grouping that the region's shapes and numbers of top-k allow."""
    yield {}
    sizes = {
        n.outputs[0].type.shape[-2]
        for n in region.nodes
        if n.op == "aten.view.default" and len(n.outputs[0].type.shape) >= 2
        and isinstance(n.outputs[0].type.shape[-1], int) and isinstance(n.outputs[0].type.shape[-2], int)
        and n.outputs[0].type.shape[-1] * n.outputs[0].type.shape[-2] == experts
    }  # fmt: skip
    chosen = {n.attrs["k"] for n in region.nodes if n.op == "aten.topk.default"}
    for groups, top_groups, score in product(sorted(sizes), sorted(chosen), ("max", "top2")):
        if 1 < groups < experts and top_groups <= groups:
            yield {"groups": groups, "top_groups": top_groups, "group_score": score}


def _by_expert(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    order = ids.argsort(-1)
    return ids.gather(-1, order), weights.gather(-1, order)


def _scale(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float | None:
    """The factor between two (ids, weights), if the choice is the same and the factor is one number."""
    (ids, weights), (ids2, weights2) = _by_expert(*found), _by_expert(*expected)
    if not torch.equal(ids, ids2):
        return None
    ratio = weights2 / weights
    scale = float(ratio.median())
    if not torch.allclose(ratio, torch.full_like(ratio, scale), rtol=_TOLERANCE, atol=0.0):
        return None
    return 1.0 if abs(scale - 1) < _TOLERANCE else float(f"{scale:.6g}") if abs(scale / float(f"{scale:.6g}") - 1) < 1e-6 else scale


def _search(b: Rewriter, region: _Region) -> tuple[str, dict[str, Any]] | None:
    """(bias parameter or "", attributes) of a router that agrees with the region."""
    generator = torch.Generator().manual_seed(0)
    draws = []
    for draw in range(_DRAWS):
        shape = concrete(b.shape(region.logits), _SYMBOLS)
        values = {region.logits: 2 * torch.randn(shape, dtype=torch.float64, generator=generator)}
        for name in region.params:
            noise = torch.randn(concrete(b.shape(name), {}), dtype=torch.float64, generator=generator)
            values[name] = noise * (0.1 + 0.1 * draw)
        try:
            draws.append((values, _run(region, values)))
        except Exception as error:  # noqa: BLE001  # an op that cannot run alone: the region is no router
            b.misses.append((region.weights, f"router: {error}"))
            return None
    experts, top_k = shape[-1], draws[0][1][0].shape[-1]
    biases = ["", *(name for name in region.params if b.shape(name) in ((experts,), (1, experts)))]
    for score, normalize, bias in product(("softmax", "sigmoid", "softmax_topk"), (False, True), biases):
        for groups in _groups(region, experts) if score != "softmax_topk" else ({},):
            attrs = {"top_k": top_k, "score": score, "normalize": normalize, **groups}
            scales = []
            for values, expected in draws:
                logits = values[region.logits].reshape(-1, experts)
                weights, ids = router(logits, values[bias].flatten() if bias else None, **attrs)
                scales.append(_scale((ids, weights), expected))
                if scales[-1] is None:
                    break
            if None not in scales and len(set(scales)) == 1:
                return bias, attrs if scales[0] == 1.0 else {**attrs, "scale": scales[0]}
    return None


def _key(region: _Region) -> tuple[Any, ...]:
    """The region's structure, the same for all layers that route alike."""
    index: dict[str, int] = {region.logits: 0, **{name: -1 - i for i, name in enumerate(region.params)}}
    lines = []
    for node in region.nodes:
        attrs = tuple(f"{k}={format_attr(v)}" for k, v in sorted(node.attrs.items()))
        lines.append((node.op, tuple(index.get(n) for n in node.inputs), attrs, tuple(str(o.type) for o in node.outputs)))
        index.update({o.name: len(index) + 1 for o in node.outputs})
    return (*lines, index[region.ids], index[region.weights])


_MEMO: dict[tuple[Any, ...], tuple[int, dict[str, Any]] | None] = {}


def _recognise(b: Rewriter, region: _Region) -> tuple[str, dict[str, Any]] | None:
    """`_search`, once for all layers that route alike."""
    key = (_key(region), tuple(str(b.type(n)) for n in (region.logits, *region.params)))
    if key not in _MEMO:
        found = _search(b, region)
        _MEMO[key] = (region.params.index(found[0]) if found[0] else -1, found[1]) if found else None
    known = _MEMO[key]
    return (region.params[known[0]] if known[0] >= 0 else "", known[1]) if known else None


def raise_router(b: Rewriter, node: Node, ids: str, weights: str) -> tuple[str, str] | None:
    """The (ids, weights) of a `router` that computes what the experts read, in the same shapes; None if there is none."""
    region = _collect(b, ids, weights)
    if region is None:
        return b.decline(node, "router: the choice of experts depends on several tensors")
    # the logits are the source, or what a few elementwise ops make of it
    cuts = [region.logits, *(n.name for n in region.nodes if n.outputs[0].type.shape == b.shape(region.logits))]
    for cut in cuts[:6]:
        inner = _collect(b, ids, weights, stop=cut)
        if inner is None or inner.logits != cut or not inner.nodes:
            continue
        if (found := _recognise(b, inner)) is not None:
            bias, attrs = found
            kind = b.type(cut)
            shape = (*kind.shape[:-1], attrs["top_k"])
            if bias and len(b.shape(bias)) != 1:
                relaid(b, bias, Layout(flat=True))
            inputs = [cut, bias] if bias else [cut]
            results = b.emit_all("router", inputs, (TensorType("f32", shape), TensorType("i64", shape)), attrs)
            return view(b, results[1], b.shape(ids)), view(b, results[0], b.shape(weights))
    b.decline(node, "router: no candidate agrees with the traced choice of experts")
    return None
