"""What the TVM backend does with a graph before any code is made: row selection, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from moec.compiler.backends.select_rows import select_rows
from moec.compiler.backends.tokenwise import check_tokenwise, is_tokenwise
from moec.compiler.backends.tvm.backend import TvmBackend
from moec.compiler.errors import MoecError
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Node
from moec.compiler.text import parse_graph, print_node
from moec.targets import get_target
from tests.graphs import moe, random_weights

NODES = """
graph nodes {
  input %ids: i64[B, T]
  input %x: f32[B, T, 6]
  param @w: f32[6, 6] as f32
  RESULT
}
"""


def one(node: str) -> tuple[Node, bool]:
    """A node on its own, and whether it treats each token by itself."""
    graph = parse_graph(NODES.replace("RESULT", f"{node}\n  return %y"))
    return graph.nodes[-1], is_tokenwise(graph, graph.nodes[-1])


@pytest.mark.parametrize(
    "node",
    [
        "%y: f32[B, T, 6] = aten.mul.Tensor(%x, %x)",
        "%y: f32[B, T] = aten.sum.dim_IntList(%x) {dim=[-1]}",
        "%y: f32[B, 6, T] = aten.permute.default(%x) {dims=[0, 2, 1]}",
        '%y: f32[B*T, 6] = aten.view.default(%x) {size=["B*T", 6]}',
        "%y: f32[B, T, 6] = aten.matmul.default(%x, @w)",
        "%y: f32[B, T, 6] = aten.cumsum.default(%x) {dim=2}",
        "%y: f32[B, T, 3] = aten.slice.Tensor(%x) {dim=2, start=0, end=3}",
        '%y: f32[B, T, 4] = aten.full.default() {size=["B", "T", 4], fill_value=2.0, dtype="f32"}',
        '%y: f32[B, 6*T] = aten.view.default(%x) {size=["B", "6*T"]}',
        "%y: i64[6] = aten.arange.default() {end=6}",
    ],
)
def test_token_wise(node: str) -> None:
    assert one(node)[1]


@pytest.mark.parametrize(
    "node",
    [
        "%y: f32[B, T, 6] = aten.cumsum.default(%x) {dim=1}",
        "%y: f32[B, 6] = aten.sum.dim_IntList(%x) {dim=[1]}",
        "%y: f32[B, T, 6] = aten.flip.default(%x) {dims=[1]}",
        "%y: f32[B, T, 6] = aten._softmax.default(%x) {dim=1, half_to_float=false}",
        '%y: i64[T] = aten.arange.default() {end="T"}',
        '%y: f32[B, T, 6] = aten.mul.Tensor(%x) {other="T"}',
        "%z: f32[B, 6, T] = aten.permute.default(%x) {dims=[0, 2, 1]}\n  %y: f32[B, T, T] = aten.bmm.default(%x, %z)",
    ],
)
def test_not_token_wise(node: str) -> None:
    assert not one(node)[1]


def test_mixing_tokens_is_refused_by_name() -> None:
    graph = parse_graph(NODES.replace("RESULT", "%y: f32[B, T, 6] = aten.cumsum.default(%x) {dim=1}\n  return %y"))
    with pytest.raises(MoecError, match=r"1 nodes mix tokens.*recurrent state.*%y: f32\[B, T, 6\] = aten.cumsum"):
        check_tokenwise(graph)


def test_rows_are_selected_before_the_last_norm() -> None:
    graph = select_rows(moe())
    assert [print_node(graph, node) for node in graph.nodes[-3:]] == [
        "%h2_rows: f32[B, R, 16] = aten.index_select.default(%h2, %rows) {dim=1}",
        "%n2: f32[B, R, 16] = rms_norm(%h2_rows, @norm.weight) {eps=1e-05}",
        "%out: f32[B, R, 40] = linear(%n2, @embed.weight)",
    ]


def test_selected_rows_are_those_of_all() -> None:
    graph, weights = moe(), random_weights(moe())
    ids, positions = torch.randint(0, 40, (1, 9)), torch.arange(9)[None]
    (everything,) = Interpreter(graph, weights)(ids=ids, positions=positions)
    rows = torch.tensor([8, 2], dtype=torch.int32)
    (chosen,) = Interpreter(select_rows(graph), weights)(ids=ids, positions=positions, rows=rows)
    torch.testing.assert_close(chosen, everything[:, [8, 2]])


def test_unknown_ops_are_named_at_once() -> None:
    graph = parse_graph(
        NODES.replace("RESULT", "%a: f32[B, T, 6] = aten.lgamma.default(%x)\n  %y: f32[B, T, 6] = aten.digamma.default(%a)\n  return %y")
    )
    with pytest.raises(MoecError, match=r"no lowering for aten.digamma.default, aten.lgamma.default, first in: %a"):
        TvmBackend(graph, get_target("cpu"))


def test_other_inputs_are_refused() -> None:
    graph = parse_graph(NODES.replace("RESULT", "%y: f32[B, T, 6] = aten.mul.Tensor(%x, %x)\n  return %y"))
    with pytest.raises(MoecError, match="expected the inputs ids and positions"):
        TvmBackend(graph, get_target("cpu"))
