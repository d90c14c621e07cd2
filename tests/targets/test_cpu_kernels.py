"""The CPU kernels of linear layers against float64 arithmetic on the dequantised weights, and the law of their layout."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.target import Target, codegen

from moec.runtime.errors import MoecError
from moec.targets.kernels.cpu import (
    ExpertsLayout,
    Isa,
    LaneLayout,
    linear_func,
)
from tests.cpu_kernels import (
    FEW,
    FLOATS,
    FP8,
    HOST,
    INTEGER,
    ISA,
    TOLERANCE,
    VECTORS,
    call,
    close,
    compile_func,
    draw_codes,
    draw_weight,
    features,
    target,
    typical,
)


@given(
    st.integers(1, 8), st.sampled_from(["g32", "g64", "g128", "channel"]), st.booleans(),
    st.integers(1, 40), st.integers(1, 150), st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_untile_inverts_tile(bits: int, group: str, asymmetric: bool, n: int, k: int, seed: int) -> None:
    layout = LaneLayout(n, k, f"int{bits}_{group}" + "_asym" * asymmetric)
    codes, scale, zero = draw_codes(np.random.default_rng(seed), layout, 2)
    arrays = layout.tile(codes, scale, zero)
    assert {name: (a.shape, str(a.dtype)) for name, a in arrays.items()} == layout.arrays(2)
    assert sum(a.nbytes for a in arrays.values()) == layout.nbytes(2)
    found_codes, found_scale, found_zero = layout.untile(arrays)
    np.testing.assert_array_equal(found_codes, codes)
    np.testing.assert_array_equal(found_scale, scale)
    np.testing.assert_array_equal(found_zero, 1 << (bits - 1) if zero is None else zero)


@given(st.sampled_from(FEW), st.integers(1, 40), st.integers(1, 700), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=60)
def test_untile_inverts_tile_of_few_values(name: str, n: int, k: int, seed: int) -> None:
    layout = LaneLayout(n, k, name)
    codes, scale, _ = draw_codes(np.random.default_rng(seed), layout, 2)
    arrays = layout.tile(codes, scale)
    assert {name: (a.shape, str(a.dtype)) for name, a in arrays.items()} == layout.arrays(2)
    found_codes, found_scale, found_zero = layout.untile(arrays)
    np.testing.assert_array_equal(found_codes, codes)
    np.testing.assert_array_equal(found_scale, scale)
    assert (found_zero == 1).all()


@given(st.sampled_from(FP8), st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_untile_inverts_tile_of_fp8(name: str, n: int, k: int, seed: int) -> None:
    layout = LaneLayout(n, k, name)
    codes, scale, _ = draw_codes(np.random.default_rng(seed), layout, 2)
    arrays = layout.tile(codes, scale)
    assert {name: (a.shape, str(a.dtype)) for name, a in arrays.items()} == layout.arrays(2)
    for got, expected in zip(layout.untile(arrays), (codes, scale, np.zeros(scale.shape, np.uint8)), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("name", FLOATS)
def test_untile_values_inverts_tile_values(name: str) -> None:
    layout = LaneLayout(37, 21, name)
    bits = np.random.default_rng().integers(0, 1 << 15, (3, 37, 21), np.uint16)
    stored = {"bf16": bits, "f16": bits.view(np.float16), "f32": bits.astype(np.float32)}[name]
    arrays = layout.tile_values(stored)
    assert {key: (a.shape, str(a.dtype)) for key, a in arrays.items()} == layout.arrays(3)
    assert layout.untile_values(arrays).tobytes() == stored.tobytes()


@pytest.mark.parametrize("gated", [True, False])
def test_deinterleave_inverts_interleave(gated: bool) -> None:
    layout = ExpertsLayout(3, 32, 21, "f32", "f32", gated)
    rows = np.random.default_rng().random((3, layout.parts * 21, 5))
    np.testing.assert_array_equal(layout.deinterleave(layout.interleave(rows)), rows)


def test_bytes_in_closed_form() -> None:
    assert LaneLayout(2048, 2048, "int4_g64").nbytes() == 2048 * 2048 // 2 + 2048 * 32 * 2
    assert LaneLayout(2048, 2048, "int3_g128_asym").nbytes(8) == 8 * (2048 * 2048 * 3 // 8 + 2048 * 16 * 3)
    assert LaneLayout(2048, 2048, "binary_g128").nbytes() == 2048 * 2048 // 8 + 2048 * 16 * 2
    assert LaneLayout(2048, 2048, "ternary_g128").nbytes() == 2048 * 4 * (3 * 32 + 7) + 2048 * 16 * 2  # 103 words for 102.4
    assert LaneLayout(384, 384, "ternary_channel").nbytes() == 384 * (4 * 20 + 2)
    assert LaneLayout(17, 33, "bf16").nbytes() == 32 * 33 * 2


@pytest.mark.parametrize("name", ["int4_g48", "f64", "int9_g32"])
def test_formats_without_a_kernel_are_refused(name: str) -> None:
    with pytest.raises(MoecError, match=r"format|groups"):
        LaneLayout(64, 128, name)


# linear


@pytest.mark.parametrize("name", INTEGER + FEW + FLOATS + FP8)
def test_linear_of_one_token(name: str) -> None:
    rng = np.random.default_rng()
    layout = LaneLayout(43, 200, name)  # neither divisible by 16 nor K by a group
    expected, arrays = draw_weight(rng, layout)
    x = rng.standard_normal((1, layout.k), np.float32)
    run = compile_func(linear_func(layout, 1, bias=False, isa=ISA))
    close(call(run, x, *arrays.values(), out=(1, layout.n)), x.astype(np.float64) @ expected.T, layout, size=typical(x, expected))


@pytest.mark.parametrize(
    "name",
    ["int2_g32_asym", "int3_g64", "int4_channel_asym", "int8_g128_asym", "ternary_g32", "ternary_channel", "binary_g64", "bf16", *FP8],
)
def test_linear_of_any_number_of_tokens(name: str) -> None:
    rng = np.random.default_rng()
    layout = LaneLayout(50, 130, name)
    expected, arrays = draw_weight(rng, layout)
    bias = rng.standard_normal(layout.n, np.float32)
    run = compile_func(linear_func(layout, None, bias=True, isa=ISA))
    for tokens in (1, 2, 3, 7, 33):
        x = rng.standard_normal((tokens, layout.k), np.float32)
        close(call(run, x, *arrays.values(), bias, out=(tokens, layout.n)), x @ expected.T + bias, layout, size=typical(x, expected))


@given(st.sampled_from(INTEGER + FEW + FLOATS + FP8), st.integers(1, 70), st.integers(1, 300), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=8)
def test_linear_of_any_shape(name: str, n: int, k: int, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = LaneLayout(n, k, name)
    expected, arrays = draw_weight(rng, layout)
    x = rng.standard_normal((tokens, k), np.float32)
    found = call(compile_func(linear_func(layout, tokens, bias=False, isa=ISA)), x, *arrays.values(), out=(tokens, n))
    scale = np.abs(x).max(initial=1e-3) * np.abs(expected).max() * k  # single products may cancel
    np.testing.assert_allclose(found, x.astype(np.float64) @ expected.T, atol=TOLERANCE * scale)


@pytest.mark.parametrize("mcpu", ["x86-64-v2", "haswell", "skylake-avx512"])
@pytest.mark.parametrize("name", ["int3_g32_asym", "ternary_g64", "binary_g32", "f16", "fp8_block128"])
def test_linear_on_lesser_instruction_sets(mcpu: str, name: str) -> None:
    if "x86_64" not in codegen.llvm_get_system_triple() or not features(mcpu) & VECTORS <= features(HOST):
        pytest.skip(f"this machine cannot run {mcpu}")
    rng = np.random.default_rng()
    layout = LaneLayout(50, 130, name)
    expected, arrays = draw_weight(rng, layout)
    for tokens in (1, 5):
        x = rng.standard_normal((tokens, layout.k), np.float32)
        run = compile_func(linear_func(layout, tokens, bias=False, isa=Isa.of(target(mcpu))), mcpu)
        close(call(run, x, *arrays.values(), out=(tokens, layout.n)), x @ expected.T, layout, size=typical(x, expected))


def test_compiles_for_neon() -> None:
    neon = Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "neoverse-n1"})
    func = linear_func(LaneLayout(64, 128, "int4_g64"), 1, bias=False, isa=Isa.of(neon)).with_attr("global_symbol", "main")
    assert "mla" in tvm.compile(tvm.IRModule({"main": func}), target=neon).mod.inspect_source("asm")


def test_extreme_codes_and_activations_do_not_overflow() -> None:
    layout = LaneLayout(16, 1024, "int8_channel_asym")
    codes, scale, zero = np.full((16, 1024), 255, np.uint8), np.ones((16, 1), np.float16), np.zeros((16, 1), np.uint8)
    x = np.full((1, 1024), 1e20, np.float32)
    run = compile_func(linear_func(layout, 1, bias=False, isa=ISA))
    found = call(run, x, *layout.tile(codes, scale, zero).values(), out=(1, 16))
    np.testing.assert_allclose(found, 255.0 * 1024 * 1e20, rtol=1e-5)


def test_not_a_number_stays_one() -> None:
    rng = np.random.default_rng()
    layout = LaneLayout(16, 128, "int4_g32")
    x = rng.standard_normal((3, 128), np.float32)
    x[1, 77] = np.nan
    _, arrays = draw_weight(rng, layout)
    found = call(compile_func(linear_func(layout, 3, bias=False, isa=ISA)), x, *arrays.values(), out=(3, 16))
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


# experts
