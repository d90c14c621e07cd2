"""The text form of a graph: `print_graph` and `parse_graph` are inverse to each other.

graph olmoe {context_length=512} {
  input %ids: i64[B, T]
  param @lm_head.weight: f32[4096, 192] as bf16
  %h: f32[B, T, 192] = embedding(%ids, @lm_head.weight)
  %w: f32[B, T, 2], %i: i64[B, T, 2] = router(%logits) {top_k=2, score="softmax"}
  return %h
}
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moec.compiler.errors import MoecError
from moec.compiler.ir import DTYPES, Attr, Dim, Graph, Node, Param, TensorType, Value

_TOKEN = re.compile(
    r"""\s+|\#[^\n]*|(?P<string>"(?:[^"\\]|\\.)*")|(?P<ref>[%@][\w.$:/-]+)
    |(?P<number>-?(?:inf|nan|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\b)|(?P<word>[A-Za-z_][\w.]*)|(?P<sign>[(){}\[\],:=+*/-])""",
    re.VERBOSE,
)


def format_attr(attr: Attr) -> str:
    """An attribute as text."""
    if isinstance(attr, (tuple, list)):
        return f"[{', '.join(map(format_attr, attr))}]"
    if isinstance(attr, str):
        return '"' + attr.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    if isinstance(attr, bool) or attr is None:
        return str(attr).lower()
    return repr(attr)


def _attrs(attrs: Mapping[str, Attr]) -> str:
    return "{" + ", ".join(f"{name}={format_attr(value)}" for name, value in attrs.items()) + "}" if attrs else ""


def _operand(graph: Graph, name: str) -> str:
    return "_" if not name else f"@{name}" if name in graph.params else f"%{name}"


def print_node(graph: Graph, node: Node) -> str:
    """One node as a line of text."""
    results = ", ".join(f"%{o.name}: {o.type}" for o in node.outputs)
    inputs = ", ".join(_operand(graph, name) for name in node.inputs)
    return f"{results} = {node.op}({inputs}) {_attrs(node.attrs)}".rstrip()


def print_graph(graph: Graph, notes: Mapping[str, str] | None = None) -> str:
    """The graph as text.

    Args:
        graph: what to print.
        notes: messages to put as comments under the nodes of these names (errors show the graph this way).
    """
    lines = [f"graph {graph.name} {_attrs(graph.meta)}".rstrip() + " {"]
    lines += [f"  input %{v.name}: {v.type}" for v in graph.inputs]
    lines += [f"  param @{p.name}: {p.type} as {_format(p.format)}" for p in graph.params.values()]
    for node in graph.nodes:
        lines.append(f"  {print_node(graph, node)}")
        if notes and node.name in notes:
            lines += [f"  # ^ {line}" for line in notes[node.name].splitlines()]
    lines += [f"  return {', '.join(_operand(graph, name) for name in graph.outputs)}", "}"]
    return "\n".join(lines) + "\n"


def _format(fmt: str | tuple[str, ...]) -> str:
    return fmt if isinstance(fmt, str) else format_attr(fmt)


class _Parser:
    """A recursive-descent parser over the tokens of one graph."""

    def __init__(self, text: str) -> None:
        self.text, self.tokens, position = text, list[tuple[str, str, int]](), 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.error(position, f"unexpected character {text[position]!r}")
            if match.lastgroup:
                self.tokens.append((match.lastgroup, match.group(), position))
            position = match.end()
        self.tokens.append(("end", "end of text", len(text)))
        self.at = 0

    def error(self, position: int, message: str) -> MoecError:
        line = self.text.count("\n", 0, position) + 1
        shown = self.text.splitlines()[line - 1].strip() if self.text.strip() else ""
        return MoecError(f"graph text, line {line}: {message}, in {shown!r}")

    def peek(self, *texts: str) -> bool:
        return self.tokens[self.at][1] in texts

    def take(self, expected: str | None = None, kind: str | None = None) -> str:
        found_kind, found, position = self.tokens[self.at]
        if (expected is not None and found != expected) or (kind is not None and found_kind != kind):
            raise self.error(position, f"expected {expected or kind}, found {found!r}")
        self.at += 1
        return found

    def accept(self, text: str) -> bool:
        if self.peek(text):
            self.at += 1
            return True
        return False

    def attr(self) -> Attr:
        kind, text, position = self.tokens[self.at]
        self.at += 1
        if kind == "string":
            return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], text[1:-1])
        if kind == "number":
            return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
        if text == "[":
            return self.sequence("]", self.attr)
        if text in ("true", "false", "null", "none", "inf", "nan"):
            return {"true": True, "false": False, "inf": float("inf"), "nan": float("nan")}.get(text)
        raise self.error(position, f"expected an attribute, found {text!r}")

    def sequence(self, close: str, item: Any) -> tuple[Any, ...]:
        items = []
        while not self.accept(close):
            items.append(item())
            if not self.peek(close):
                self.take(",")
        return tuple(items)

    def attrs(self) -> dict[str, Attr]:
        def pair() -> tuple[str, Attr]:
            name = self.take(kind="word")
            self.take("=")
            return name, self.attr()

        return dict(self.sequence("}", pair)) if self.accept("{") else {}

    def dim(self) -> Dim:
        # A dimension ends at a comma or bracket outside parentheses; its tokens joined in the printer's spacing.
        parts, depth = [], 0
        while depth or not self.peek(",", "]"):
            kind, text, position = self.tokens[self.at]
            if kind not in ("number", "word", "sign"):
                raise self.error(position, f"expected a dimension, found {text!r}")
            depth += {"(": 1, ")": -1}.get(text, 0)
            parts.append((text, position))
            self.at += 1
        start, end = parts[0][1], parts[-1][1] + len(parts[-1][0])
        expression = self.text[start:end]
        return int(expression) if re.fullmatch(r"-?\d+", expression) else expression

    def type(self) -> TensorType:
        position = self.tokens[self.at][2]
        dtype = self.take(kind="word")
        if dtype not in DTYPES:
            raise self.error(position, f"unknown element type {dtype!r} (one of {', '.join(DTYPES)})")
        self.take("[")
        return TensorType(dtype, self.sequence("]", self.dim))

    def name(self, sigil: str) -> str:
        text = self.take(kind="ref")
        if text[0] != sigil:
            raise self.error(self.tokens[self.at - 1][2], f"expected a name that starts with {sigil}, found {text!r}")
        return text[1:].removesuffix(":")

    def value(self) -> Value:
        # `%name:` may lex as one token, since names may hold colons inside.
        name = self.name("%")
        if not self.tokens[self.at - 1][1].endswith(":"):
            self.take(":")
        return Value(name, self.type())

    def operand(self) -> str:
        return "" if self.accept("_") else self.take(kind="ref")[1:]

    def param(self) -> Param:
        name = self.name("@")
        if not self.tokens[self.at - 1][1].endswith(":"):
            self.take(":")
        param_type = self.type()
        self.take("as")
        fmt = self.attr() if self.peek("[") else self.take(kind="word")
        return Param(name, param_type, fmt)

    def node(self) -> Node:
        outputs = [self.value()]
        while self.accept(","):
            outputs.append(self.value())
        self.take("=")
        op = self.take(kind="word")
        self.take("(")
        inputs = self.sequence(")", self.operand)
        return Node(op, inputs, tuple(outputs), self.attrs())

    def graph(self) -> Graph:
        self.take("graph")
        name = self.take(kind="word")
        # `graph name {` opens the body; `graph name {key=...} {` has facts about the model first.
        has_meta = self.peek("{") and self.tokens[self.at + 2][1] == "="
        meta = self.attrs() if has_meta else {}
        self.take("{")
        inputs, params, nodes = [], [], []
        while not self.accept("return"):
            if self.accept("input"):
                inputs.append(self.value())
            elif self.accept("param"):
                params.append(self.param())
            else:
                nodes.append(self.node())
        outputs = []
        while not self.accept("}"):
            outputs.append(self.operand())
            if not self.peek("}"):
                self.take(",")
        self.take(kind="end")
        return Graph(name, tuple(inputs), {p.name: p for p in params}, tuple(nodes), tuple(outputs), meta)


def parse_graph(text: str) -> Graph:
    """The graph that a text describes.

    Raises:
        MoecError: the text is not a graph; the message has the line.
    """
    return _Parser(text).graph()
