"""Which linear layers the TVM backend for GPUs takes together, and with what in front of them."""

from __future__ import annotations

from moec.compiler.backends.tvm.cuda import CudaPlatform
from moec.compiler.backends.tvm.fusion import Fusion, disjoint
from moec.compiler.backends.tvm.fusions.projections import Projections, match
from moec.compiler.backends.tvm.storage import plan_storage
from moec.compiler.ir import Graph
from moec.compiler.text import parse_graph
from moec.targets import get_target

BLOCK = """
graph block {layers=1, context_length=64, vocab_size=40} {
  input %x: f32[B, T, 16]
  input %y: f32[B, T, 16]
  param @norm: f32[16] as f32
  param @shift: f32[16] as f32
  param @gate: f32[6, 16] as bf16
  param @bias: f32[6] as f32
  param @left: f32[24, 16] as int4_g16
  param @right: f32[24, 16] as int4_g16
  param @last: f32[40, 16] as bf16
  %h: f32[B, T, 16] = aten.add.Tensor(%x, %y)
  %n: f32[B, T, 16] = rms_norm(%h, @norm) {eps=1e-05}
  %logits: f32[B, T, 6] = linear(%n, @gate, @bias)
  %w: f32[B, T, 2], %i: i64[B, T, 2] = router(%logits) {top_k=2, score="softmax"}
  %a: f32[B, T, 24] = linear(%n, @left)
  %b: f32[B, T, 24] = linear(%n, @right)
  %m: f32[B, T, 16] = layer_norm(%h, @norm, @shift) {eps=1e-05}
  %out: f32[B, T, 40] = linear(%m, @last)
  return %out, %w, %a, %b
}
"""


def found_in(graph: Graph) -> list[Projections]:
    platform = CudaPlatform(get_target("h100-sxm"))
    return match(graph, plan_storage(graph, platform), platform.gpu, 1)


def found() -> list[Projections]:
    return found_in(parse_graph(BLOCK))


def names(fusion: Fusion) -> list[str]:
    return [node.name for node in fusion.nodes]


def test_choices_go_from_many_nodes_to_few() -> None:
    assert [names(fusion) for fusion in found()] == [
        ["h", "n", "logits", "a", "b"],
        ["n", "logits", "a", "b"],
        ["logits", "a", "b"],
        ["a", "b"],
        ["m", "out"],
    ]
    assert [names(fusion) for fusion in disjoint(found())] == [["h", "n", "logits", "a", "b"], ["m", "out"]]


def test_what_the_kernel_is_told() -> None:
    first, *_, last = found()
    assert first.spec.norm is not None
    assert (first.spec.norm.residual, first.spec.norm.bias, first.spec.written) == (True, False, False)
    assert [(matrix.layout.format, matrix.bias) for matrix in first.spec.matrices] == [
        ("bf16", True),
        ("int4_g16", False),
        ("int4_g16", False),
    ]
    assert last.spec.norm is not None
    assert (last.spec.norm.center, last.spec.norm.bias, last.spec.norm.residual) == (True, True, False)


def test_a_norm_that_others_read_is_written() -> None:
    graph = parse_graph(BLOCK.replace("return %out", "return %n, %out"))
    first = found_in(graph)[0]
    assert first.spec.written
