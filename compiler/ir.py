"""The graph IR: a small SSA form at the level at which Mixture-of-Experts decisions are taken.

A `Graph` is a list of nodes in execution order. A node reads values and parameters by name and defines new values. Names are
unique within a graph, everything is immutable, and edits make new objects (`dataclasses.replace`, `Graph.with_nodes`).

    graph tiny {
      input %ids: i64[B, T]
      param @embed: f32[4096, 192] as bf16
      %h: f32[B, T, 192] = embedding(%ids, @embed)
      return %h
    }

Ops are of two kinds: the semantic ops of `moec.compiler.ops` (`linear`, `rms_norm`, `attention`, `router`, `experts`, ...)
and `aten.*` (core ATen overloads), whose tensor arguments are the node's inputs and whose other arguments are its attributes,
under the names of the ATen schema.

Axes: B sequences, T tokens of a sequence, E experts, K experts per token, D hidden size, F expert intermediate size.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import networkx as nx

from moec.compiler.errors import MoecError

Dim = int | str
"""A dimension: a number, or an expression over the graph's symbols such as `"T"` or `"B*T"`."""

Attr = Any
"""An attribute: None, bool, int, float, str, or a tuple of attributes."""

DTYPES = ("f32", "f16", "bf16", "f64", "i64", "i32", "i16", "i8", "u8", "bool")
"""Element types. `f32` in a value's type stands for the float type in which the graph is computed."""

_BINARY: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


@lru_cache(maxsize=4096)
def _parse_dim(expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise MoecError(f"dimension {expression!r} is not an expression of symbols and integers") from error


def dim_value(dim: Dim, symbols: Mapping[str, int]) -> int:
    """The value of a dimension under an assignment of the symbols.

    >>> dim_value("2*T + 1", {"T": 3})
    7
    """
    if isinstance(dim, int):
        return dim

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(int(number)):
                return number
            case ast.Name(name) if name in symbols:
                return symbols[name]
            case ast.UnaryOp(ast.USub(), operand):
                return -value(operand)
            case ast.BinOp(left, op, right) if type(op) in _BINARY:
                return _BINARY[type(op)](value(left), value(right))
            case ast.Call(ast.Name(("Max" | "Min") as name), args):
                return (max if name == "Max" else min)(value(a) for a in args)
        raise MoecError(f"dimension {dim!r} cannot be evaluated with the symbols {sorted(symbols)}")

    return value(_parse_dim(dim))


def dim_symbols(dim: Dim) -> set[str]:
    """The symbols that occur in a dimension."""
    if isinstance(dim, int):
        return set()
    return {n.id for n in ast.walk(_parse_dim(dim)) if isinstance(n, ast.Name)} - {"Max", "Min"}


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape of a tensor."""

    dtype: str
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Value:
    """A named tensor: a graph input or the result of a node."""

    name: str
    type: TensorType


@dataclass(frozen=True, slots=True)
class Param:
    """A weight: its name in the model, its type, and the weight format in which an artifact stores it.

    `format` is the name of a format in `moec.runtime.formats` (`bf16`, `int4_g64`, ...), or one name an expert (axis 0).
    """

    name: str
    type: TensorType
    format: str | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. `inputs` are names of values and parameters; `""` stands for an absent optional input."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[Value, ...]
    attrs: Mapping[str, Attr] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the first output."""
        return self.outputs[0].name

    def has(self, position: int) -> bool:
        """Whether an optional input is there."""
        return position < len(self.inputs) and bool(self.inputs[position])


@dataclass(frozen=True)
class Graph:
    """A function from inputs to outputs, in static single assignment form.

    Args:
        name: the model's name.
        inputs: the arguments.
        params: the weights, by name.
        nodes: the operations, each after those whose results it reads.
        outputs: names of the results.
        meta: facts about the model that no node states (`context_length`, `vocab_size`, `eos_token_id`, ...).
    """

    name: str
    inputs: tuple[Value, ...]
    params: Mapping[str, Param]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    meta: Mapping[str, Attr] = field(default_factory=dict)

    @cached_property
    def values(self) -> dict[str, Value]:
        """Every value by name, the inputs first."""
        return {v.name: v for v in (*self.inputs, *(o for n in self.nodes for o in n.outputs))}

    @cached_property
    def producers(self) -> dict[str, Node]:
        """The node that defines each value (inputs have none)."""
        return {o.name: n for n in self.nodes for o in n.outputs}

    @cached_property
    def users(self) -> dict[str, tuple[Node, ...]]:
        """The nodes that read each value or parameter."""
        users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                users.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in users.items()}

    @cached_property
    def symbols(self) -> tuple[str, ...]:
        """The symbolic dimensions of the inputs, in order of appearance."""
        return tuple(dict.fromkeys(s for v in self.inputs for d in v.type.shape for s in sorted(dim_symbols(d))))

    def type_of(self, name: str) -> TensorType:
        """The type of a value or parameter."""
        if (param := self.params.get(name)) is not None:
            return param.type
        if (value := self.values.get(name)) is not None:
            return value.type
        raise MoecError(f"graph {self.name}: no value or parameter is called {name!r}")

    def with_nodes(self, nodes: Iterable[Node], outputs: Sequence[str] | None = None) -> Graph:
        """This graph with other nodes (and outputs), without the nodes and parameters that no result depends on."""
        outputs = tuple(self.outputs if outputs is None else outputs)
        needed, kept = set(outputs), []
        for node in reversed(tuple(nodes)):
            if any(o.name in needed for o in node.outputs):
                kept.append(node)
                needed.update(node.inputs)
        params = {name: p for name, p in self.params.items() if name in needed}
        return replace(self, nodes=tuple(reversed(kept)), outputs=outputs, params=params)

    def with_params(self, params: Iterable[Param]) -> Graph:
        """This graph with the given parameters added or replaced."""
        return replace(self, params={**self.params, **{p.name: p for p in params}})

    def fresh(self, stem: str, taken: set[str] | None = None) -> str:
        """A name that nothing in the graph (nor `taken`) has."""
        names = {*self.values, *self.params, *(taken or ())}
        return next(n for n in (stem, *(f"{stem}_{i}" for i in range(1, len(names) + 2))) if n not in names)

    def to_networkx(self) -> nx.DiGraph:
        """The data flow as a directed graph whose vertices are value and parameter names.

        A vertex has the attributes `kind` (`input`, `param`, `op`) and `node` (for `op`).
        """
        flow = nx.DiGraph(name=self.name)
        flow.add_nodes_from((v.name, {"kind": "input"}) for v in self.inputs)
        flow.add_nodes_from((p, {"kind": "param"}) for p in self.params)
        for node in self.nodes:
            for output in node.outputs:
                flow.add_node(output.name, kind="op", node=node)
                flow.add_edges_from((name, output.name) for name in node.inputs if name)
        return flow
