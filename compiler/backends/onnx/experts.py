"""`experts` in ONNX: QMoE, MoE, or one branch an expert. `placement` chooses.

Where `routing` cannot leave the choice to the operator, QMoE's and MoE's top-k is fed the final weights, scattered to [tokens, E] with
zeros for experts that were not chosen, so that it selects just those that were chosen. QMoE takes the same array as the weights to mix
with. MoE mixes with softmax over the chosen logits: with logits log(w) that is w / sum(w), and the result is multiplied by sum(w).

On a GPU both operators read logits of 16 bits, among which they would choose other experts, and QMoE's weights to mix with are ignored
(ONNX Runtime 1.31.1). There each choice of a token is a row of its own, with one expert, whose share is one; the results are mixed here:

    x [T, D] -> [T K, D];  logits [T K, E], one for the chosen expert, zero for the others;  y [T, K, D] -> sum over K of w y
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moec.compiler.backends.onnx.emit import CONTRIB
from moec.compiler.backends.onnx.layout import IntLayout
from moec.compiler.backends.onnx.linear import dense, product
from moec.compiler.backends.onnx.placement import GATED, PLAIN, fixed
from moec.compiler.backends.onnx.routing import Routing, choices, direct, direct_routing, scattered
from moec.compiler.ir import Node

if TYPE_CHECKING:
    from moec.compiler.backends.onnx.lower import Lowering


def lower_experts(low: Lowering, node: Node) -> str:
    """The `experts` op."""
    e, plan = low.e, low.weights.placement.experts[node.name]
    mode = plan.mode
    shape = low.shape(node.inputs[0])
    rank, width = len(shape), shape[-1]
    assert isinstance(width, int)
    router = direct(low.graph, node, plan)
    x = low.value(node.inputs[0])
    whole = not plan.rows and rank <= 3 and (mode == "qmoe" or router is not None)  # QMoE and MoE also take [B, T, D]
    if not whole and not plan.rows and rank != 2:
        x = e.op("Reshape", x, e.const([-1, width]))
    if mode == "unrolled":
        result = _unrolled(low, node, x, scattered(low, node))
    elif plan.rows:
        result = _by_rows(low, node, mode, x, width)
    else:
        routing = _routing(low, node, mode) if router is None else direct_routing(low, router)
        result = _OPERATORS[mode](low, node, x, routing)
        result = e.op("Mul", result, routing.factor) if routing.factor else result
    if whole or (rank == 2 and not plan.rows):
        return result
    if rank <= 3:
        return e.op("Reshape", result, e.op("Shape", low.value(node.inputs[0])))
    return e.op("Reshape", result, low.shapes.vector(shape))


def _routing(low: Lowering, node: Node, mode: str) -> Routing:
    """The routing by scattered weights, among which QMoE and MoE choose again."""
    e, weights = low.e, scattered(low, node)
    if mode == "qmoe":
        return Routing(weights, weights, False, "", _top_k(low, node))
    logits = e.op("Log", e.op("Max", weights, e.const(np.float32(1e-30))))
    return Routing(logits, "", True, e.op("ReduceSum", weights, e.const([1]), keepdims=1), _top_k(low, node))


def _by_rows(low: Lowering, node: Node, mode: str, x: str, width: int) -> str:
    """[tokens, 1, D], each choice of a token a row of its own; x [..., D]."""
    e, (ids, weights) = low.e, choices(low, node)
    top_k, count = _choices_of(low, node), fixed(low.graph.params[node.inputs[3]].type.shape)[0]
    once = e.op("Reshape", low.narrow(x), e.const([-1, 1, width]))
    rows = e.op("Reshape", e.op("Expand", once, e.const([1, top_k, 1])), e.const([-1, width]))
    chosen = e.op("Equal", e.op("Reshape", ids, e.const([-1, 1])), e.const(np.arange(count)))
    routing = Routing(low.cast_value(chosen, low.kind), "", True, "", 1)
    results = e.op("Reshape", _OPERATORS[mode](low, node, rows, routing), e.const([-1, top_k, width]))
    return e.op("MatMul", e.op("Reshape", weights, e.const([-1, 1, top_k])), results)


def _attrs(node: Node, top_k: int) -> dict[str, Any]:
    a = node.attrs
    if not a.get("gated", True):
        return {"k": top_k, "activation_type": PLAIN[a["activation"]]}
    alpha, beta = GATED[a["activation"]]
    limit = float(a["limit"]) if a.get("limit") else None
    return {
        "k": top_k, "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": alpha, "activation_beta": beta,
        "swiglu_limit": limit,
    }  # fmt: skip


def _biases(low: Lowering, node: Node) -> tuple[str, str]:
    """Both biases; the first with gate and up interleaved, as the operators want the rows of the projection."""
    e = low.e
    up, down = (low.value(name) if name else "" for name in (*node.inputs[5:7], "", "")[:2])
    if up and node.attrs.get("gated", True):
        count, rows = fixed(low.graph.params[node.inputs[5]].type.shape)
        halves = e.op("Reshape", up, e.const([count, 2, rows // 2]))
        up = e.op("Reshape", e.op("Transpose", halves, perm=[0, 2, 1]), e.const([count, rows]))
    return up, down


def _top_k(low: Lowering, node: Node) -> int:
    """Experts a token, at most all of them."""
    return min(_choices_of(low, node), fixed(low.graph.params[node.inputs[3]].type.shape)[0])


def _choices_of(low: Lowering, node: Node) -> int:
    """How many experts a token names, some perhaps twice."""
    top_k = low.shape(node.inputs[1])[-1]
    assert isinstance(top_k, int)
    return top_k


def _qmoe(low: Lowering, node: Node, x: str, routing: Routing) -> str:
    e, plan = low.e, low.weights.placement.experts[node.name]
    arrays: list[tuple[str, str, str]] = []
    for name in node.inputs[3:5]:
        layout, count = low.weights.layout(name), fixed(low.graph.params[name].type.shape)[0]
        assert isinstance(layout, IntLayout)
        data = e.stored(name, "weight", "u8", (count, layout.n, layout.padded_k * layout.bits // 8))
        scale = e.op("Cast", e.stored(name, "scale", "f16", (count, layout.n, layout.groups)), to=1)
        zero = e.stored(name, "zero", "u8", (count, *layout.arrays()["zero"].shape)) if layout.has_zero else ""
        arrays.append((data, low.narrow(low.weights.per_block(layout, scale, 2)), zero))
    (up, up_scale, up_zero), (down, down_scale, down_zero) = arrays
    up_bias, down_bias = (low.narrow(bias) for bias in _biases(low, node))
    inputs = [
        x, routing.scores, up, up_scale, up_bias, down, down_scale, down_bias, "", "", "", up_zero, down_zero, "", routing.weights,
    ]  # fmt: skip
    result = e.multi(
        "QMoE", inputs, 1, CONTRIB, node.name, **_attrs(node, routing.top_k), expert_weight_bits=plan.bits, block_size=plan.block,
        normalize_routing_weights=int(routing.normalize), accuracy_level=low.accuracy_level, weights_prepacked=0,
    )[0]  # fmt: skip
    return low.widen(result)


def _moe(low: Lowering, node: Node, x: str, routing: Routing) -> str:
    e = low.e
    weights = []
    for name in node.inputs[3:5]:
        param = low.graph.params[name]
        stored = e.stored(name, "weight", str(param.format), fixed(param.type.shape))
        weights.append(low.narrow(stored if param.format == "f32" else e.op("Cast", stored, to=1)))
    up_bias, down_bias = (low.narrow(bias) for bias in _biases(low, node))
    inputs = [x, routing.scores, weights[0], up_bias, weights[1], down_bias]
    attrs = _attrs(node, routing.top_k)
    return low.widen(e.multi("MoE", inputs, 1, CONTRIB, node.name, **attrs, normalize_routing_weights=int(routing.normalize))[0])


_OPERATORS = {"qmoe": _qmoe, "moe": _moe}


def _unrolled(low: Lowering, node: Node, x: str, routing: str) -> str:
    """Expert after expert, each only if a token was routed to it: its tokens are gathered, computed and added."""
    e = low.e
    up, down = node.inputs[3:5]
    up_bias, down_bias = (low.value(name) if name else "" for name in (*node.inputs[5:7], "", "")[:2])
    count = fixed(low.graph.params[up].type.shape)[0]
    columns = e.op("Transpose", routing, perm=[1, 0])  # [E, tokens]
    chosen = e.op("ReduceMax", low.cast_value(e.op("Cast", columns, to=9), "i32"), e.const([1]), keepdims=0)
    used = e.multi("Split", [low.cast_value(chosen, "bool")], count, axis=0, num_outputs=count)
    result = e.op("Mul", x, low.number(0.0, "f32"))
    for expert in range(count):
        with e.branch() as nodes:
            weights = e.op("Gather", columns, e.const(np.int64(expert)), axis=0)  # [tokens]
            at = e.op("Transpose", e.op("NonZero", weights), perm=[1, 0])  # [n, 1]
            h = _project(low, e.op("GatherND", x, at), up, expert, up_bias, node.inputs[7:9])
            h = activation(low, h, node)
            h = _project(low, h, down, expert, down_bias, node.inputs[9:11])
            h = e.op("Mul", h, e.op("Unsqueeze", e.op("GatherND", weights, at), e.const([1])))
            then = nodes, e.op("ScatterND", result, at, h, reduction="add")
        with e.branch() as nodes:
            other = nodes, e.op("Identity", result)
        result = e.when(used[expert], then, other, "f32")
    return result


def _project(low: Lowering, x: str, weight: str, expert: int, bias: str, factors: Sequence[str]) -> str:
    """x through one expert's matrix, its low-rank factors (left and right, where there are any), or the sum of both."""
    e = low.e
    terms = [] if low.graph.params[weight].format == "zero" else [_product(low, x, weight, expert)]
    if factors and factors[0]:
        left, right = factors
        terms.append(_product(low, _product(low, x, right, expert), left, expert))
    y = terms[0] if len(terms) == 1 else e.op("Add", *terms)
    return e.op("Add", y, e.op("Gather", bias, e.const(np.int64(expert)), axis=0)) if bias else y


