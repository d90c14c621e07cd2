"""Which neighbouring ops one operator of ONNX Runtime computes together, decided before anything is lowered.

At one token a step the time of a small model goes to starting operators, and to waiting for threads at the end of each. Measured with
ONNX Runtime 1.31.1 on one thread of a Sapphire Rapids machine: about 1 us an operator.

    %q: linear(%x, @a)                         one MatMulNBits over the rows of all three matrices, put together when the
    %k: linear(%x, @b)                    ->   model is loaded, and a Split
    %v: linear(%x, @c)

    %r: rope(%q, %cos, %sin)                   GroupQueryAttention turns q and k itself, by a table of the context's angles
    %s: rope(%k, %cos, %sin)              ->   that is computed when the model is loaded
    %a: attention(%r, %s, %v)

    %q: rms_norm(%y, @w)                       the norm's weight, or the scales of an integer matrix, times `scale`: then
    %a: attention(%q, %k, %v) {scale=..}  ->   attention's products are plain ones, for which there are faster kernels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moec.compiler.backends.onnx.layout import IntLayout
from moec.compiler.backends.onnx.placement import Placement
from moec.compiler.ir import Graph, Node

TABLE_BYTES = 16 << 20
"""The largest table of angles that is made for attention, cosines and sines together."""


@dataclass(frozen=True)
class Fusion:
    """What is computed together.

    Args:
        siblings: linear nodes that run as one, by the name of each of them; the first comes first.
        turning: attention nodes that turn q and k themselves, by name, with the names of cosines and sines.
        turned: rope nodes that are left to them.
        factors: norms and linear nodes whose results are multiplied by a factor, by name.
        scaled: attention nodes whose q has been multiplied by `scale` in this way.
    """

    siblings: Mapping[str, tuple[Node, ...]] = field(default_factory=dict)
    turning: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    turned: frozenset[str] = frozenset()
    factors: Mapping[str, float] = field(default_factory=dict)
    scaled: frozenset[str] = frozenset()


def plan_fusion(graph: Graph, placement: Placement, alone: frozenset[str] = frozenset(), scales: bool = True) -> Fusion:
    """Find what can be computed together with ONNX Runtime's own operators.

    Args:
        alone: linear nodes that run by themselves.
        scales: attention's scale goes into the weights before it.
    """
    siblings: dict[str, tuple[Node, ...]] = {}
    groups: dict[object, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "linear" and node.name not in alone and len([n for n in node.inputs if n]) == 2:
            layout = placement.layouts.get(node.inputs[1])
            if isinstance(layout, IntLayout) and layout.block:
                groups.setdefault((node.inputs[0], replace(layout, n=0)), []).append(node)
    for group in groups.values():
        if len(group) > 1:
            siblings |= {node.name: tuple(group) for node in group}
    turning = {node.name: node.inputs for node in graph.nodes if node.op == "attention" and _turns(graph, node)}
    factors: dict[str, float] = {}
    scaled = set()
    for node in graph.nodes:
        if scales and node.op == "attention" and (source := _scalable(graph, placement, node)) is not None:
            factors[source.name] = float(node.attrs["scale"])
            scaled.add(node.name)
    ropes = {name: graph.producers[inputs[0]] for name, inputs in turning.items()}
    turned = frozenset(name for inputs in turning.values() for name in inputs[:2])
    return Fusion(siblings, {name: (r.inputs[1], r.inputs[2]) for name, r in ropes.items()}, turned, factors, frozenset(scaled))


def _turns(graph: Graph, node: Node) -> bool:
    """Whether an attention node can turn q and k itself."""
    q, k = (graph.producers.get(name) for name in node.inputs[:2])
    if q is None or k is None or q.op != "rope" or k.op != "rope" or q.inputs[1:] != k.inputs[1:]:
        return False
    if not all(_read_by(graph, r.name, node) for r in (q, k)):
        return False
    (cos, sin), size = q.inputs[1:], q.outputs[0].type.shape[-1]
    context = graph.meta.get("context_length")
    if (
        not isinstance(context, int) or not isinstance(size, int) or size % 16 or graph.type_of(node.inputs[2]).shape[-1] != size
    ):  # the operator wants multiples of 16
        return False
    fits = 4 * context * size <= TABLE_BYTES
    return fits and all(
        equal_halves(graph, c) and _of_positions(graph, c) and graph.type_of(c).shape == ("B", "T", size) for c in (cos, sin)
    )


def _read_by(graph: Graph, name: str, user: Node) -> bool:
    """Whether nothing but one node reads a value."""
    return [n.name for n in graph.users.get(name, ())] == [user.name] and name not in graph.outputs


def equal_halves(graph: Graph, name: str) -> bool:
    """Whether a value [B, T, d] repeats its first d/2 numbers, as far as its ops show."""
    node = graph.producers.get(name)
    if node is None:
        return False
    rank = len(node.outputs[0].type.shape)
    if node.op == "aten.cat.default":
        return len(node.inputs) == 2 and node.inputs[0] == node.inputs[1] and node.attrs["dim"] in (-1, rank - 1)
    unary = ("cos", "sin", "neg", "_to_copy")
    number = node.op in ("aten.mul.Tensor", "aten.div.Tensor") and "other" in node.attrs
    if number or node.op in [f"aten.{op}.default" for op in unary]:
        return equal_halves(graph, node.inputs[0])
    return False


def _ancestors(graph: Graph, names: tuple[str, ...]) -> list[Node]:
    """The nodes that lead to some values, in order."""
    wanted, found = set(names), list[Node]()
    for node in reversed(graph.nodes):
        if wanted & {o.name for o in node.outputs}:
            wanted |= {name for name in node.inputs if name}
            found.insert(0, node)
    return found


def _of_positions(graph: Graph, name: str) -> bool:
    """Whether a value is computed from positions and parameters alone."""
    inputs = {v.name for v in graph.inputs} - {"positions"}
    nodes = _ancestors(graph, (name,))
    return bool(nodes) and not any(inputs & set(n.inputs) or n.op in ("attention", "embedding") for n in nodes)


def of_positions(graph: Graph, names: tuple[str, ...]) -> Graph:
    """The part of a graph that leads from positions to some values."""
    inputs = tuple(v for v in graph.inputs if v.name == "positions")
    return replace(graph, inputs=inputs).with_nodes(_ancestors(graph, names), names)


def needed(graph: Graph, fusion: Fusion) -> set[str]:
    """The nodes and inputs that are still read."""
    wanted = set(graph.outputs)
    for node in reversed(graph.nodes):
        if wanted & {o.name for o in node.outputs}:
            wanted |= {node.name, *(node.inputs[:1] if node.name in fusion.turned else node.inputs)}
    return wanted


def _scalable(graph: Graph, placement: Placement, attention: Node) -> Node | None:
    """The norm or product that q comes from, if nothing else does."""
    name, user = attention.inputs[0], attention
    while (node := graph.producers.get(name)) is not None and _read_by(graph, name, user):
        if node.op == "rms_norm":
            return node if len(node.inputs) > 1 and node.inputs[1] in graph.params else None
        if node.op == "linear":
            layout = placement.layouts.get(node.inputs[1])
            whole = isinstance(layout, IntLayout) and layout.block > 0 and len([n for n in node.inputs if n]) == 2
            return node if whole else None
        if node.op not in ("rope", "aten.view.default"):
            return None
        name, user = node.inputs[0], node
    return None
