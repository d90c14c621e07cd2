"""The CPU kernels of experts and embeddings against float64 arithmetic on the dequantised weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from moec.targets.kernels.cpu import (
    ExpertActivation,
    ExpertsLayout,
    LaneLayout,
    embedding,
    embedding_func,
    experts,
    experts_func,
    linear,
)
from tests.cpu_kernels import (
    FLOATS,
    FP8,
    INTEGER,
    ISA,
    Array,
    call,
    close,
    compile_func,
    draw_experts,
    draw_weight,
    target,
)


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
    gate_up, down, stored = draw_experts(rng, layout)
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


@pytest.mark.parametrize("name", ["int2_g64", "int3_g32_asym", "int4_g64", "int8_channel", "ternary_channel", "binary_g32", "bf16", *FP8])
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


def test_ternary_and_binary_experts_of_any_number_of_tokens() -> None:
    check_experts(ExpertsLayout(5, 70, 400, "binary_g64", "ternary_g32"), [1, 6, 13])


def test_fp8_experts_of_any_number_of_tokens() -> None:
    check_experts(ExpertsLayout(5, 270, 140, "fp8_block128", "fp8_channel"), [1, 6, 13], biased=True)


def test_more_tokens_than_a_block() -> None:
    check_experts(ExpertsLayout(4, 32, 16, "f32", "f32"), [700])


@pytest.mark.parametrize("tokens", [1, 20])
def test_all_tokens_choose_the_same_experts(tokens: int) -> None:
    check_experts(ExpertsLayout(6, 40, 24, "f32", "f16"), [tokens], static=True, routing="one", top_k=1)


# embedding


@pytest.mark.parametrize("name", [*INTEGER[::3], "int5_g32", "ternary_g32", "ternary_channel", "binary_g64", *FLOATS, *FP8])
def test_embedding_rows_are_exact(name: str) -> None:
    rng = np.random.default_rng()
    layout = LaneLayout(50, 330, name)
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
