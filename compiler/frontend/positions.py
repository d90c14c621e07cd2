"""Counting tokens from the start of a call becomes reading their positions, so that a cache can continue.

    %n: i64[T] = aten.arange.start_step() {start=0, end="T", step=1}            (not there)
    %f: f32[T] = aten.log1p.default(%n)                                       %f: f32[B, T] = aten.log1p.default(%positions)
    %v: f32[1, T, 1, 1] = aten.view.default(%f)                               %v: f32[B, T, 1, 1] = aten.view.default(%f)
    %y: f32[B, T, H, d] = aten.mul.Tensor(%q, %v)                             %y: f32[B, T, H, d] = aten.mul.Tensor(%q, %v)

The two are the same where positions count from 0, which is what `arange` means: token t of a sequence is number t. Only what is
computed for each token by itself is rewritten, up to where it meets values of all sequences. Where `arange` serves something else
too (a mask of queries and keys, say), the graph stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moec.compiler.frontend.rewrite import same_shape
from moec.compiler.frontend.rules.views import BINARY, UNARY
from moec.compiler.ir import Attr, Dim, Graph, Node, TensorType, Value, dim_symbols

_VIEW, _EXPAND = "aten.view.default", "aten.expand.default"
_ELEMENTWISE = frozenset((*(f"aten.{name}.default" for name in UNARY), *(f"aten.{name}" for name in BINARY)))


def _is_count(node: Node) -> bool:
    """Whether a node is 0, 1, ... T - 1."""
    a = node.attrs
    return node.op == "aten.arange.start_step" and (a["start"], a["end"], a["step"]) == (0, "T", 1)


class _Lifting:
    """Values [...] that depend on counted tokens only, as values [B, ...] that depend on positions."""

    def __init__(self, graph: Graph, positions: str) -> None:
        self.graph, self.positions = graph, positions
        self.lifted: dict[str, str] = {}  # value [...] -> value [B, ...]
        self.shapes = {name: value.type.shape for name, value in graph.values.items()}
        self.taken = {*graph.values, *graph.params}
        self.nodes: list[Node] = []

    def emit(self, op: str, inputs: Sequence[str], dtype: str, shape: tuple[Dim, ...], attrs: Mapping[str, Attr]) -> str:
        name = self.graph.fresh("positions", self.taken)
        self.taken.add(name)
        self.shapes[name] = shape
        self.nodes.append(Node(op, tuple(inputs), (Value(name, TensorType(dtype, shape)),), dict(attrs)))
        return name

    def view(self, x: str, dtype: str, shape: tuple[Dim, ...]) -> str:
        return x if same_shape(self.shapes[x], shape) else self.emit(_VIEW, [x], dtype, shape, {"size": shape})

    def operand(self, name: str, rank: int, joined: bool) -> str | None:
        """An input for a node of `rank` axes besides B, or of `rank` axes of which the first is B (`joined`)."""
        if name not in self.lifted:
            return name
        shape, dtype = self.graph.type_of(name).shape, self.graph.type_of(name).dtype
        if joined and len(shape) == rank:
            if shape[0] != 1:
                return None
            shape = shape[1:]
        padding = (rank - joined - len(shape)) * (1,)
        return self.view(self.lifted[name], dtype, ("B", *padding, *shape))

    def node(self, node: Node) -> bool:
        """Rewrite one node that reads lifted values; whether that is possible."""
        kind = node.outputs[0].type
        joined = bool(kind.shape) and kind.shape[0] == "B"
        if node.op not in (*_ELEMENTWISE, _VIEW, _EXPAND) or (node.op == _VIEW and joined):
            return False
        if not joined and sum("T" in dim_symbols(d) for d in kind.shape) != 1:
            return False
        shape = kind.shape if joined else ("B", *kind.shape)
        if node.op == _VIEW:
            self.lifted[node.name] = self.view(self.lifted[node.inputs[0]], kind.dtype, shape)
            return True
        operands = [self.operand(name, len(kind.shape), joined) for name in node.inputs]
        if None in operands:
            return False
        attrs = {**node.attrs, "size": shape} if node.op == _EXPAND else dict(node.attrs)
        inputs = [name for name in operands if name is not None]
        if joined:
            same = node.op == _EXPAND and same_shape(self.shapes[inputs[0]], shape)
            self.nodes.append(Node(_VIEW if same else node.op, tuple(inputs), node.outputs, attrs))
        else:
            self.lifted[node.name] = self.emit(node.op, inputs, kind.dtype, shape, attrs)
        return True

    def run(self) -> Graph | None:
        for node in self.graph.nodes:
            if _is_count(node):
                dtype = node.outputs[0].type.dtype
                same = dtype == self.graph.type_of(self.positions).dtype
                cast = self.positions if same else self.emit("aten._to_copy.default", [self.positions], dtype, ("B", "T"), {"dtype": dtype})
                self.lifted[node.name] = cast
            elif not any(name in self.lifted for name in node.inputs):
                self.nodes.append(node)
            elif len(node.outputs) != 1 or not self.node(node):
                return None
        return None if any(name in self.lifted for name in self.graph.outputs) else self.graph.with_nodes(self.nodes)


def count_by_positions(graph: Graph, positions: str = "positions") -> Graph:
    """The graph with counted tokens replaced by their positions, or the graph itself where that is not possible.

    Args:
        graph: a graph in normal form.
        positions: the input [B, T] that holds the tokens' places in their sequences, from 0.
    """
    if positions not in {v.name for v in graph.inputs} or graph.type_of(positions).shape != ("B", "T"):
        return graph
    if not any(map(_is_count, graph.nodes)):
        return graph
    return _Lifting(graph, positions).run() or graph
