"""Tokens that are counted from the start of a call are read from their positions instead: the same from 0, and right later on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moec.compiler.frontend.normalize import normalize
from moec.compiler.frontend.positions import count_by_positions
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Graph
from moec.compiler.text import parse_graph
from moec.compiler.verify import verify

HEAD = "  input %x: f32[B, T, 4]\n  input %positions: i64[B, T]\n"
COUNT = """
  %n: i64[T] = aten.arange.start_step() {start=0, end="T", step=1, dtype="i64"}
  %f: f32[T] = aten._to_copy.default(%n) {dtype="f32"}
"""
BODIES = {
    "view": '  %l: f32[T] = aten.log1p.default(%f)\n  %v: f32[1, T, 1] = aten.view.default(%l) {size=[1, "T", 1]}\n'
            '  %y: f32[B, T, 4] = aten.mul.Tensor(%x, %v)\n',
    "expand": '  %v: f32[1, T, 1] = aten.view.default(%f) {size=[1, "T", 1]}\n'
              '  %e: f32[B, T, 1] = aten.expand.default(%v) {size=["B", "T", 1]}\n  %y: f32[B, T, 4] = aten.add.Tensor(%x, %e)\n',
    "short": '  %v: f32[T, 1] = aten.view.default(%f) {size=["T", 1]}\n  %s: f32[T, 1] = aten.mul.Tensor(%v, %v)\n'
             '  %y: f32[B, T, 4] = aten.sub.Tensor(%x, %s)\n',
}  # fmt: skip
MASK = """
  %q: i64[T, 1] = aten.view.default(%n) {size=["T", 1]}
  %k: i64[1, T] = aten.view.default(%n) {size=[1, "T"]}
  %m: bool[T, T] = aten.ge.Tensor(%q, %k)
  %i: f32[T, T] = aten._to_copy.default(%m) {dtype="f32"}
  %y: f32[B, T, 4] = aten.matmul.default(%i, %x)
"""


class NoWeights:
    def load(self, name: str, expert: int | None = None) -> Tensor:
        raise AssertionError(name)


def made(body: str) -> Graph:
    graph = parse_graph(f"graph test {{\n{HEAD}{COUNT}{body}  return %y\n}}\n")
    verify(graph)
    return graph


def run(graph: Graph, x: Tensor, positions: Tensor) -> Tensor:
    result: Tensor = Interpreter(graph, NoWeights())(x=x, positions=positions)[0]
    return result


@pytest.mark.parametrize("body", BODIES.values(), ids=list(BODIES))
def test_a_count_becomes_positions(body: str) -> None:
    before = made(body)
    after = normalize(before, count_by_positions).graph
    verify(after)
    assert not any("arange" in n.op for n in after.nodes)
    x, places = torch.randn(2, 9, 4), torch.arange(9).expand(2, 9)
    whole = run(before, x, places)
    torch.testing.assert_close(run(after, x, places), whole, rtol=0, atol=0)
    torch.testing.assert_close(run(after, x[:, 5:], places[:, 5:]), whole[:, 5:], rtol=0, atol=0)  # as a cache continues


def test_a_mask_of_queries_and_keys_stays() -> None:
    graph = made(MASK)
    assert count_by_positions(graph) is graph
