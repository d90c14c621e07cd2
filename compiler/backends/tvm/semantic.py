"""The semantic ops as calls of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tvm import relax

from moec.compiler.backends.tvm.relax_types import stream
from moec.compiler.backends.tvm.storage import experts_layout, matrix_layout
from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph, Node
from moec.compiler.text import print_node
from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.specs import AttentionSpec, NormSpec, RouterSpec, SkipSpec

if TYPE_CHECKING:
    from moec.compiler.backends.tvm.lower import FunctionLowering

Expr = Any

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu_squared"}
"""Names of `moec.compiler.ops.ACTIVATIONS` and of the kernels."""


def _parameter(low: FunctionLowering, node: Node, position: int) -> str:
    """The name of an input that has to be a parameter."""
    name = node.inputs[position]
    if name not in low.graph.params:
        raise MoecError(f"{node.op}: input {position} must be a parameter, in {print_node(low.graph, node)}")
    return name


def _optional(low: FunctionLowering, node: Node, position: int) -> Expr | None:
    return low.full(node.inputs[position]) if node.has(position) else None


def _embedding(low: FunctionLowering, node: Node) -> None:
    weight = _parameter(low, node, 1)
    low.set_flat(node.name, low.kernels.embedding(low.flat(node.inputs[0]), low.weights(weight), matrix_layout(low.storage[weight])))


def _linear(low: FunctionLowering, node: Node) -> None:
    weight, x = _parameter(low, node, 1), low.matrix(node.inputs[0])
    users = low.graph.users.get(node.name, ())
    exact = not users or any(user.op == "router" for user in users)  # logits, by which tokens and experts are chosen
    layout = matrix_layout(low.storage[weight])
    _define(low, node, low.kernels.linear(x, low.weights(weight), layout, _optional(low, node, 2), exact=exact))


def _define(low: FunctionLowering, node: Node, matrix: Expr) -> None:
    """Define a value by its matrix [everything else, last axis]."""
    kind = low.sizes.type(node.outputs[0].type)
    if len(kind.shape) > 3:  # the stream of a value of more axes has more numbers a token
        matrix = low.bb.emit(relax.op.reshape(matrix, [kind.shape[1], _width(low.graph, node.name)]))
    low.set_flat(node.name, matrix)


def _width(graph: Graph, name: str) -> int:
    """The numbers of a token in a value."""
    found = stream(graph.type_of(name))
    if found is None:
        raise MoecError(f"%{name}: {graph.type_of(name)} does not lie as one row of numbers a token")
    return found[1]


def residual_norm(graph: Graph, node: Node) -> Node | None:
    """The normalisation that reads a residual addition, if both can be one kernel."""
    kind = node.outputs[0].type
    plain = node.op == "aten.add.Tensor" and len(node.inputs) == 2 and not node.attrs and kind.dtype == "f32"
    same = plain and all(name in graph.values and graph.type_of(name) == kind for name in node.inputs)
    if not same or len(kind.shape) != 3 or kind.shape[:2] not in (("B", "T"), ("B", "R")):
        return None
    users = [user for user in graph.users.get(node.name, ()) if user.op in ("rms_norm", "layer_norm") and user.inputs[0] == node.name]
    return next((user for user in users if all(name in graph.params for name in user.inputs[1:] if name)), None)


def add_and_norm(low: FunctionLowering, addition: Node, node: Node) -> None:
    """Emit a residual addition together with the normalisation that reads it."""
    _norm(low, node, addition)


def norm_spec(graph: Graph, node: Node, addition: Node | None = None) -> NormSpec:
    """The kernel's description of a normalisation, perhaps with a residual addition in front of it."""
    size = int(graph.type_of(node.name).shape[-1])
    return NormSpec(
        size, _width(graph, node.name) // size, float(node.attrs["eps"]), float(node.attrs.get("offset", 0.0)),
        center=node.op == "layer_norm", weight=node.has(1), bias=node.has(2), residual=addition is not None,
    )  # fmt: skip


def _norm(low: FunctionLowering, node: Node, addition: Node | None = None) -> None:
    inputs = [low.flat(name) for name in (addition.inputs if addition else node.inputs[:1])]
    weight, bias = _optional(low, node, 1), _optional(low, node, 2)
    *total, out = low.kernels.norm(norm_spec(low.graph, node, addition), [*inputs, *(a for a in (weight, bias) if a is not None)])
    if addition is not None:
        low.set_flat(addition.name, total[0])
    low.set_flat(node.name, out)


