"""Nodes between a router and its experts.

%w, %i = router(%l)                                   %w, %i = router(%l)
%y = experts(%x, %i, %w, @up, @down)             ->   %sw, %si = skip(%w, %i[, %counts]) {experts=E, ...}
                                                      %y = experts(%x, %si, %sw, @up, @down)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from moec.compiler.errors import MoecError
from moec.compiler.ir import Attr, Graph, Node, TensorType, Value
from moec.compiler.layers import MoeLayer, replace_node

Namer = Callable[[str], str]


def namer(graph: Graph, stem: str) -> Namer:
    """A function from a suffix to a name `stem.suffix` that nothing in the graph, nor an earlier call, has."""
    taken: set[str] = set()

    def name(suffix: str) -> str:
        found = graph.fresh(f"{stem}.{suffix}", taken)
        taken.add(found)
        return found

    return name


def insert_skip(
    graph: Graph, layer: MoeLayer, attrs: Mapping[str, Attr], nodes: Sequence[Node] = (), counts: str = "", name: Namer | None = None
) -> Graph:
    """The graph in which a layer skips experts.

    Args:
        attrs: of the `skip` node, without `experts`.
        nodes: what computes `counts`; they come before the `skip`.
        counts: the value that says how many experts a token keeps, or nothing.
        name: of a caller who has named `nodes` with it.
    """
    name = name or namer(graph, layer.name)
    skip = skip_node(graph, layer, attrs, counts, name)
    ids, weights = skip.outputs[1].name, skip.outputs[0].name
    experts = replace(layer.experts, inputs=(layer.experts.inputs[0], ids, weights, *layer.experts.inputs[3:]))
    return replace_node(graph, layer.experts, [*nodes, skip, experts])


def skip_node(graph: Graph, layer: MoeLayer, attrs: Mapping[str, Attr], counts: str, name: Namer) -> Node:
    """A `skip` of what goes into a layer's experts."""
    ids, weights = layer.experts.inputs[1:3]
    outputs = (Value(name("skip_weights"), graph.type_of(weights)), Value(name("skip_ids"), graph.type_of(ids)))
    return Node("skip", (weights, ids, *([counts] if counts else [])), outputs, {"experts": layer.count, **attrs})


def like(graph: Graph, value: str, width: int | None, dtype: str) -> TensorType:
    """The type of a value with another last axis (None: without one) and element type."""
    lead = graph.type_of(value).shape[:-1]
    return TensorType(dtype, lead if width is None else (*lead, width))


def per_layer(option: object, layers: Sequence[MoeLayer], what: str) -> list[object]:
    """One value a layer of an option that is a value for all, or a list with one for each.

    Raises:
        MoecError: the list has another length.
    """
    if not isinstance(option, (list, tuple)):
        return [option] * len(layers)
    if len(option) != len(layers):
        raise MoecError(f"{what}: the list has {len(option)} values and the model {len(layers)} MoE layers: give one a layer")
    return list(option)
