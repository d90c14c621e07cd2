"""Weights of 8-bit floating point: rounding, scales, what the passes and backends make of them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.allocation import Problem, make_units
from moec.compiler.backends.onnx.placement import place
from moec.compiler.context import Context
from moec.compiler.fp8 import round_to_fp8, search_fp8
from moec.compiler.model import Model
from moec.compiler.packed import Quantized
from moec.compiler.plan import param_bytes
from moec.compiler.quantizers import get_quantizer, known_quantizers
from moec.compiler.stored import as_stored, pack
from moec.passes.assign_bits import AssignBits
from moec.passes.quantize import Quantize
from moec.runtime.errors import MoecError
from moec.runtime.formats import get_format
from moec.runtime.formats.fp8 import Fp8Format
from tests import graphs

NAMES = ["fp8_channel", "fp8_block128"]


def definition(weight: np.ndarray, block: int) -> np.ndarray:
    """Rounding with a scale from the largest weight, block by block, with the numbers of ml_dtypes."""
    n, k = weight.shape
    rows, columns = (block, block) if block else (1, k)
    out = np.zeros_like(weight)
    for i in range(0, n, rows):
        for j in range(0, k, columns):
            part = weight[i : i + rows, j : j + columns]
            scale = max(np.float32(np.abs(part).max()) / np.float32(448), np.float32(2.0**-126)) if part.any() else np.float32(1)
            wanted = np.clip(part / scale, -448, 448)
            out[i : i + rows, j : j + columns] = wanted.astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return out


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES), n=st.integers(1, 300), k=st.integers(1, 300), seed=st.integers(0, 999),
    spread=st.sampled_from([1e-30, 1e-9, 1.0, 1e6]), zeros=st.booleans(),
)  # fmt: skip
def test_rounded_as_the_definition_says(name: str, n: int, k: int, seed: int, spread: float, zeros: bool) -> None:
    fmt = get_format(name)
    assert isinstance(fmt, Fp8Format)
    weight = (np.random.default_rng(seed).standard_t(4, (n, k)) * spread).astype(np.float32)
    if zeros:
        weight[: n // 2 + 1] = 0
    found = round_to_fp8(torch.from_numpy(weight), fmt)
    assert found.codes.shape == (n, k)
    assert found.scale.shape == found.zero.shape == (n, fmt.groups(k))
    assert found.scale.dtype == np.float32
    assert not (found.codes & 0x7F == 0x7F).any()
    values = fmt.dequantize(found.codes, found.scale)
    assert ((values == definition(weight, fmt.block)) | (values == weight)).all()  # a few weights may all be on some grid
    assert torch.equal(found.values(fmt), torch.from_numpy(fmt.dequantize(found.codes, found.scale)))
    again = Quantized(*fmt.codes(fmt.pack(found.codes, found.scale), (n, k)))
    assert torch.equal(again.values(fmt), found.values(fmt))


@pytest.mark.parametrize("name", NAMES)
def test_the_search_is_never_worse(name: str) -> None:
    fmt = get_format(name)
    assert isinstance(fmt, Fp8Format)
    generator = torch.Generator().manual_seed(0)
    weight, counts = torch.randn(200, 300, generator=generator), torch.rand(300, generator=generator) ** 4
    for importance in (None, counts):
        weigh = 1.0 if importance is None else importance
        found = search_fp8(weight, fmt, importance), round_to_fp8(weight, fmt)
        error = [float(((q.values(fmt) - weight).square() * weigh).sum()) for q in found]
        assert error[0] < error[1]


@pytest.mark.parametrize("name", known_quantizers())
def test_quantizers_take_fp8_or_say_that_they_do_not(name: str) -> None:
    step: dict[str, Any] = {"experts": "fp8_block128", "linear": "fp8_channel"}
    if Fp8Format in get_quantizer(name).formats:
        Quantize(**step, method=name)
        return
    wrong: dict[str, Any]
    for wrong in (step, {"linear": "fp8_channel"}, {"overrides": {"up": "fp8_channel"}}):
        with pytest.raises(MoecError, match=rf"quantiser {name}: fp8_\w+ is floating point.*imatrix or rtn"):
            Quantize(**wrong, method=name).run(Model(graphs.moe(), graphs.random_weights(graphs.moe())), Context())
    with pytest.raises(MoecError, match="is floating point"):
        AssignBits(formats=("int4_g32", "fp8_channel"), method=name)
    Quantize(embedding="fp8_channel", experts="int4_g32", method=name)  # embeddings are rounded to nearest


@pytest.mark.parametrize("name", NAMES)
def test_a_quantised_model_has_the_values_of_its_codes(name: str) -> None:
    graph = graphs.moe()
    model = Quantize(experts=name, linear=name, embedding=name).run(Model(graph, graphs.random_weights(graph)), Context())
    stored = as_stored(model)
    for param in model.graph.params.values():
        if len(param.type.shape) < 2 or param.format != name:
            continue
        experts: list[int | None] = list(range(6)) if len(param.type.shape) > 2 else [None]
        size = 0
        for expert in experts:
            weight = graphs.random_weights(graph).load(param.name, expert).numpy()
            expected = definition(weight, 128 if "block" in name else 0)
            for source in (model, stored):
                np.testing.assert_array_equal(source.weights.load(param.name, expert).numpy(), expected)
            packed, fmt = pack(model.weights, param, expert), get_format(name)
            assert isinstance(packed, Quantized)
            assert isinstance(fmt, Fp8Format)
            size += sum(int(a.nbytes) for a in fmt.pack(packed.codes, packed.scale).values())
        assert param_bytes(param) == size


def test_fp8_is_a_candidate_of_assign_bits() -> None:
    graph = graphs.moe()
    model = Model(graph, graphs.random_weights(graph))
    formats = ("int2_g32", "fp8_block128", "fp8_channel", "f32")
    problem = Problem(model, Context(), tuple(make_units(model, "projection", ["experts"])), formats, get_quantizer("rtn"))
    up = next(i for i, unit in enumerate(problem.units) if unit.name.endswith(".up"))
    assert problem.sizes[up].tolist() == [24 * (4 + 2), 24 * 16 + 4, 24 * (16 + 4), 24 * 16 * 4]
    weight = model.load("layers.0.experts.up", 0)
    np.testing.assert_array_equal(problem.changed(weight, "fp8_block128", None).numpy(), definition(weight.numpy(), 128))


def test_the_onnx_backend_says_what_to_use() -> None:
    graph = graphs.moe()
    model = Quantize(experts="fp8_channel").run(Model(graph, graphs.random_weights(graph)), Context())
    with pytest.raises(MoecError, match=r"onnx backend has no operators for fp8_channel: choose int8_channel.*backend tvm"):
        place(model.graph, portable=False, activations="float")


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    n=st.integers(1, 260),
    k=st.integers(1, 260),
    seed=st.integers(0, 999),
    spread=st.sampled_from([1e-4, 300.0]),
)
def test_weights_that_are_fp8_already_keep_their_values(name: str, n: int, k: int, seed: int, spread: float) -> None:
    fmt, rng = get_format(name), np.random.default_rng(seed)
    assert isinstance(fmt, Fp8Format)
    codes = rng.integers(0, 256, (n, k), np.uint8) & np.uint8(0xF7)  # no NaN, and mostly not the largest number
    rows = (rng.random((fmt.scale_rows(n), fmt.groups(k))) * spread + spread / 10).astype(np.float32)
    weight = fmt.dequantize(codes, np.repeat(rows, fmt.block or 1, axis=0)[:n])
    found = round_to_fp8(torch.from_numpy(weight), fmt)
    np.testing.assert_array_equal(fmt.dequantize(found.codes, found.scale), weight)
