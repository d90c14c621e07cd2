"""Every core ATen operator in ONNX Runtime gives what torch gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnxruntime as ort
import pytest
import torch

from moec.compiler.backends.onnx.emit import Emitter
from moec.compiler.backends.onnx.lower import RULES, Lowering
from moec.compiler.backends.onnx.placement import Placement
from moec.compiler.core_aten import CORE_ATEN
from moec.compiler.interpreter import Interpreter
from moec.compiler.ops import OPS
from moec.compiler.text import parse_graph
from moec.compiler.verify import verify
from moec.compiler.weights import MemoryWeights

SAME = "f32[B, T, 4]"

CASES = [
    *(f"{SAME} = aten.{op}.Tensor(%x, %y)" for op in ("add", "sub", "mul", "div", "remainder")),
    *(f"{SAME} = aten.{op}.Tensor(%x) {{other=1.5}}" for op in ("add", "sub", "mul", "div")),
    f"{SAME} = aten.mul.Tensor(%x, %i)",
    f'{SAME} = aten.mul.Tensor(%x) {{other="T"}}',
    "i64[B, T, 4] = aten.add.Tensor(%i) {other=3}",
    "i64[B, T, 4] = aten.remainder.Tensor(%i, %j)",
    "i64[B, T, 4] = aten.floor_divide.default(%i) {other=3}",
    "i64[B, T, 4] = aten.floor_divide.default(%i, %j)",
    f"{SAME} = aten.div.Tensor(%i) {{other=3}}",
    *(f'{SAME} = aten.div.Tensor_mode(%x, %y) {{rounding_mode="{mode}"}}' for mode in ("floor", "trunc")),
    *(f'i64[B, T, 4] = aten.div.Tensor_mode(%i) {{other=3, rounding_mode="{mode}"}}' for mode in ("floor", "trunc")),
    *(f"{SAME} = aten.{op}.default(%x)" for op in ("neg", "abs", "sign", "floor", "exp", "exp2", "expm1", "erf", "sin", "cos", "tanh",
      "sigmoid", "silu", "gelu", "relu", "softplus")),
    *(f"{SAME} = aten.{op}.default(%p)" for op in ("sqrt", "rsqrt", "log", "log1p", "log2")),
    "i64[B, T, 4] = aten.neg.default(%i)",
    f'{SAME} = aten.gelu.default(%x) {{approximate="tanh"}}',
    f"{SAME} = aten.softplus.default(%x) {{beta=2.0}}",
    f"{SAME} = aten.pow.Tensor_Scalar(%x) {{exponent=2}}",
    f"{SAME} = aten.pow.Tensor_Scalar(%p) {{exponent=-1.5}}",
    f"{SAME} = aten.pow.Scalar(%x) {{self=2.0}}",
    f"{SAME} = aten.pow.Tensor_Tensor(%p, %y)",
    *(f"{SAME} = aten.{op}.default(%x, %y)" for op in ("maximum", "minimum")),
    f"{SAME} = aten.clamp.default(%x) {{min=-0.5, max=0.5}}",
    f"{SAME} = aten.clamp.default(%x) {{max=0.5}}",
    "i64[B, T, 4] = aten.clamp.default(%i) {min=0}",
    *(f"bool[B, T, 4] = aten.{op}.Tensor(%i, %j)" for op in ("eq", "ne", "lt", "le", "gt", "ge")),
    *(f"bool[B, T, 4] = aten.{op}.Scalar(%i) {{other=1}}" for op in ("eq", "ne", "lt", "le", "gt", "ge")),
    "bool[B, T, 4] = aten.gt.Scalar(%i) {other=0.5}",
    "bool[B, T, 4] = aten.lt.Tensor(%x, %i)",
    *(f"bool[B, T, 4] = aten.logical_{op}.default(%c, %d)" for op in ("and", "or", "xor")),
    "bool[B, T, 4] = aten.logical_not.default(%c)",
    f"{SAME} = aten.where.self(%c, %x, %y)",
    'i64[B, T, 4] = aten._to_copy.default(%x) {dtype="i64"}',
    'bool[B, T, 4] = aten._to_copy.default(%i) {dtype="bool"}',
    f'{SAME} = aten._to_copy.default(%c) {{dtype="f32"}}',
    'f32[B*T, 4] = aten.view.default(%x) {size=["B*T", 4]}',
    'f32[B, T, 2, 2] = aten.view.default(%x) {size=["B", "T", 2, 2]}',
    'f32[T, B, 4] = aten.view.default(%x) {size=["T", "B", 4]}',
    "f32[T, 4, B] = aten.permute.default(%x) {dims=[1, 2, 0]}",
    'f32[B, T, 4] = aten.expand.default(%row) {size=["B", "T", 4]}',
    "f32[2*B, T, 12] = aten.repeat.default(%x) {repeats=[2, 1, 3]}",
    "f32[2, B, T, 4] = aten.repeat.default(%x) {repeats=[2, 1, 1, 1]}",
    "f32[B, T, 2] = aten.slice.Tensor(%x) {dim=2, start=1, end=4, step=2}",
    'f32[B, T - 1, 4] = aten.slice.Tensor(%x) {dim=1, start=1, end="T", step=1}',
    "f32[B, 4] = aten.select.int(%x) {dim=1, index=-1}",
    "f32[B, T] = aten.select.int(%x) {dim=2, index=1}",
    "f32[B, 2*T, 4] = aten.cat.default(%x, %y) {tensors=2, dim=1}",
    "f32[B, T + 3, 6] = aten.constant_pad_nd.default(%x) {pad=[1, 1, 3, 0], value=2.0}",
    "f32[B, T, 4] = aten.flip.default(%x) {dims=[1, 2]}",
    "f32[B, T, 4] = aten.roll.default(%x) {shifts=[1], dims=[2]}",
    "f32[B, T, 4] = aten.tril.default(%x) {diagonal=-1}",
    "f32[B, T, 4] = aten.triu.default(%x) {diagonal=1}",
    f"{SAME} = aten.gather.default(%x, %k) {{dim=2}}",
    "f32[B, T, 2] = aten.gather.default(%x, %k2) {dim=2}",
    f"{SAME} = aten.scatter.src(%x, %k2, %y) {{dim=2}}",
    f"{SAME} = aten.scatter.value(%x, %k2) {{dim=2, value=7.0}}",
    f"{SAME} = aten.scatter_add.default(%x, %k, %y) {{dim=2}}",
    "f32[B, T, 3] = aten.index_select.default(%x, %v) {dim=2}",
    "f32[3, T, 4] = aten.index.Tensor(%x, %z) {indices=1}",
    "f32[3, 4] = aten.index.Tensor(%x, %z, %v) {indices=2}",
    "f32[B, 4] = aten.sum.dim_IntList(%x) {dim=[1], keepdim=false}",
    "i64[B, T, 1] = aten.sum.dim_IntList(%i) {dim=[2], keepdim=true}",
    "f32[B, T, 1] = aten.mean.dim(%x) {dim=[2], keepdim=true}",
    "f32[B, T] = aten.amax.default(%x) {dim=[2], keepdim=false}",
    "f32[B, T] = aten.amin.default(%x) {dim=[2], keepdim=false}",
    "i64[B, T] = aten.argmax.default(%x) {dim=2, keepdim=false}",
    "bool[B, T] = aten.any.dim(%c) {dim=2, keepdim=false}",
    f"{SAME} = aten.cumsum.default(%x) {{dim=1}}",
    f"{SAME} = aten._softmax.default(%x) {{dim=1, half_to_float=false}}",
    "f32[B, T, 2], %r1: i64[B, T, 2] = aten.topk.default(%x) {k=2, dim=2, largest=true, sorted=true}",
    "f32[B, T, 4], %r1: i64[B, T, 4] = aten.sort.default(%x) {dim=2, descending=false}",
    "f32[B, T, 4], %r1: i64[B, T, 4] = aten.sort.default(%x) {dim=1, descending=true}",
    "f32[B, T, T] = aten.matmul.default(%x, %t)",
    "f32[B, 4, T] = aten.conv1d.default(%t, %w, %b) {stride=[1], padding=[1], dilation=[1], groups=4}",
    'f32[B, 3] = aten.full.default() {size=["B", 3], fill_value=1.5, dtype="f32"}',
    'i64[T] = aten.arange.start_step() {start=0, end="T", step=1, dtype="i64"}',
]  # fmt: skip


def _inputs(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    shape = (batch, tokens, 4)
    j = whole(1, 4, *shape)
    return {
        "x": normal(*shape), "y": normal(*shape), "p": normal(*shape).abs() + 0.1, "i": whole(-4, 5, *shape),
        "j": torch.where(whole(0, 2, *shape) > 0, j, -j), "c": normal(*shape) > 0, "d": normal(*shape) > 0, "row": normal(1, 1, 4),
        "k": normal(*shape).argsort(-1), "k2": normal(*shape).argsort(-1)[..., :2].contiguous(), "v": whole(0, 4, 3).clamp(max=tokens - 1),
        "z": whole(0, batch, 3), "t": normal(batch, 4, tokens), "w": normal(4, 1, 3), "b": normal(4),
    }  # fmt: skip


NUMBERS: dict[str, Callable[[Mapping[str, torch.Tensor]], torch.Tensor]] = {
    f"{SAME} = aten.remainder.Tensor(%x) {{other=1.5}}": lambda v: v["x"] % 1.5,
    "i64[B, T, 4] = aten.remainder.Tensor(%i) {other=3}": lambda v: v["i"] % 3,
    f"{SAME} = aten.where.self(%c, %y) {{self=2.0}}": lambda v: torch.where(v["c"], 2.0, v["y"]),
    f"{SAME} = aten.where.self(%c, %y) {{other=-inf}}": lambda v: torch.where(v["c"], v["y"], -torch.inf),
}
"""Numbers where torch's own overload wants a tensor."""

