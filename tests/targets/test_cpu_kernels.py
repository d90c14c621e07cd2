"""The CPU kernels against float64 arithmetic on the dequantised weights, and the law of their layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tvm import relax, tirx
from tvm.target import Target, codegen

from moec.runtime.errors import MoecError
from moec.targets.kernels.cpu import (
    ExpertActivation,
    ExpertsLayout,
    Isa,
    LaneLayout,
    embedding,
    embedding_func,
    experts,
    experts_func,
    linear,
    linear_func,
)

INTEGER = [f"int{b}_{g}{a}" for b in (2, 3, 4, 8) for g in ("g32", "g64", "g128", "channel") for a in ("", "_asym")]
FLOATS = ["f32", "f16", "bf16"]
TOLERANCE = 6e-5  # 16-bit activations: half a step of 1 / 32767 of a group's largest, against the group's typical value
HOST = codegen.llvm_get_system_cpu()
VECTORS = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}  # what a lesser x86 target may use

Array = NDArray[Any]


def target(mcpu: str = HOST) -> Target:
    return Target({"kind": "llvm", "mcpu": mcpu})


def features(mcpu: str) -> set[str]:
    return set(codegen.llvm_get_cpu_features(target(mcpu)))


ISA = Isa.of(target())


def compile_func(func: tirx.PrimFunc, mcpu: str = HOST) -> Callable[..., None]:
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    found: Callable[..., None] = tvm.compile(module, target=target(mcpu))["main"]
    return found


def call(run: Callable[..., None], *arrays: Array, out: tuple[int, ...]) -> Array:
    result = tvm.runtime.tensor(np.full(out, np.nan, np.float32))
    run(*(tvm.runtime.tensor(a) for a in arrays), result)
    found: Array = result.numpy()
    return found


def draw_codes(rng: np.random.Generator, layout: LaneLayout, *lead: int) -> tuple[Array, Array, Array | None]:
    """Random codes [..., N, K], scales and zero points [..., N, groups]."""
    integer = layout.integer
    assert integer is not None
    side = (*lead, layout.n, layout.groups)
    codes = rng.integers(0, integer.levels, (*lead, layout.n, layout.k), np.uint8)
    scale = ((0.5 + rng.random(side)) / integer.levels / layout.k**0.5).astype(np.float16)
    return codes, scale, None if integer.symmetric else rng.integers(0, integer.levels, side, np.uint8)


def draw_weight(rng: np.random.Generator, layout: LaneLayout, *lead: int) -> tuple[Array, dict[str, Array]]:
    """Random weights [..., N, K] as float64, and their arrays."""
    if (integer := layout.integer) is not None:
        codes, scale, zero = draw_codes(rng, layout, *lead)
        full = np.full_like(scale, integer.levels // 2, np.uint8) if zero is None else zero
        values = integer.dequantize(codes, scale, full).astype(np.float64)
        return values, layout.tile(codes, scale, zero)
    values = rng.standard_normal((*lead, layout.n, layout.k), np.float32) / layout.k**0.5
    if layout.format == "bf16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64), layout.tile_values(bits)
    stored = values.astype(np.float16 if layout.format == "f16" else np.float32)
    return stored.astype(np.float64), layout.tile_values(stored)


def close(found: Array, expected: Array, layout: LaneLayout, steps: int = 1) -> None:
    """Equal up to a few parts in 10^5 of the typical size of the result, for so many matrix products in a row."""
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < steps * (TOLERANCE if layout.integer else 1e-6)


# the layout


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
    assert LaneLayout(17, 33, "bf16").nbytes() == 32 * 33 * 2


@pytest.mark.parametrize("name", ["int4_g48", "f64", "int9_g32"])
def test_formats_without_a_kernel_are_refused(name: str) -> None:
    with pytest.raises(MoecError, match=r"format|groups"):
        LaneLayout(64, 128, name)


# linear


@pytest.mark.parametrize("name", INTEGER + FLOATS)
def test_linear_of_one_token(name: str) -> None:
    rng = np.random.default_rng()
    layout = LaneLayout(43, 200, name)  # neither divisible by 16 nor K by a group
    expected, arrays = draw_weight(rng, layout)
    x = rng.standard_normal((1, layout.k), np.float32)
    run = compile_func(linear_func(layout, 1, bias=False, isa=ISA))
    close(call(run, x, *arrays.values(), out=(1, layout.n)), x.astype(np.float64) @ expected.T, layout)


@pytest.mark.parametrize("name", ["int2_g32_asym", "int3_g64", "int4_channel_asym", "int4_g64", "int8_g128_asym", "bf16"])
def test_linear_of_any_number_of_tokens(name: str) -> None:
    rng = np.random.default_rng()
    layout = LaneLayout(50, 130, name)
    expected, arrays = draw_weight(rng, layout)
    bias = rng.standard_normal(layout.n, np.float32)
    run = compile_func(linear_func(layout, None, bias=True, isa=ISA))
    for tokens in (1, 2, 3, 7, 33):
        x = rng.standard_normal((tokens, layout.k), np.float32)
        close(call(run, x, *arrays.values(), bias, out=(tokens, layout.n)), x @ expected.T + bias, layout)


@given(st.sampled_from(INTEGER + FLOATS), st.integers(1, 70), st.integers(1, 300), st.integers(1, 9), st.integers(0, 2**32 - 1))
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
@pytest.mark.parametrize("name", ["int3_g32_asym", "f16"])
def test_linear_on_lesser_instruction_sets(mcpu: str, name: str) -> None:
    if "x86_64" not in codegen.llvm_get_system_triple() or not features(mcpu) & VECTORS <= features(HOST):
        pytest.skip(f"this machine cannot run {mcpu}")
    rng = np.random.default_rng()
    layout = LaneLayout(50, 130, name)
    expected, arrays = draw_weight(rng, layout)
    for tokens in (1, 5):
        x = rng.standard_normal((tokens, layout.k), np.float32)
        run = compile_func(linear_func(layout, tokens, bias=False, isa=Isa.of(target(mcpu))), mcpu)
        close(call(run, x, *arrays.values(), out=(tokens, layout.n)), x @ expected.T, layout)


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


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


REFERENCE: Mapping[str, Callable[[Array], Array]] = {
    "silu": lambda x: x * sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
}


def reference(layout: ExpertsLayout, activation: ExpertActivation, gate_up: Array, down: Array, biases: tuple[Array, Array] | None) -> Any:
    """The function (x [D], expert) -> [D], in float64."""

    def run(x: Array, e: int) -> Array:
        hidden = gate_up[e] @ x + (biases[0][e] if biases else 0)
        if not layout.gated:
            hidden = REFERENCE[activation.kind](hidden)
        else:
            gate, up = hidden[: layout.f], hidden[layout.f :]
            if activation.kind == "clamped_swiglu":
                gate, up = np.minimum(gate, activation.limit), np.clip(up, -activation.limit, activation.limit)
                hidden = (up + 1) * gate * sigmoid(activation.alpha * gate)
            else:
                hidden = REFERENCE[activation.kind](gate) * up
        result: Array = down[e] @ hidden + (biases[1][e] if biases else 0)
        return result

    return run


def check_experts(
    layout: ExpertsLayout, tokens: list[int], *, activation: ExpertActivation | None = None, top_k: int = 2, static: bool = False,
    biased: bool = False, routing: str = "random", ids_dtype: str = "int64",
) -> None:  # fmt: skip
    """Compare with the reference; `tokens` are the numbers of tokens that one function is run with."""
    rng = np.random.default_rng()
    activation = activation or ExpertActivation()
    rows = LaneLayout(layout.parts * layout.f, layout.d, layout.gate_up_format)
    gate_up, plain = draw_weight(rng, rows, layout.experts)
    if rows.integer:
        codes, scale, zero = rows.untile(plain)
        zeros = None if rows.integer.symmetric else layout.interleave(zero)
        arrays = layout.gate_up.tile(layout.interleave(codes), layout.interleave(scale), zeros)
    else:
        arrays = layout.gate_up.tile_values(layout.interleave(rows.untile_values(plain)))
    down, down_arrays = draw_weight(rng, layout.down, layout.experts)
    stored = [*arrays.values(), *down_arrays.values()]
    assert [(a.shape, str(a.dtype)) for a in stored] == list(layout.arrays().values())
    biases = None
    if biased:
        biases = (rng.standard_normal(gate_up.shape[:2], np.float32), rng.standard_normal(down.shape[:2], np.float32))
    func = experts_func(
        layout, activation, ISA, tokens=tokens[0] if static else None, top_k=top_k, ids_dtype=ids_dtype, biases=biased
    )  # fmt: skip
    run, expert = compile_func(func), reference(layout, activation, gate_up, down, biases)
    for t in tokens:
        x, weights = rng.standard_normal((t, layout.d), np.float32), rng.random((t, top_k), np.float32)
        ids = np.stack([rng.permutation(layout.experts)[:top_k] for _ in range(t)]).astype(ids_dtype)
        if routing == "one":
            ids[:] = np.arange(top_k)
        extra = () if biases is None else layout.biases(*biases)
        found = call(run, x, ids, weights, *stored, *extra, out=(t, layout.d))
        expected = np.stack(
            [sum(w * expert(row, e) for w, e in zip(*pair, strict=True)) for row, *pair in zip(x, weights, ids, strict=True)]
        )
        close(found, expected, layout.down, steps=2)


@pytest.mark.parametrize("name", ["int2_g64", "int3_g32_asym", "int4_g64", "int8_channel", "bf16"])
def test_experts_of_one_token(name: str) -> None:
    check_experts(ExpertsLayout(7, 70, 50, name, name), [1], static=True, top_k=3)


@pytest.mark.parametrize("kind", [*REFERENCE, "clamped_swiglu"])
@pytest.mark.parametrize("gated", [True, False])
def test_expert_activations(kind: str, gated: bool) -> None:
    if kind == "clamped_swiglu" and not gated:
        pytest.skip("defined for gated experts only")
    check_experts(ExpertsLayout(4, 32, 24, "f32", "f32", gated), [1], static=True, activation=ExpertActivation(kind), biased=True)


def test_experts_of_any_number_of_tokens() -> None:
    check_experts(ExpertsLayout(9, 70, 50, "int3_g32", "int4_g32_asym"), [1, 2, 3, 7, 33], ids_dtype="int32", biased=True)


def test_more_tokens_than_a_block() -> None:
    check_experts(ExpertsLayout(4, 32, 16, "f32", "f32"), [700])


@pytest.mark.parametrize("tokens", [1, 20])
def test_all_tokens_choose_the_same_experts(tokens: int) -> None:
    check_experts(ExpertsLayout(6, 40, 24, "f32", "f16"), [tokens], static=True, routing="one", top_k=1)


# embedding


@pytest.mark.parametrize("name", [*INTEGER[::3], "int5_g32", *FLOATS])
def test_embedding_rows_are_exact(name: str) -> None:
    rng = np.random.default_rng()
    layout = LaneLayout(50, 100, name)
    expected, arrays = draw_weight(rng, layout)
    ids = rng.integers(0, layout.n, 9)
    found = call(compile_func(embedding_func(layout, None)), ids, *arrays.values(), out=(9, layout.k))
    np.testing.assert_array_equal(found, expected[ids].astype(np.float32))


# as Relax operators


def test_operators_in_a_relax_function() -> None:
    rng = np.random.default_rng()
    head, moe = LaneLayout(60, 64, "int4_g32"), ExpertsLayout(4, 64, 32, "f32", "f32")
    t = tirx.Var("t", "int64")
    bb = relax.BlockBuilder()

    def variables(arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, relax.Var]:
        return {name: relax.Var(name, relax.TensorType(shape, dtype)) for name, (shape, dtype) in arrays.items()}

    of_head, of_moe = variables(head.arrays()), variables(moe.arrays())
    ids = relax.Var("ids", relax.TensorType((t,), "int64"))
    routed, weights = (relax.Var(n, relax.TensorType((t, 2), d)) for n, d in (("routed", "int64"), ("weights", "float32")))
    with bb.function("main", [ids, routed, weights, *of_head.values(), *of_moe.values()]):
        with bb.dataflow():
            x = embedding(bb, ids, of_head, head)
            y = experts(bb, x, routed, weights, of_moe, moe, ExpertActivation("relu"), ISA)
            result = bb.emit_output(linear(bb, y, of_head, head, ISA))
        bb.emit_func_output(result)
    vm = relax.VirtualMachine(tvm.compile(bb.get(), target=target()), tvm.cpu())

    table, head_arrays = draw_weight(rng, head)
    gate_up = rng.standard_normal((4, 64, 64), np.float32)
    down, down_arrays = draw_weight(rng, moe.down, 4)
    tokens, choice = rng.integers(0, 60, 5), np.stack([rng.permutation(4)[:2] for _ in range(5)])
    mix = rng.random((5, 2), np.float32)
    stored = [*head_arrays.values(), *moe.gate_up.tile_values(moe.interleave(gate_up)).values(), *down_arrays.values()]
    found = vm["main"](*(tvm.runtime.tensor(a) for a in (tokens, choice, mix, *stored))).numpy()
    expert = reference(moe, ExpertActivation("relu"), gate_up.astype(np.float64), down, None)
    expected = np.stack([sum(mix[i, s] * expert(table[tokens[i]], choice[i, s]) for s in range(2)) for i in range(5)]) @ table.T
    close(found, expected, head)
