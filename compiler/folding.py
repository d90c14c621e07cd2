"""Where a change of basis of activations can be folded into the weights on both sides: norms and what reads them, values of attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moec.compiler.ir import Graph, Node
from moec.compiler.packed import integer_format
from moec.compiler.weights import Edit, WeightSource

READS = {"linear": 1, "experts": 3}
"""Ops that multiply their first input with a weight, and where that weight stands among their inputs."""


def readers(graph: Graph, value: str) -> list[Node] | None:
    """The nodes that read a value, if each is a `linear` or `experts` that multiplies it with a weight of its own; else None."""
    nodes = graph.users.get(value, ())
    for node in nodes:
        weight = node.inputs[READS[node.op]] if node.op in READS else ""
        if node.inputs.count(value) != 1 or node.inputs[0] != value or not owned(graph, weight):
            return None
    return list(nodes) if nodes and value not in graph.outputs else None


def owned(graph: Graph, weight: str) -> bool:
    """Whether a parameter is a plain float one with one use."""
    param = graph.params.get(weight)
    return param is not None and param.type.dtype == "f32" and integer_format(param) is None and len(graph.users[weight]) == 1


@dataclass(frozen=True)
class ValuePath:
    """Values of attention from their projection to the output projection, with nothing but attention between.

    Head h of `heads` reads key/value head h // (heads // kv_heads); a head has `size` channels.
    """

    value: Node
    output: Node
    heads: int
    kv_heads: int
    size: int

    @property
    def repeats(self) -> int:
        return self.heads // self.kv_heads


def value_paths(graph: Graph) -> list[ValuePath]:
    """The attention nodes whose values come from one `linear` and go to one, through views alone."""
    found = []
    for node in graph.nodes:
        if node.op != "attention":
            continue
        source, target = _through_view(graph, node.inputs[2]), _only_user(graph, node.outputs[0].name)
        if target is not None and target.op == "aten.view.default":
            target = _only_user(graph, target.outputs[0].name)
        heads, size = node.outputs[0].type.shape[-2:]
        kv_heads = graph.type_of(node.inputs[2]).shape[-2]
        if source is None or target is None or (source.op, target.op) != ("linear", "linear") or not isinstance(kv_heads, int):
            continue
        assert isinstance(heads, int)
        assert isinstance(size, int)
        fits = graph.type_of(target.inputs[0]).shape[-1] == heads * size and source.outputs[0].type.shape[-1] == kv_heads * size
        if fits and owned(graph, source.inputs[1]) and owned(graph, target.inputs[1]):
            found.append(ValuePath(source, target, heads, kv_heads, size))
    return found


def _only_user(graph: Graph, value: str) -> Node | None:
    users = graph.users.get(value, ())
    return users[0] if len(users) == 1 and value not in graph.outputs else None


def _through_view(graph: Graph, value: str) -> Node | None:
    """What made a value of one use, views looked through."""
    node = graph.producers.get(value)
    while node is not None and len(graph.users[node.outputs[0].name]) == 1 and node.op == "aten.view.default":
        node = graph.producers.get(node.inputs[0])
    return node if node is not None and len(graph.users[node.outputs[0].name]) == 1 else None


def times(base: WeightSource, name: str, left: Tensor | None = None, right: Tensor | None = None) -> Edit:
    """An edit that multiplies a matrix, or each of a stack, in float64: left @ weight @ right; a vector: left @ weight.

    Factors of one dimension are diagonals.
    """

    def edit(expert: int | None) -> Tensor:
        value = base.load(name, expert).double()
        first, second = (None if factor is None else factor.to(value.device) for factor in (left, right))
        if first is not None:
            rows = value[..., None] if value.ndim == 1 else value
            value = (first[:, None] * rows if first.ndim == 1 else first @ rows).view_as(value)
        return value if second is None else value * second if second.ndim == 1 else value @ second

    return edit


def scaled(base: WeightSource, name: str, factors: Tensor) -> Edit:
    """An edit that multiplies a stack [E, ...] elementwise by factors that broadcast, [E, ...], in float64."""

    def edit(expert: int | None) -> Tensor:
        value = base.load(name, expert).double()
        return value * (factors if expert is None else factors[expert]).to(value.device)

    return edit
