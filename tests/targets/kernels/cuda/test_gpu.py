"""The experts kernels on a GPU, against float64. Skipped where there is none, or no compiler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.moe_layer_run import check
from moec.compiler.cuda_code import cuda_compiler
from moec.compiler.measure.build import build
from moec.compiler.measure.cases import Case, Index
from moec.compiler.measure.layer import Runner, random_weights
from moec.compiler.measure.layers import make_layer
from moec.targets.kernels.cuda.space import candidates, default

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not HOPPER or cuda_compiler() is None, reason="needs a GPU of compute capability 9.0 and a CUDA compiler")

SIZE = (6, 2, 520, 392, True)
MIXED = ["int2_g64+int3_g64_asym+int8_g128/int4_g128+bf16", "fp8_channel+fp8_block128+int4_g64/fp8_block128+bf16"]
FORMATS = ["bf16", "fp8_block128", "int8_g128", "int4_g64_asym", "int3_g32", "int2_channel", *MIXED]
TOKENS = {"decode": (1, 3, 8), "prefill": (0, 1, 9, 33, 257)}


@pytest.mark.parametrize(
    ("formats", "dtype"),
    [*((name, dtype) for name in FORMATS for dtype in ("bfloat16", "float32")), ("fp8_channel+fp8_block128/fp8_block128", "fp8")],
)
def test_experts_are_right(formats: str, dtype: str, tmp_path: Path) -> None:
    from moec.targets import get_target

    layer = make_layer(SIZE, formats, dtype)
    few = [(Case.of("decode", layer, default("decode", layer, t), t, biases=True), t) for t in TOKENS["decode"]]
    ways = [options for options in candidates("prefill", layer, 257) if "chunk" in options] or [default("prefill", layer, 33)]
    many = [(Case.of("prefill", layer, options, biases=True), t) for options in ways for t in TOKENS["prefill"]]
    problems = [problem for _, problem in build(tmp_path, [case for case, _ in few + many], get_target("h100"), 4)]
    assert not any(problems)
    files = Index.read(tmp_path).files
    weights = random_weights(layer, 5, biases=True)
    for case, tokens in few + many:
        error = check(Runner.load(tmp_path, case, files[case], tokens), weights)
        assert error < (1e-4 if dtype == "float32" else layer.most_error), (case.kernel, tokens)
