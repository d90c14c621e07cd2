"""The engine that rewrites a traced graph into normal form.

Nodes are visited once, in execution order. Each is offered to the rules of its op; a rule returns the names of values that stand
for the node's results (it may emit new nodes, which are offered to the rules themselves) or None to decline. Equal nodes become
one. So rules look backwards only, every node that a rule sees has rewritten inputs, and one visit reaches the fixed point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from moec.compiler.ir import Attr, Dim, Graph, Node, Param, TensorType, Value, dim_value
from moec.compiler.text import format_attr

Result = str | tuple[str, ...] | None
Rule = Callable[["Rewriter", Node], Result]
Rules = Mapping[str, Sequence[Rule]]
"""Rules by the op of the node that they replace, tried in order."""

_POINTS = (({"B": 10007, "T": 8219}, 1009), ({"B": 523, "T": 7919}, 4001))


@lru_cache(maxsize=65536)
def dim_key(dim: Dim) -> tuple[int, ...]:
    """Numbers that tell dimensions apart: the values at a few points. Equal expressions have equal keys however written."""
    if isinstance(dim, int):
        return (dim,) * len(_POINTS)
    return tuple(dim_value(dim, AnySize(*point)) for point in _POINTS)


class AnySize(dict[str, int]):
    """Values for some symbols, and one that depends on the name for any other."""

    def __init__(self, values: Mapping[str, int], other: int) -> None:
        super().__init__(values)
        self.other = other

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return self.other + sum(map(ord, name)) % 64


def same_shape(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Whether two shapes are equal for all values of the symbols."""
    return len(a) == len(b) and all(dim_key(x) == dim_key(y) for x, y in zip(a, b, strict=True))


class Rewriter:
    """A graph under construction, and what rules may ask and do.

    Attributes:
        params: the parameters; a rule may replace one (with a layout that the weight source applies).
        layouts: what the weight source does to a parameter before the graph sees it.
        values: real values of constants, where they are known.
        misses: (node name, reason) of rules that nearly applied.
    """

    def __init__(self, graph: Graph, rules: Rules) -> None:
        self.graph, self.rules = graph, rules
        self.params: dict[str, Param] = dict(graph.params)
        self.layouts: dict[str, Any] = {}
        self.misses: list[tuple[str, str]] = []
        self._types = {v.name: v.type for v in graph.inputs}
        self._made: dict[str, Node] = {}
        self._nodes: list[Node] = []
        self._equal: dict[tuple[Any, ...], tuple[str, ...]] = {}
        self._taken = {*graph.values, *graph.params}
        self._count = 0

    # What rules ask.

    def type(self, name: str) -> TensorType:
        """The type of a value or parameter."""
        return self.params[name].type if name in self.params else self._types[name]

    def shape(self, name: str) -> tuple[Dim, ...]:
        """The shape of a value or parameter."""
        return self.type(name).shape

    def made(self, name: str, op: str = "") -> Node | None:
        """The node that makes a value, if its op is `op` (or any)."""
        node = self._made.get(name)
        return node if node is not None and (not op or node.op == op) else None

    def is_param(self, name: str) -> bool:
        return name in self.params

    # What rules do.

    def emit(self, op: str, inputs: Sequence[str], kind: TensorType, /, **attrs: Attr) -> str:
        """A node with one result; returns the name of a value that stands for it."""
        return self.emit_all(op, inputs, (kind,), attrs)[0]

    def emit_all(
        self, op: str, inputs: Sequence[str], kinds: Sequence[TensorType], attrs: Mapping[str, Attr], names: Sequence[str] = ()
    ) -> tuple[str, ...]:
        """A node with any number of results."""
        key = (op, *inputs, *(f"{k}={format_attr(v)}" for k, v in sorted(attrs.items())), *map(str, kinds))
        if (known := self._equal.get(key)) is not None:
            return known
        node = Node(op, tuple(inputs), tuple(map(Value, names or self._fresh(op, len(kinds)), kinds)), dict(attrs))
        for rule in self.rules.get(op, ()):
            if (found := rule(self, node)) is not None:
                result = (found,) if isinstance(found, str) else found
                break
        else:
            result = tuple(o.name for o in node.outputs)
            self._nodes.append(node)
            for output in node.outputs:
                self._made[output.name], self._types[output.name] = node, output.type
        self._equal[key] = result
        return result

    def decline(self, node: Node, reason: str) -> None:
        """Note why a rule that nearly applied does not."""
        self.misses.append((node.name, reason))

    def _fresh(self, op: str, count: int) -> list[str]:
        stem = op.split(".")[1] if "." in op else op
        names: list[str] = []
        while len(names) < count:
            self._count += 1
            if (name := f"{stem}.{self._count}") not in self._taken:
                names.append(name)
        return names

    # The visit.

    def run(self) -> Graph:
        """Visit every node; returns the rewritten graph."""
        names: dict[str, str] = {}
        for node in self.graph.nodes:
            inputs = [names.get(name, name) for name in node.inputs]
            kinds, stated = [o.type for o in node.outputs], [o.name for o in node.outputs]
            names.update(zip(stated, self.emit_all(node.op, inputs, kinds, node.attrs, stated), strict=True))
        graph = self.graph.with_params(self.params.values())
        return graph.with_nodes(self._nodes, [names.get(name, name) for name in self.graph.outputs])


def rewrite(graph: Graph, rules: Rules) -> Graph:
    """The graph after one visit with these rules."""
    return Rewriter(graph, rules).run()


def merge(*rules: Rules) -> dict[str, tuple[Rule, ...]]:
    """All rules together; for one op, those of earlier arguments come first."""
    merged: dict[str, tuple[Rule, ...]] = {}
    for part in rules:
        for op, of_op in part.items():
            merged[op] = (*merged.get(op, ()), *of_op)
    return merged


def both_orders(node: Node) -> Iterator[tuple[str, str]]:
    """The two operands of a commutative node, in both orders (none if one operand is a number)."""
    if len(node.inputs) == 2 and "other" not in node.attrs and "self" not in node.attrs:
        yield node.inputs[0], node.inputs[1]
        yield node.inputs[1], node.inputs[0]