TYPES = {
    "x": SAME, "y": SAME, "p": SAME, "i": "i64[B, T, 4]", "j": "i64[B, T, 4]", "c": "bool[B, T, 4]", "d": "bool[B, T, 4]",
    "row": "f32[1, 1, 4]", "k": "i64[B, T, 4]", "k2": "i64[B, T, 2]", "v": "i64[3]", "z": "i64[3]", "t": "f32[B, 4, T]",
    "w": "f32[4, 1, 3]", "b": "f32[4]",
}  # fmt: skip


def test_every_operator_has_a_rule_and_a_case() -> None:
    assert RULES.keys() == (OPS.keys() - {"linear_attention"}) | CORE_ATEN.keys()  # refused: it needs a recurrent state
    assert {case.split(" = ")[1].split("(")[0] for case in CASES} == CORE_ATEN.keys()


@pytest.mark.parametrize("case", [*CASES, *NUMBERS])
def test_operator(case: str) -> None:
    used = [name for name in TYPES if f"%{name})" in case or f"%{name}," in case]
    inputs = used if "x" in used else ["x", *used]  # states the symbols
    stated = "\n".join(f"  input %{name}: {TYPES[name]}" for name in inputs)
    results = "%r, %r1" if "%r1" in case else "%r"
    graph = parse_graph(f"graph g {{\n{stated}\n  %r: {case}\n  return {results}\n}}")
    if case not in NUMBERS:
        verify(graph)
    emitter = Emitter({}, {}, {*inputs, "logits"})
    lowering = Lowering(graph, emitter, Placement({}, frozenset(), {}), portable=True, accuracy_level=0)
    model = lowering.run()
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, tokens in ((2, 3), (1, 5)):
        values = _inputs(batch, tokens)
        if case in NUMBERS:
            expected = NUMBERS[case](values)
        else:
            expected = Interpreter(graph, MemoryWeights({}))(**{name: values[name] for name in inputs})[0]
        feeds = {i.name: values[i.name].numpy() for i in session.get_inputs()}
        got = session.run(["logits"], feeds)[0]
        assert got.dtype == expected.numpy().dtype
        np.testing.assert_allclose(got, expected.numpy(), rtol=2e-5, atol=2e-6)
