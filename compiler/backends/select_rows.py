"""Logits of chosen tokens only: cut the graph before the ops that lead from the last hidden state to the logits.

    %n: f32[B, T, D] = rms_norm(%h, @norm)            %s: f32[B, R, D] = aten.index_select.default(%h, %rows) {dim=1}
    %logits: f32[B, T, V] = linear(%n, @head)    ->   %n: f32[B, R, D] = rms_norm(%s, @norm)
    return %logits                                    %logits: f32[B, R, V] = linear(%n, @head)
                                                      return %logits

The graph gains the input `rows: i32[R]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from moec.compiler.backends.tokenwise import ROW_WISE, is_tokenwise
from moec.compiler.errors import MoecError
from moec.compiler.ir import Attr, Graph, Node, TensorType, Value


def select_rows(graph: Graph) -> Graph:
    """The graph that computes its only result, [B, T, ...], for the tokens `rows` of one sequence.

    Raises:
        MoecError: the graph has no such result.
    """
    if len(graph.outputs) != 1 or graph.type_of(graph.outputs[0]).shape[:2] != ("B", "T"):
        results = ", ".join(f"%{name}: {graph.type_of(name)}" for name in graph.outputs)
        raise MoecError(f"graph {graph.name}: expected one result [B, T, vocabulary], got {results}")
    cut, after = graph.outputs[0], list[Node]()
    while (node := graph.producers.get(cut)) is not None and (source := _source(graph, node)) is not None:
        after.insert(0, node)
        cut = source
    rows = Value(graph.fresh("rows"), TensorType("i32", ("R",)))
    kind = graph.type_of(cut)
    chosen = Value(graph.fresh(f"{cut}_rows"), _of_rows_type(kind))
    select = Node("aten.index_select.default", (cut, rows.name), (chosen,), {"dim": 1})
    moved = [_of_rows(node, cut, chosen.name) for node in after]
    names = {node.name for node in after}
    nodes = [*(n for n in graph.nodes if n.name not in names), select, *moved]
    outputs = graph.outputs if after else (chosen.name,)
    return replace(graph, inputs=(*graph.inputs, rows)).with_nodes(nodes, outputs)


def _source(graph: Graph, node: Node) -> str | None:
    """The only input of a node that differs between tokens, if the node is the value's only user and can run on any rows."""
    inputs = [name for name in dict.fromkeys(node.inputs) if name and "T" in graph.type_of(name).shape]
    movable = (
        len(inputs) == 1
        and len(node.outputs) == 1
        and all(value.shape[:2] == ("B", "T") for value in (graph.type_of(inputs[0]), node.outputs[0].type))
        and inputs[0] in graph.producers
        and (node.op in ROW_WISE or is_tokenwise(graph, node))
        and node.op != "embedding"
        and len(graph.users.get(node.name, ())) <= 1
    )
    return inputs[0] if movable else None


def _of_rows_type(kind: TensorType) -> TensorType:
    return TensorType(kind.dtype, tuple(_of_rows_attr(d) for d in kind.shape))


def _of_rows_attr(attr: Attr) -> Attr:
    if isinstance(attr, tuple):
        return tuple(_of_rows_attr(a) for a in attr)
    return re.sub(r"\bT\b", "R", attr) if isinstance(attr, str) else attr


def _of_rows(node: Node, old: str, new: str) -> Node:
    attrs: Mapping[str, Attr] = {name: _of_rows_attr(value) for name, value in node.attrs.items()}
    outputs = tuple(Value(o.name, _of_rows_type(o.type)) for o in node.outputs)
    return replace(node, inputs=tuple(new if n == old else n for n in node.inputs), outputs=outputs, attrs=attrs)
