"""The type of cached keys and values: who has which, what it costs on an emulated GPU, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.cache_precision import RoundedCache
from moec.compiler.backends import cache_dtype
from moec.compiler.cli.main import main as call
from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model
from moec.compiler.pipeline import compile_model
from moec.compiler.progress import Progress
from moec.runtime.errors import MoecError
from moec.runtime.tvm_device import Gpu, Host
from moec.runtime.tvm_pages import Pages
from moec.targets import get_target
from tests import tiny
from tests.compiler.backends.test_tvm import with_format
from tests.compiler.backends.test_tvm_cuda import emulated, moe, whole
from tests.compiler.backends.tvm_model import Compiled
from tests.graphs import random_weights
from tests.targets.kernels.emulator import needs_emulator

__all__ = ["emulated", "whole"]

Capture = pytest.CaptureFixture[str]
Logits = NDArray[np.float64]
QUIET = Progress(quiet=True)


def in_float64(model: Compiled, tokens: NDArray[np.int64], *, rounded: bool) -> Logits:
    """Logits [T, V], of keys and values in bfloat16 if `rounded`."""
    graph, weights = model.interpreter.graph, model.interpreter.weights
    ids, positions = graph.inputs
    inputs = {ids.name: torch.from_numpy(tokens)[None], positions.name: torch.arange(len(tokens))[None]}
    found = list[Logits]()
    observer = RoundedCache(Model(graph, weights)) if rounded else None
    Interpreter(graph, weights, dtype=torch.float64).run([inputs], lambda _, out: found.append(out[0][0].numpy()), observer=observer)
    return found[0]


def rms(x: Logits) -> float:
    return float(np.sqrt(np.square(x).mean()))


@needs_emulator
@pytest.mark.parametrize("asked", ["float32", "bfloat16", None])
def test_a_model_on_the_emulated_gpu(asked: str | None, emulated: Gpu, tmp_path: Path) -> None:
    graph = with_format(moe(), "int4_g32")
    model = Compiled(graph, random_weights(graph), tmp_path, "h100-sxm", emulated, (1, 4, 40), asked)
    dtype = model.section["cache_dtype"]
    assert dtype == asked or (dtype == "bfloat16" and asked is None)
    ids = np.random.default_rng().integers(0, model.executor.vocab_size, 56)
    sequence, calls = model.executor.add(), [30, 1, 4, 1, 3, 1, 16]  # pages have 32 tokens
    ends = np.cumsum(calls)
    found = np.concatenate([model.executor.forward([(sequence, ids[end - n : end])]) for n, end in zip(calls, ends, strict=True)])
    exact, rounded = (in_float64(model, ids, rounded=r)[ends - 1] for r in (False, True))
    if dtype == "float32":
        np.testing.assert_allclose(found, exact, atol=1e-4)
    else:  # what it differs in is the rounding of keys and values, but for numbers that float32 has on the other side of a tie
        np.testing.assert_allclose(found, rounded, atol=1e-3)
        assert rms(found - rounded) < 0.2 * rms(rounded - exact)


def test_who_has_which() -> None:
    gpu, cpu = get_target("h100-sxm"), get_target("cpu")
    assert [cache_dtype("tvm", gpu, asked) for asked in (None, "bfloat16", "float32")] == ["bfloat16", "bfloat16", "float32"]
    assert [cache_dtype(name, cpu, asked) for name in ("tvm", "onnx") for asked in (None, "float32")] == ["float32"] * 4
    assert [cache_dtype("onnx", gpu, None, kind) for kind in ("float", "bfloat16", "float16")] == ["float16", "bfloat16", "float16"]
    with pytest.raises(MoecError, match="--kv-cache-dtype float32: the onnx backend keeps keys and values in float16 on target h100-sxm"):
        cache_dtype("onnx", gpu, "float32", "float16")
    for name in ("tvm", "onnx"):
        refused = f"--kv-cache-dtype bfloat16: the {name} backend keeps keys and values in float32 on target cpu; leave the option out"
        with pytest.raises(MoecError, match=refused):
            cache_dtype(name, cpu, "bfloat16")
    with pytest.raises(
        MoecError, match="unknown type of key/value cache 'bfloat': did you mean 'bfloat16'. Choices: bfloat16, float16, float32"
    ):
        cache_dtype("tvm", gpu, "bfloat")


def test_it_is_refused_before_anything_is_read(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "x.moec"
    assert call(["compile", str(tmp_path / "no model"), "-o", str(out), "--kv-cache-dtype", "bfloat16"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --kv-cache-dtype bfloat16: the tvm backend keeps keys and values in")
    assert not any(tmp_path.iterdir())


def test_a_plan_says_the_type_and_its_bytes(capsys: Capture) -> None:
    numbers = 4 * 2 * 2 * 48  # layers, keys and values, heads, size of a head
    command = ["compile", str(tiny.MODEL), "--dry-run", "--target", "h100-sxm"]
    for options, dtype, size in ((), "bfloat16", 2 * numbers), (("--kv-cache-dtype", "float32"), "float32", 4 * numbers):
        assert call([*command, *options, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert (plan["cache_dtype"], plan["cache_bytes_per_token"]) == (dtype, size)
        assert call([*command, *options]) == 0
        assert f", key/value cache {size / 1024:.1f} KiB a token in {dtype}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "h100-sxm"}, "32 B a token in bfloat16"),
        ({"target": "h100-sxm", "kv_cache_dtype": "float32"}, "64 B a token in float32"),
        ({"target": "cpu"}, "64 B a token in float32"),
        ({"target": "cpu", "backend": "onnx"}, "64 B a token in float32"),
        ({"target": "h100-sxm", "backend": "onnx"}, "32 B a token in float16"),
        ({"target": "h100-sxm", "backend": "onnx", "activations": "bfloat16"}, "32 B a token in bfloat16"),
    ],
    ids=["gpu", "gpu float32", "cpu", "onnx", "onnx gpu", "onnx gpu bfloat16"],
)
def test_an_artifact_says_it(options: dict[str, str], said: str, emulated: Gpu, tmp_path: Path, capsys: Capture) -> None:
    del emulated  # no compiler for GPUs is needed
    graph = with_format(moe(), "int8_g32")
    compile_model((graph, random_weights(graph)), tmp_path / "a.moec", progress=QUIET, **options)  # type: ignore[arg-type]
    assert call(["inspect", str(tmp_path / "a.moec")]) == 0
    assert f"\nkey/value cache {said}\n" in capsys.readouterr().out
    assert call(["inspect", str(tmp_path / "a.moec"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert f"{found['cache_bytes_per_token']} B a token in {found['cache_dtype']}" == said


def test_pages_of_each_type() -> None:
    def bytes_of(dtype: str) -> int:
        (pool,) = Pages([(2, 32, 4)], 32, 1, 64, Host(), dtype).pools
        return np.from_dlpack(pool).nbytes

    assert bytes_of("float32") == 2 * bytes_of("bfloat16")
    with pytest.raises(MoecError, match="keeps keys and values in 'fp8', this moec knows float32 and bfloat16: update moec"):
        bytes_of("fp8")