def _product(low: Lowering, x: str, weight: str, expert: int) -> str:
    """x times one expert's matrix transposed."""
    e, param = low.e, low.graph.params[weight]
    wide = any(n.name in low.weights.placement.experts and low.weights.placement.experts[n.name].wide for n in low.graph.users[weight])
    if wide and param.format != "f32" and not isinstance(low.weights.layout(weight), IntLayout):
        # An index that is not constant keeps ONNX Runtime from widening all experts when it loads the model.
        stack = e.stored(weight, "weight", str(param.format), fixed(param.type.shape))
        index = e.op("Add", e.op("Mul", low.shapes.scalar("T"), e.const(np.int64(0))), e.const(np.int64(expert)))
        return dense(low, x, e.op("Cast", e.op("Gather", stack, index, axis=0), to=1), 2)
    return product(low, x, 2, weight, expert)


def activation(low: Lowering, x: str, node: Node) -> str:
    """`expert_activation`: x [n, 2F] (gate, then up) or [n, F] -> [n, F]."""
    e, a = low.e, node.attrs
    if not a.get("gated", True):
        return _activate(low, x, a["activation"])
    gate, up = e.multi("Split", [x], 2, axis=1, num_outputs=2)
    if limit := a.get("limit"):
        high, least = low.number(float(limit), "f32"), low.number(-float(limit), "f32")
        gate, up = e.op("Clip", gate, "", high), e.op("Clip", up, least, high)
    if a["activation"] == "swiglu_oai":
        swish = e.op("Mul", gate, e.op("Sigmoid", e.op("Mul", gate, low.number(1.702, "f32"))))
        return e.op("Mul", e.op("Add", up, low.number(1.0, "f32")), swish)
    return e.op("Mul", _activate(low, gate, a["activation"]), up)


def _activate(low: Lowering, x: str, name: str) -> str:
    e = low.e
    match name:
        case "silu":
            return e.op("Mul", x, e.op("Sigmoid", x))
        case "gelu" | "gelu_tanh":
            return e.op("Gelu", x, approximate="tanh" if name == "gelu_tanh" else "none")
        case "relu" | "relu2":
            positive = e.op("Relu", x)
            return positive if name == "relu" else e.op("Mul", positive, positive)
    return x