def _rope(low: FunctionLowering, node: Node) -> None:
    x, cos, sin = (low.flat(name) for name in node.inputs)
    heads, d = (int(n) for n in low.graph.type_of(node.name).shape[2:])
    low.set_flat(node.name, low.kernels.rope(x, cos, sin, heads, d))


def attention_spec(graph: Graph, node: Node) -> AttentionSpec:
    """The kernel's description of an `attention` node."""
    if not node.attrs.get("causal", True):
        raise MoecError(f"attention that is not causal cannot be run token by token, in {print_node(graph, node)}")
    (heads, d), (kv_heads, dv) = (tuple(int(n) for n in graph.type_of(node.inputs[i]).shape[2:]) for i in (0, 2))
    a = node.attrs
    return AttentionSpec(
        heads, kv_heads, d, dv, float(a["scale"]), int(a.get("window", 0)), int(a.get("chunk", 0)), float(a.get("softcap", 0.0)),
        sinks=node.has(3),
    )  # fmt: skip


def _attention(low: FunctionLowering, node: Node) -> None:
    inputs = [*(low.flat(name) for name in node.inputs[:3]), low.blocks, low.page_table]
    if (sinks := _optional(low, node, 3)) is not None:
        inputs.append(sinks)
    low.set_flat(node.name, low.kernels.attention(attention_spec(low.graph, node), low.caches(node), inputs))


def router_spec(graph: Graph, node: Node) -> RouterSpec:
    """The kernel's description of a `router` node."""
    return RouterSpec(experts=int(graph.type_of(node.inputs[0]).shape[-1]), bias=node.has(1), **node.attrs)


def _router(low: FunctionLowering, node: Node) -> None:
    logits, bias = low.flat(node.inputs[0]), _optional(low, node, 1)
    found = low.kernels.router(router_spec(low.graph, node), [logits, *([] if bias is None else [bias])])
    for output, value in zip(node.outputs, found, strict=True):
        low.set_flat(output.name, value)


def skip_spec(graph: Graph, node: Node) -> SkipSpec:
    """The kernel's description of a `skip` node."""
    return SkipSpec(int(graph.type_of(node.inputs[0]).shape[-1]), counts=len([name for name in node.inputs if name]) > 2, **node.attrs)


def _skip(low: FunctionLowering, node: Node) -> None:
    args = [low.flat(name) for name in node.inputs if name]
    for output, value in zip(node.outputs, low.kernels.skip(skip_spec(low.graph, node), args), strict=True):
        low.set_flat(output.name, value)


def _topk(low: FunctionLowering, node: Node) -> None:
    x, kind = low.matrix(node.inputs[0]), low.graph.type_of(node.inputs[0])
    if node.attrs.get("dim", -1) not in (-1, len(kind.shape) - 1) or kind.dtype != "f32":
        raise MoecError(f"topk along another axis than the last, or not of f32, is not supported: {print_node(low.graph, node)}")
    outs = low.kernels.topk(x, int(node.attrs["k"]), bool(node.attrs.get("largest", True)))
    for output, value in zip(node.outputs, outs, strict=True):
        low.set_full(output.name, low.bb.emit(relax.op.reshape(value, low.sizes.type(output.type).shape)))


def _experts(low: FunctionLowering, node: Node) -> None:
    x, ids, weights = (low.flat(name) for name in node.inputs[:3])
    up, down = _parameter(low, node, 3), _parameter(low, node, 4)
    biases = [b for b in (_optional(low, node, 5), _optional(low, node, 6)) if b is not None]
    if len(biases) == 1:
        raise MoecError(f"experts with only one of the two biases are not supported: {print_node(low.graph, node)}")
    layout, name, limit = experts_layout(low.graph, node, low.platform), str(node.attrs["activation"]), float(node.attrs.get("limit", 0.0))
    if name == "swiglu_oai":
        activation = ExpertActivation("clamped_swiglu", limit=limit or float("inf"))
    elif name in ACTIVATIONS and not limit:
        activation = ExpertActivation(ACTIVATIONS[name])
    else:
        raise MoecError(f"the experts kernel has no activation {name!r} with limit {limit}: {print_node(low.graph, node)}")
    factors = [_parameter(low, node, at) for at in range(7, len(node.inputs)) if node.inputs[at]]
    arrays = [low.weights(name) for name in (up, down, *factors)]
    low.set_flat(node.name, low.kernels.experts([x, ids, weights], arrays, layout, activation, biases, low.next_counts()))


SEMANTIC: dict[str, Callable[[FunctionLowering, Node], None]] = {
    "embedding": _embedding,
    "linear": _linear,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "rope": _rope,
    "attention": _attention,
    "router": _router,
    "skip": _skip,
    "experts": _experts,
    "aten.topk": _topk,
}
