"""What products are computed with: who has which, what it costs on an emulated GPU, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.activation_precision import RoundedActivations, as_e4m3
from moec.compiler.backends import check_activations
from moec.compiler.backends.tvm.cuda_choices import Choices
from moec.compiler.backends.tvm.platform import ANY, ONE
from moec.compiler.cli.main import main as call
from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model
from moec.runtime.errors import MoecError
from moec.runtime.tvm_device import Gpu
from moec.targets import get_target
from moec.targets.kernels.cuda.experts_layer import Layer
from tests.compiler.backends.test_tvm import with_format
from tests.compiler.backends.test_tvm_cuda import moe, whole
from tests.compiler.backends.tvm_model import Compiled
from tests.graphs import random_weights
from tests.targets.kernels.cuda.packed import as_e4m3 as as_e4m3_of_numpy
from tests.targets.kernels.emulator import needs_emulator

__all__ = ["whole"]

Capture = pytest.CaptureFixture[str]


def in_float64(model: Compiled, tokens: NDArray[np.int64], kind: str | None) -> NDArray[np.float64]:
    """Logits [T, V] with activations of this kind."""
    graph, weights = model.interpreter.graph, model.interpreter.weights
    ids, positions = graph.inputs
    inputs = {ids.name: torch.from_numpy(tokens)[None], positions.name: torch.arange(len(tokens))[None]}
    found = list[NDArray[np.float64]]()
    observer = None if kind is None else RoundedActivations(Model(graph, weights), kind)
    Interpreter(graph, weights, dtype=torch.float64).run([inputs], lambda _, out: found.append(out[0][0].numpy()), observer=observer)
    return found[0]


def typical(x: NDArray[np.float64]) -> float:
    """The size of a token's numbers, of most tokens: where two experts are nearly as likely, rounding may change which one runs."""
    return float(np.median(np.sqrt(np.square(x).mean(1))))


@needs_emulator
@pytest.mark.parametrize(("kind", "name"), [("bfloat16", "int4_g32"), ("fp8", "fp8_block128"), ("fp8", "fp8_channel")])
def test_a_prompt_on_the_emulated_gpu(kind: str, name: str, whole: Gpu, tmp_path: Path) -> None:
    graph = with_format(moe(), name)
    model = Compiled(graph, random_weights(graph), tmp_path, "h100-sxm", whole, (1, 2048), activations=kind)  # others are exact
    assert model.section["activations"] == kind
    (many,) = (choice["options"] for choice in model.section["choices"] if choice["function"] == "forward")
    assert (many["terms"], "chunk" in many) == (1, kind == "fp8")
    ids = np.random.default_rng().integers(0, model.executor.vocab_size, 60)
    found = model.logits(ids).astype(np.float64)
    exact, rounded = in_float64(model, ids, None), in_float64(model, ids, kind)
    # Hidden values of experts and what experts give are rounded to bfloat16 on the way, and roundings fall on the other side now and then.
    assert typical(found - rounded) < 0.6 * typical(rounded - exact)
    np.testing.assert_allclose(model.logits(ids[:1]), exact[:1], atol=1e-4)  # a token alone is exact


def test_e4m3_is_rounded_alike() -> None:
    x = np.random.default_rng().standard_normal((3, 200)).astype(np.float32)
    np.testing.assert_allclose(as_e4m3(torch.from_numpy(x)).numpy(), np.stack([as_e4m3_of_numpy(row) for row in x]), rtol=1e-6)


def test_experts_have_choices_of_their_activations() -> None:
    target, layer = get_target("h100-sxm"), Layer(64, 8, 2048, 1024, "int4_g128", "int4_g128", "float32")
    exact, rounded, narrow = (Choices(target, True, kind) for kind in ("float", "bfloat16", "fp8"))
    for choices in (exact, rounded, narrow):
        choices.functions([layer])
    many = [choices.of(layer, ANY) for choices in (exact, rounded, narrow)]
    assert [choice and choice.options["terms"] for choice in many] == [2, 1, 1]
    assert exact.of(layer, ONE) == rounded.of(layer, ONE)
    assert [entry["layer"].endswith("float32") for entry in rounded.made()] == [False, True]
    fp8 = Layer(64, 8, 2048, 1024, "fp8_block128", "fp8_block128", "float32")
    found = narrow.of(fp8, ANY)
    assert found is not None
    assert "chunk" in found.options
    assert narrow.made()[-1]["layer"].endswith("fp8_block128-fp8")


def test_who_has_which() -> None:
    gpu, cpu = get_target("h100-sxm"), get_target("cpu")
    for name, target, kinds in (
        ("tvm", gpu, ("float", "bfloat16", "fp8")), ("tvm", get_target("l4"), ("float", "bfloat16")), ("tvm", cpu, ("float",)),
        ("onnx", gpu, ("float", "float16", "bfloat16")), ("onnx", cpu, ("float", "int8")),
    ):  # fmt: skip
        for kind in kinds:
            check_activations(name, target, kind)
    with pytest.raises(MoecError, match="--activations int8: the tvm backend computes with float or bfloat16 or fp8 on target h100-sxm"):
        check_activations("tvm", gpu, "int8")
    with pytest.raises(MoecError, match="unknown kind of activations 'bf16'"):
        check_activations("tvm", gpu, "bf16")


def test_it_is_refused_before_anything_is_read(capsys: Capture, tmp_path: Path) -> None:
    assert call(["compile", str(tmp_path / "no model"), "-o", str(tmp_path / "x.moec"), "--activations", "bfloat16"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --activations bfloat16: the tvm backend computes with float on")
