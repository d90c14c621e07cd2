"""Quantising while calibration text runs through: the moments are those of the quantised model's own inputs; interruptions cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from moec.compiler.calibration.collect import batches_of, expert_outputs
from moec.compiler.codes import CodesOnDisk
from moec.compiler.context import Context
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Node
from moec.compiler.layers import moe_layers
from moec.compiler.model import Model
from moec.compiler.moments import PRIOR_TOKENS, moment_of
from moec.compiler.packed import CodedFormat, Quantized, coded_format
from moec.compiler.progress import Progress
from moec.compiler.quantization import QuantizedWeights, quantize_in_order
from moec.compiler.quantizers import Quantizer
from moec.compiler.quantizers.gptq import quantize as gptq
from moec.compiler.weights import packed_of
from moec.passes.quantize import Quantize
from moec.runtime.errors import MoecError
from moec.runtime.formats.int import IntFormat
from tests import graphs

UP, DOWN, OUT = "layers.0.experts.up", "layers.0.experts.down", "layers.0.o.weight"
STEP = Quantize(experts="int3_g32", linear="int4_g32", method="gptq")


class _Inputs:
    """Keeps the inputs of nodes."""

    def __init__(self) -> None:
        self.of: dict[str, list[Tensor]] = {}

    def visit(self, node: Node, inputs: Sequence[Sequence[Tensor | None]]) -> None:
        if node.op in ("linear", "experts"):
            count = 1 if node.op == "linear" else 3
            self.of[node.name] = [torch.cat([b[i].flatten(0, -2) for b in inputs if b[i] is not None]) for i in range(count)]  # type: ignore[union-attr]


def seen(model: Model, context: Context) -> dict[str, list[Tensor]]:
    observer = _Inputs()
    Interpreter(model.graph, model.weights).run(batches_of(context.need_text("test")), lambda *_: None, None, observer)
    return observer.of


def codes(model: Model, name: str, expert: int | None = None) -> np.ndarray:
    found = packed_of(model.weights, name, expert)
    assert found is not None
    return found.codes


@pytest.mark.parametrize("sequential", [None, False])
def test_moments_are_of_the_inputs(sequential: bool | None) -> None:
    source = graphs.model()
    context = graphs.context(source)
    made = Quantize(experts="int3_g32", linear="int4_g32", method="gptq", sequential=sequential).run(source, context)
    inputs = seen(source if sequential is False else made, context)
    moment = moment_of(inputs["o"])
    assert np.array_equal(codes(made, OUT), gptq(source.load(OUT), IntFormat(4, 32), moment).codes)
    x, ids, weights = inputs["e"]
    layer = moe_layers(made.graph)[0]
    for expert in range(6):
        token, slot = torch.where(ids == expert)
        g = weights[token, slot]
        runs = source if sequential is False else made
        h, all_h = (expert_outputs(runs, layer, expert, rows)[1] for rows in (x[token], x))
        for name, rows, everything in ((UP, x[token], x), (DOWN, h, all_h)):
            own, common = ((rows * g[:, None]).T @ (rows * g[:, None]) / len(rows), everything.T @ everything / len(x))
            common = common * own.trace() / common.trace()
            if len(rows) < 2 * rows.shape[1]:
                own = (own * len(rows) + common * PRIOR_TOKENS) / (len(rows) + PRIOR_TOKENS)
            expected = gptq(source.load(name, expert), IntFormat(3, 32), own)
            assert (codes(made, name, expert) == expected.codes).mean() > 0.99


def test_results_are_those_of_the_codes() -> None:
    source = graphs.model()
    context = graphs.context(source)
    logits: list[Tensor] = []
    made = STEP.run(source, context)
    Interpreter(made.graph, made.weights).run(batches_of(context.need_text("x")), lambda _, out: logits.append(out[0]))
    names = {name: made.graph.params[name] for name in (UP, DOWN)}
    assert all(coded_format(param) == IntFormat(3, 32) for param in names.values())
    assert context.damage(made, "x").kl_divergence < 0.2
    assert torch.isfinite(torch.cat(logits)).all()


def test_statistics_serve_the_diagonal() -> None:
    source = graphs.model()
    context = graphs.context(source)
    made = Quantize(experts="int3_g32", linear="int4_g32", method="imatrix").run(source, context)
    assert isinstance(made.weights, QuantizedWeights)
    assert made.weights.moments is not None
    moment = made.weights.moments(OUT, None)
    assert moment is not None
    assert torch.allclose(moment, moment_of(seen(source, context)["o"]).diagonal().double(), rtol=1e-4)
    ordered = Quantize(experts="int3_g32", linear="int4_g32", method="imatrix", sequential=True).run(source, context)
    same = [(codes(made, name, e) == codes(ordered, name, e)).mean() for name in (UP, DOWN) for e in range(6)]
    assert min(same) > 0.8  # the moments are nearly those of the quantised model


class _InterruptedError(Exception):
    pass


def test_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    source = graphs.model()
    text = graphs.text()
    made: list[int] = []

    def run(work: Path | None, limit: int) -> Model:
        def quantize(weight: Tensor, fmt: CodedFormat, moment: Tensor | None = None) -> Quantized:
            if len(made) >= limit:
                raise _InterruptedError
            made.append(1)
            assert isinstance(fmt, IntFormat)
            return gptq(weight, fmt, moment)

        made.clear()
        graph = graphs.quantized(source.graph, Quantize(experts="int3_g32", linear="int4_g32"))
        names = [n for n, p in graph.params.items() if coded_format(p) is not None]
        quantizers = {name: Quantizer("test", "full", quantize) for name in names}
        return quantize_in_order(Model(graph, source.weights), quantizers, text, Progress(quiet=True), work=work)

    whole = run(None, 99)
    assert len(made) == 4 + 12
    with pytest.raises(_InterruptedError):
        run(tmp_path, 7)  # within the experts, whose layer is lost; the four linear layers are kept
    assert not list(tmp_path.glob("*.part"))
    for expected in (12, 0):
        again = run(tmp_path, 99)
        assert len(made) == expected
        for key in ((OUT, None), (UP, 3), (DOWN, 5)):
            assert np.array_equal(codes(again, *key), codes(whole, *key))
    next(tmp_path.glob("codes-layers-0-o*")).write_bytes(b"not a file of ours")
    assert np.array_equal(codes(run(tmp_path, 99), OUT), codes(whole, OUT))
    assert len(made) == 1


def test_codes_that_cannot_be_written(tmp_path: Path) -> None:
    store = CodesOnDisk(tmp_path / "codes", "x")
    store["a", None] = gptq(torch.ones(2, 40), IntFormat(4, 32))
    (tmp_path / "codes").rmdir()
    with pytest.raises(MoecError, match="cannot write codes"):
        store.finish("a")


def test_moments_are_symmetric_whatever_their_size() -> None:
    for k in (3, 512, 700):
        x = torch.randn(50, k)
        assert torch.allclose(moment_of([x[:20], x[20:]]), x.T @ x / 50, atol=1e-4)
