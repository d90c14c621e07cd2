"""The IR: dimensions, text, verifier."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph, Node, Param, TensorType, Value, dim_symbols, dim_value
from moec.compiler.text import parse_graph, print_graph
from moec.compiler.verify import VerifyError, verify
from tests import graphs

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,5}(\.[a-z0-9_]{1,4}){0,2}", fullmatch=True)
ATTRS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)
DIMS = st.integers(0, 1 << 40) | st.sampled_from(["B", "T", "B*T", "2*T + 1", "(T + 3)//4"])
TYPES = st.builds(TensorType, st.sampled_from(["f32", "i64", "bool"]), st.lists(DIMS, max_size=4).map(tuple))


@st.composite
def any_graph(draw: st.DrawFn) -> Graph:
    """A graph that prints, though it need not mean anything."""
    names = draw(st.lists(NAMES, min_size=4, max_size=10, unique=True))
    inputs = (Value(names[0], draw(TYPES)),)
    formats = st.sampled_from(["bf16", "int4_g64"]) | st.lists(st.sampled_from(["f32", "int2_g32"]), min_size=1).map(tuple)
    params = {names[1]: Param(names[1], draw(TYPES), draw(formats))}
    nodes = []
    for name in names[2:]:
        attrs = draw(st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), ATTRS, max_size=3))
        operands = draw(st.lists(st.sampled_from([names[0], names[1], ""]), max_size=3))
        nodes.append(Node(draw(st.sampled_from(["linear", "aten.add.Tensor"])), tuple(operands), (Value(name, draw(TYPES)),), attrs))
    meta = draw(st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), ATTRS, max_size=3))
    return Graph("g", inputs, params, tuple(nodes), (names[-1],), meta)


@given(any_graph())
def test_text_round_trips(graph: Graph) -> None:
    assert parse_graph(print_graph(graph)) == graph


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("graph g { return %x", "expected ,, found 'end of text'"),
        ("graph g { input %x: f99[T] return %x }", "unknown element type 'f99'"),
        ("graph g {\n input %x: f32[T]\n %y: f32[T] = relu(x)\n return %y }", "line 3: expected ref, found 'x'"),
        ("graph g { input %x: f32[T] ~", "unexpected character '~'"),
    ],
)
def test_parser_says_where(text: str, message: str) -> None:
    with pytest.raises(MoecError, match=message.replace("'", ".")):
        parse_graph(text)


def test_dimensions() -> None:
    symbols = {"B": 3, "T": 10}
    assert [dim_value(d, symbols) for d in (7, "T", "B*T", "2*T + 1", "(T + 3)//4", "-B + T", "Max(B, T)")] == [7, 10, 30, 21, 3, 7, 10]
    assert dim_symbols("B*T + Max(1, T)") == {"B", "T"}
    with pytest.raises(MoecError, match="symbols"):
        dim_value("S", symbols)


def test_dead_nodes_and_parameters_go() -> None:
    graph = graphs.moe()
    cut = graph.with_nodes(graph.nodes, ["h1"])
    assert cut.nodes[-1].name == "h1"
    assert "layers.0.experts.up" not in cut.params
    verify(cut)


def test_networkx_view() -> None:
    flow = graphs.moe().to_networkx()
    assert nx.is_directed_acyclic_graph(flow)
    assert nx.has_path(flow, "layers.0.gate.weight", "out")
    assert flow.nodes["w"]["node"].op == "router"


def _broken(**changes: Node) -> Graph:
    graph = graphs.moe()
    return replace(graph, nodes=tuple(changes.get(n.name, n) for n in graph.nodes))


def test_verifier_accepts_and_rejects() -> None:
    graph = graphs.moe()
    verify(graph)
    node = graph.producers["q"]
    cases = {
        "not defined before": replace(node, inputs=("out", "layers.0.q.weight")),
        "is defined twice": replace(node, outputs=(Value("h", node.outputs[0].type),)),
        "is stated as": replace(node, outputs=(Value("q", TensorType("f32", ("B", "T", 15))),)),
        "the op rejects its inputs": replace(node, inputs=("n", "layers.0.experts.down")),
        "neither a semantic op": replace(node, op="aten.no_such_op.default"),
    }
    for message, broken in cases.items():
        with pytest.raises((VerifyError, MoecError), match=message):
            verify(_broken(q=broken))


def test_verifier_shows_the_graph() -> None:
    node = graphs.moe().producers["q"]
    with pytest.raises(VerifyError) as error:
        verify(_broken(q=replace(node, inputs=("out", "layers.0.q.weight"))))
    assert "# ^ 'out' is not defined before this node" in error.value.__notes__[0]


def test_verifier_checks_formats() -> None:
    graph = graphs.moe()
    with pytest.raises(MoecError, match=r"int<bits>_g<group>"):
        verify(graph.with_params([replace(graph.params["embed.weight"], format="int9_g64")]))
    with pytest.raises(VerifyError, match="2 formats for the 6 experts"):
        verify(graph.with_params([replace(graph.params["layers.0.experts.up"], format=("bf16", "f32"))]))
