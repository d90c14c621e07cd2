"""The TVM backend for NVIDIA GPUs: whole models on an emulated GPU, machine code for several architectures, and what is refused."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.compiler import cuda_code
from moec.compiler.artifact_weights import open_artifact
from moec.compiler.backends.tvm import cuda
from moec.compiler.backends.tvm.backend import TvmBackend
from moec.compiler.backends.tvm.cuda_choices import CHUNK, Choices
from moec.compiler.backends.tvm.platform import ANY
from moec.compiler.ir import Graph
from moec.compiler.model import Model
from moec.compiler.pipeline import compile_model
from moec.compiler.progress import Progress
from moec.compiler.stored import pack
from moec.compiler.text import parse_graph, print_graph
from moec.runtime.cuda import Driver, runs_on
from moec.runtime.errors import MoecError
from moec.runtime.sampler import Best
from moec.runtime.tvm_device import Gpu
from moec.targets import cuda as describe
from moec.targets import get_target
from moec.targets.kernels.cuda.experts_layer import Layer
from moec.targets.kernels.cuda.tuned import dispatch
from tests.compiler.backends.test_tvm import with_format
from tests.compiler.backends.tvm_model import Compiled, assert_equal, restrict
from tests.graphs import MOE, factored, random_weights
from tests.targets.kernels import emulator
from tests.targets.kernels.emulator import needs_emulator

needs_compiler = pytest.mark.skipif(cuda_code.cuda_compiler() is None, reason="neither nvcc nor NVRTC is installed")


def moe() -> Graph:
    """The small model with rows of whole vectors."""
    return parse_graph(MOE.replace("[6, 24, 16]", "[6, 32, 16]").replace("[6, 16, 12]", "[6, 16, 16]"))


@pytest.fixture
def emulated(whole: Gpu, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """The emulated GPU, where products of many tokens are plain kernels: those of the tensor cores take it long."""
    monkeypatch.setattr(cuda, "has_many", lambda _: False)
    return whole


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """The emulated GPU with all kernels."""
    emulator.install()
    monkeypatch.setattr(cuda, "need_cuda_compiler", lambda: "none")
    monkeypatch.setattr(cuda, "machine_code", lambda source, arch, compiler: b"")
    return Gpu("", b"", None)


@needs_emulator
@pytest.mark.parametrize("name", ["bf16", "int4_g32", "int3_channel_asym", "fp8_block128", "fp8_channel"])
def test_a_model_on_the_emulated_gpu(name: str, emulated: Gpu, tmp_path: Path) -> None:
    graph = with_format(moe(), name)
    model = Compiled(graph, random_weights(graph), tmp_path, "h100-sxm", emulated, (1, 8, 40))
    ids = np.random.default_rng(0).integers(0, model.executor.vocab_size, 40)
    expected = model.expected(ids)
    np.testing.assert_allclose(model.logits(ids), expected, atol=1e-4)
    first, second = model.executor.add(), model.executor.add()
    steps = [[(first, ids[:5])], [(first, ids[5:6])], [(second, ids[:1])], [(first, ids[6:7]), (second, ids[1:2])], [(first, ids[7:40])]]
    found = [model.executor.forward(step) for step in steps]
    for got, wanted in zip(found, [[4], [5], [0], [6, 1], [39]], strict=True):
        np.testing.assert_allclose(got, expected[wanted], atol=1e-4)
    assert model.executor.counters is not None
    assert [(c.tokens, c.experts, c.slots) for c in model.executor.counters.read()] == [(82, 164, 164)]
    model.executor.counters.reset()
    model.executor.forward([(first, ids[:3])])
    assert [(c.tokens, c.experts) for c in model.executor.counters.read()] == [(3, 6)]
    check_likeliest(model, ids)


def check_likeliest(model: Compiled, ids: NDArray[np.int64]) -> None:
    """The likeliest tokens are found on the GPU, of several sequences and of one token."""
    expected = Best.of(model.expected(ids))
    first, second = model.executor.add(), model.executor.add()
    for steps, rows in (([(first, ids[:5]), (second, ids[:3])], [4, 2]), ([(first, ids[5:6])], [5])):
        found = model.executor.best(steps)
        np.testing.assert_array_equal(found.ids, expected.ids[rows])
        np.testing.assert_allclose(found.logprobs, expected.logprobs[rows], atol=1e-4)


UP, DOWN = "layers.0.experts.up", "layers.0.experts.down"
MIXED = {
    UP: ("int2_g32", "int4_g32", "bf16", "int4_g32", "int3_channel_asym", "int2_g32"),
    DOWN: ("int4_g32", "int4_g32", "int4_g32", "bf16", "int8_g32", "int4_g32"),
}


def mixed() -> Graph:
    """The small model with experts of different formats."""
    graph = with_format(moe(), "bf16")
    return graph.with_params(replace(graph.params[name], format=formats) for name, formats in MIXED.items())


@needs_emulator
def test_experts_of_different_formats_are_one_node(whole: Gpu, tmp_path: Path) -> None:
    graph = mixed()
    model = Compiled(graph, random_weights(graph), tmp_path, "h100-sxm", whole, (1, 40))
    check_many_and_one(model, 40)


def check_many_and_one(model: Compiled, tokens: int) -> None:
    """The logits of some tokens, and of the first of them alone."""
    ids = np.random.default_rng(0).integers(0, model.executor.vocab_size, tokens)
    expected = model.expected(ids)
    np.testing.assert_allclose(model.logits(ids), expected, atol=1e-4)
    np.testing.assert_allclose(model.logits(ids[:1]), expected[:1], atol=1e-4)


@needs_emulator
@pytest.mark.parametrize(("target", "arch"), [("rtx-4090", "sm_89"), ("a100-80g", "sm_80")])
def test_other_gpus(target: str, arch: str, whole: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "ARCH", arch)
    graph = mixed()
    model = Compiled(graph, random_weights(graph), tmp_path, target, whole, (1, 2048))
    assert [choice["kernel"] for choice in model.section["choices"]] == ["decode", "prefill"]
    check_many_and_one(model, 60)


@needs_emulator
@pytest.mark.parametrize("kind", ["f32", "factors", "only factors"])
def test_what_has_plain_kernels_only(kind: str, emulated: Gpu, tmp_path: Path) -> None:
    graph = with_format(moe(), "f32" if kind == "f32" else "int4_g32")
    subject = Model(graph, random_weights(graph))
    if kind == "f32":
        graph = graph.with_params([replace(graph.params[DOWN], format="f16")])
        subject = replace(subject, graph=graph)
    else:
        subject = factored(subject, (3, 8), whole=kind == "factors", fmt="bf16")
    model = Compiled(subject.graph, subject.weights, tmp_path, "h100-sxm", emulated, (1, 11))
    assert "plain kernels" in model.section["notes"][0]
    check_many_and_one(model, 11)


@needs_emulator
def test_few_tokens_are_filled_up(emulated: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = mixed()
    model = Compiled(graph, random_weights(graph), tmp_path, "h100-sxm", emulated)
    called = list[str]()
    run = emulated.run
    monkeypatch.setattr(emulated, "run", lambda names, *rest: (called.append(names[0]), run(names, *rest))[1])
    executor, rng = model.executor, np.random.default_rng(3)
    texts = [rng.integers(0, executor.vocab_size, 8) for _ in range(3)]
    expected = [model.expected(text) for text in texts]
    a, b, c = (executor.add() for _ in texts)
    np.testing.assert_allclose(executor.forward([(a, texts[0][:3])], all_logits=True), expected[0][:3], atol=1e-4)  # decode4
    np.testing.assert_allclose(executor.forward([(b, texts[1][:2]), (c, texts[2][:4])]), [expected[1][1], expected[2][3]], atol=1e-4)
    steps = [(a, texts[0][3:4]), (b, texts[1][2:3]), (c, texts[2][4:5])]
    np.testing.assert_allclose(executor.forward(steps), [expected[0][3], expected[1][2], expected[2][4]], atol=1e-4)
    steps = [(a, texts[0][4:8]), (b, texts[1][3:8])]
    np.testing.assert_allclose(executor.forward(steps, all_logits=True), [*expected[0][4:], *expected[1][3:]], atol=1e-4)
    np.testing.assert_allclose(executor.forward([(c, texts[2][5:7])]), expected[2][[6]], atol=1e-4)
    assert called == ["decode4", "decode8", "decode4", "forward", "decode2"]
    assert executor.counters is not None
    (count,) = executor.counters.read()
    assert (count.tokens, count.experts, count.slots) == (23, 46, 46)  # what calls were filled up with is not counted


def test_functions_and_choices_of_a_target() -> None:
    platform = cuda.CudaPlatform(get_target("h100-sxm"))
    functions = platform.functions(with_format(moe(), "int4_g32"))
    assert [f.name for f in functions[:4]] == ["decode", "decode2", "decode4", "decode8"]
    assert functions[-1] == ANY and all(f.most for f in functions[:-1])
    assert [f.most for f in functions[:-1]] == sorted(f.most or 0 for f in functions[:-1])
    layer = Layer(64, 8, 2048, 1024, "int4_g128", "int4_g128", "float32")
    choices = Choices(get_target("h100-sxm"), products=True)
    for function in choices.functions([layer]):
        found = choices.of(layer, function)
        wanted = dict(dispatch(get_target("h100-sxm"), layer))
        assert found is not None
        assert found.kernel == ("decode" if (function.most or 99) <= 8 else "prefill")
        if function.most is None:
            assert found == next(choice for end, choice in wanted.items() if end is None or end >= CHUNK)
        elif function.most in wanted:
            assert found == wanted[function.most]
    assert {entry["why"][:7] for entry in choices.made()} <= {"lent by", "default", "gate_up", "measure"}
    assert any("T up to 1, 2" in line or "T up to 1:" in line for line in choices.lines())
    old = replace(get_target("a100-80g"), tvm=describe("sm_75", 64 << 10))
    assert [cuda.CudaPlatform(target).products for target in (get_target("a100-80g"), old)] == [True, False]
    plain_only = Choices(get_target("a100-80g"), products=False)
    assert [f.name for f in plain_only.functions([layer])] == ["decode", "decode2", "decode4", "decode8", "forward"]
    assert plain_only.of(layer, ANY) is None


def test_an_artifact_of_experts_of_different_formats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda, "need_cuda_compiler", lambda: "none")
    monkeypatch.setattr(cuda, "machine_code", lambda source, arch, compiler: b"")
    graph, out = mixed(), tmp_path / "small.moec"
    weights = random_weights(graph)
    plan = compile_model((graph, weights), out, target="h100-sxm", progress=Progress(quiet=True))
    read, stored = open_artifact(out)
    assert print_graph(read) == print_graph(graph)
    assert plan.ops["experts"] == 1
    files = sum(
        entry["nbytes"] for w in json.loads((out / "manifest.json").read_text())["weights"].values() for entry in w["arrays"].values()
    )
    assert files == plan.weight_bytes
    for name, formats in MIXED.items():
        for expert in range(len(formats)):
            expected = pack(weights, graph.params[name], expert)
            found = stored.packed(name, expert)
            if found is None:
                assert formats[expert] == "bf16"
                np.testing.assert_array_equal(stored.load(name, expert), weights.load(name, expert).bfloat16().float())
            else:
                assert_equal(found, expected)


@needs_compiler
@pytest.mark.parametrize("target", ["h100-sxm", "a100-80g", "rtx-4090"])
def test_machine_code_for_each_architecture(target: str, tmp_path: Path) -> None:
    graph = mixed() if target == "h100-sxm" else with_format(moe(), "int4_g32")
    backend = TvmBackend(graph, get_target(target))
    restrict(backend, (1, 4, 24, 4096))  # a function of each kind: one token, a few, up to some, and any number
    section = backend.build(tmp_path, {})
    assert list(section["functions"]) == ["decode", "decode4", "forward24", "forward"]
    assert (tmp_path / section["cuda"]["cubin"]).read_bytes()[:4] == b"\x7fELF"
    assert section["cuda"]["arch"] == {"h100-sxm": "sm_90a", "a100-80g": "sm_80", "rtx-4090": "sm_89"}[target]


def test_a_machine_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, *_: Any) -> Any:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(MoecError, match="needs an NVIDIA GPU, and its driver .* --target cpu"):
        Driver("sm_90a", "model.moec")


def test_a_driver_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoGpus:
        @staticmethod
        def cuInit(_: int) -> int:  # noqa: N802  # NVIDIA's name
            return 100

    monkeypatch.setattr(ctypes, "CDLL", lambda *_: NoGpus())
    with pytest.raises(MoecError, match="the driver finds none"):
        Driver("sm_90a", "model.moec")


def test_code_of_one_architecture_on_another() -> None:
    assert runs_on("sm_80", (8, 0))
    assert runs_on("sm_80", (8, 9))
    assert not runs_on("sm_80", (9, 0))
    assert runs_on("sm_90a", (9, 0))
    assert not runs_on("sm_90a", (9, 1))
    assert runs_on("sm_100a", (10, 0))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_code, "cuda_compiler", lambda: None)
    with pytest.raises(MoecError, match="put nvcc on the PATH, or pip install"):
        cuda_code.need_cuda_compiler()
