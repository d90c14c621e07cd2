"""The table of ATen operators: one graph that uses them all, against the interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from moec.compiler.text import parse_graph
from moec.compiler.verify import verify
from moec.compiler.weights import MemoryWeights
from tests.compiler.backends.tvm_model import Compiled

# Each line defines a value; those that end in _ and those that are not f32[B, T, n] are only inputs of others.
OPS = """
%a: f32[B, T, 6] = aten.add.Tensor(%x, %y) {alpha=2}
%a1: f32[B, T, 6] = aten.add.Tensor(%x) {other=1.5}
%a2: f32[B, T, 6] = aten.mul.Tensor(%x, @w)
%a3: f32[B, T, 6] = aten.sub.Tensor(%x, %a)
%a4: f32[B, T, 6] = aten.div.Tensor(%x, %s)
%a5: f32[B, T, 6] = aten.neg.default(%x)
%s: f32[B, T, 6] = aten.sigmoid.default(%x)
%b1: f32[B, T, 6] = aten.silu.default(%x)
%b2: f32[B, T, 6] = aten.gelu.default(%x) {approximate="tanh"}
%b3: f32[B, T, 6] = aten.gelu.default(%x)
%b4: f32[B, T, 6] = aten.tanh.default(%x)
%b5: f32[B, T, 6] = aten.exp.default(%x)
%b6: f32[B, T, 6] = aten.rsqrt.default(%s)
%b7: f32[B, T, 6] = aten.pow.Tensor_Scalar(%x) {exponent=2}
%b8: f32[B, T, 6] = aten.clamp.default(%x) {min=-0.5, max=0.5}
%b9: f32[B, T, 6] = aten.relu.default(%x)
%ba: f32[B, T, 6] = aten.cos.default(%x)
%bb: f32[B, T, 6] = aten.reciprocal.default(%s)
%bc: f32[B, T, 6] = aten.log.default(%s)
%bd: f32[B, T, 6] = aten.abs.default(%x)
%bf: f32[B, T, 6] = aten.log1p.default(%s)
%be: f32[B, T, 6] = aten.maximum.default(%x, %y)
%c_: bool[B, T, 6] = aten.gt.Tensor(%x, %y)
%c1_: bool[B, T, 6] = aten.ge.Scalar(%x) {other=0.25}
%c2_: bool[B, T, 6] = aten.logical_and.default(%c_, %c1_)
%c3_: bool[B, T, 6] = aten.logical_not.default(%c2_)
%c4: f32[B, T, 6] = aten.where.self(%c_, %x, %y)
%c5: f32[B, T, 6] = aten.masked_fill.Scalar(%x, %c3_) {value=-2.0}
%c6: f32[B, T, 6] = aten._to_copy.default(%c2_) {dtype="f32"}
%d1: f32[B, T, 1] = aten.sum.dim_IntList(%x) {dim=[-1], keepdim=true}
%d2: f32[B, T, 1] = aten.mean.dim(%x) {dim=[-1], keepdim=true}
%d3: f32[B, T, 1] = aten.amax.default(%x) {dim=[-1], keepdim=true}
%d4: f32[B, T, 6] = aten._softmax.default(%x) {dim=-1, half_to_float=false}
%d5: f32[B, T, 6] = aten.cumsum.default(%x) {dim=-1}
%d6: f32[B, T, 6] = aten.div.Tensor(%x, %d1)
%v_: f32[B, T, 2, 3] = aten.view.default(%x) {size=["B", "T", 2, 3]}
%v1_: f32[B, 2, T, 3] = aten.permute.default(%v_) {dims=[0, 2, 1, 3]}
%v2_: f32[B, 2, T, 3] = aten.mul.Tensor(%v1_) {other=3.0}
%v3_: f32[B, T, 2, 3] = aten.permute.default(%v2_) {dims=[0, 2, 1, 3]}
%v4: f32[B, T, 6] = aten.view.default(%v3_) {size=["B", "T", 6]}
%v5: f32[B, T, 3] = aten.select.int(%v_) {dim=2, index=-1}
%v6: f32[B, T, 2] = aten.slice.Tensor(%x) {dim=-1, start=1, end=3}
%v7: f32[B, T, 3], %v8: f32[B, T, 3] = aten.split.Tensor(%x) {split_size=3, dim=-1}
%v9_: f32[B*T, 6] = aten.view.default(%x) {size=["B*T", 6]}
%va_: f32[B*T, 4] = aten.mm.default(%v9_, @m)
%vb: f32[B, T, 4] = aten.view.default(%va_) {size=["B", "T", 4]}
%vc_: f32[B, T, 6, 1] = aten.unsqueeze.default(%x) {dim=-1}
%vd_: f32[B, T, 6, 2] = aten.expand.default(%vc_) {size=[-1, -1, 6, 2]}
%ve: f32[B, T, 6] = aten.select.int(%vd_) {dim=3, index=1}
%vf: f32[B, T, 12] = aten.cat.default(%x, %y) {tensors=2, dim=-1}
%t: f32[B, T, 2], %ti_: i64[B, T, 2] = aten.topk.default(%x) {k=2, dim=-1}
%t1: f32[B, T, 2] = aten.gather.default(%y, %ti_) {dim=2}
%t2: f32[B, T, 2] = aten._to_copy.default(%ti_) {dtype="f32"}
%t3: f32[B, T, 6] = aten.scatter.src(%x, %ti_, %t1) {dim=2}
%t4: f32[B, T, 6] = aten.scatter.value(%x, %ti_) {dim=2, value=0.0}
%f0: f32[B, T, 6] = aten.full.default() {size=["B", "T", 6], fill_value=1.5, dtype="f32"}
%f1_: i64[6] = aten.arange.start_step() {start=1, end=7, dtype="i64"}
%f2_: f32[6] = aten._to_copy.default(%f1_) {dtype="f32"}
%f3: f32[B, T, 6] = aten.mul.Tensor(%x, %f2_)
%f4: f32[B, T, 6] = aten.zeros_like.default(%x)
%p: f32[B, T] = aten._to_copy.default(%positions) {dtype="f32"}
%p1: f32[B, T, 1] = aten.unsqueeze.default(%p) {dim=-1}
"""

GRAPH = """
graph table {vocab_size=WIDTH, context_length=64} {
  input %ids: i64[B, T]
  input %positions: i64[B, T]
  param @e: f32[40, 6] as f32
  param @f: f32[40, 6] as f32
  param @w: f32[6] as f32
  param @m: f32[6, 4] as f32
  %x: f32[B, T, 6] = embedding(%ids, @e)
  %y: f32[B, T, 6] = embedding(%ids, @f)
  OPS
  return %all
}
"""


def test_every_operator(tmp_path: Path) -> None:
    lines = OPS.strip().splitlines()
    order = [line for line in lines if line.startswith("%s:")] + [line for line in lines if not line.startswith("%s:")]
    results = [(r.split(":")[0], int(r.split(",")[-1].rstrip("] "))) for line in order for r in definitions(line)]
    names, widths = [n for n, _ in results], [w for _, w in results]
    joined = f"%all: f32[B, T, {sum(widths)}] = aten.cat.default({', '.join(names)}) {{tensors={len(names)}, dim=-1}}"
    text = GRAPH.replace("WIDTH", str(sum(widths))).replace("OPS", "\n  ".join([*order, joined]))
    graph = parse_graph(text)
    verify(graph)
    generator = torch.Generator().manual_seed(0)
    shapes = {"e": (40, 6), "f": (40, 6), "w": (6,), "m": (6, 4)}
    weights = MemoryWeights({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})
    model = Compiled(graph, weights, tmp_path)
    for length in (9, 1):
        ids = np.random.default_rng(length).integers(0, 40, length)
        found, expected = model.logits(ids), model.expected(ids)
        edges = np.cumsum(widths)[:-1]
        for name, a, b in zip(names, np.split(found, edges, 1), np.split(expected, edges, 1), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4, err_msg=name)


def definitions(line: str) -> list[str]:
    """The results of a line that are f32 streams of numbers."""
    left = line.split(" = ", maxsplit=1)[0]
    parts = left.replace("], %", "]; %").split("; ")
    return [p for p in parts if ": f32[B, T, " in p and p.count(",") == 2 and not p.split(":")[0].endswith("_")]
