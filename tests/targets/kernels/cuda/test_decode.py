"""The kernels of one token and of few, executed by the emulator: their numbers against float64 on the dequantised weights."""

from __future__ import annotations

import numpy as np
import pytest

from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cuda.calls import Gpu
from moec.targets.kernels.cuda.experts_decode import DecodeSpec, down_func, gate_up_func
from moec.targets.kernels.cuda.experts_layout import ExpertsLayout
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.linear import LinearSpec, decode_func, few_tokens
from tests.targets.kernels.cuda.packed import packed, relative, silu_experts, stack
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.run_cuda import CudaKernel

pytestmark = needs_emulator

FORMATS = [
    "bf16", "int8_g32", "int8_g128_asym", "int7_channel", "int6_g64_asym", "int5_g128_asym", "int4_g128", "int4_g32_asym", "int3_channel",
    "int3_g32_asym", "int2_g64", "int2_channel_asym", "int1_g128_asym", "ternary_g64",
    "fp8_channel", "fp8_block128",
]  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_linear_layer_of_one_token(name: str) -> None:
    rng = np.random.default_rng(0)
    layout = FragmentLayout(40, 392, name)
    arrays, weight = packed(layout, rng)
    x, bias = rng.standard_normal((1, layout.k)).astype(np.float32), rng.standard_normal(layout.n).astype(np.float32)
    kernel = CudaKernel(decode_func(LinearSpec(layout, bias=True, warps=4, splits=2)))
    (found,) = kernel(x, *(array[None] for array in arrays.values()), bias, outputs=[((1, layout.n), "float32")])
    assert relative(found, x.astype(np.float64) @ weight.T + bias) < 2e-5


@pytest.mark.parametrize(("name", "tokens", "splits"), [("int4_g32", 2, 2), ("bf16", 8, 1), ("int3_channel", 5, 4)])
def test_a_linear_layer_of_several_tokens(name: str, tokens: int, splits: int) -> None:
    rng = np.random.default_rng(2)
    layout = FragmentLayout(40, 264, name)
    arrays, weight = packed(layout, rng)
    x, bias = rng.standard_normal((tokens, layout.k)).astype(np.float32), rng.standard_normal(layout.n).astype(np.float32)
    spec = LinearSpec(layout, bias=True, tokens=tokens, warps=4, splits=splits)
    (found,) = CudaKernel(decode_func(spec))(
        x, *(array[None] for array in arrays.values()), bias, outputs=[((tokens, layout.n), "float32")]
    )
    assert relative(found, x.astype(np.float64) @ weight.T + bias) < 2e-5


def test_which_linear_kernel_runs() -> None:
    gpu = Gpu(232_448, 132)
    square, head = FragmentLayout(2048, 2048, "int4_g128"), FragmentLayout(50304, 2048, "int4_g128")
    assert few_tokens(square, False, 1, gpu) == LinearSpec(square)
    assert few_tokens(square, False, 8, gpu) == LinearSpec(square, tokens=8)
    assert few_tokens(head, False, 8, gpu) == LinearSpec(head, tokens=8, splits=1)  # 8 tiles of a block share its activations
    assert few_tokens(square, False, None, gpu) is few_tokens(square, False, 9, gpu) is None
    assert few_tokens(FragmentLayout(2048, 14336, "int4_g128"), False, 8, gpu) is None  # more shared memory than there is


@pytest.mark.parametrize(
    ("formats", "tokens", "terms"),
    [
        ("int4_g32", 1, 2),
        (("int3_g32", "int4_g32_asym", "int3_g32", "bf16"), 3, 1),
        (("fp8_block128", "int4_g32", "fp8_channel", "fp8_block128"), 3, 2),
    ],
)
def test_the_experts_of_few_tokens(formats: str | tuple[str, ...], tokens: int, terms: int) -> None:
    rng = np.random.default_rng(1)
    layout, top_k = ExpertsLayout(4, 160, 40, formats, formats), 2
    spec = DecodeSpec(layout, ExpertActivation("silu"), tokens, top_k, dtype="float32", terms=terms, warps=4, splits=2, down_warps=2)
    up, up_weight = stack(layout.gate_up, rng)
    down, down_weight = stack(layout.down, rng)
    x = rng.standard_normal((tokens, layout.d)).astype(np.float32)
    ids = np.array([[3, 1], [1, 4], [1, 2]])[:tokens]
    routing = rng.random((tokens, top_k)).astype(np.float32)
    (hidden,) = CudaKernel(gate_up_func(spec))(x, ids, *up.values(), outputs=[(spec.hidden_shape, "uint32")])
    (found,) = CudaKernel(down_func(spec))(hidden, ids, routing, *down.values(), outputs=[((tokens, layout.d), "float32")])
    expected = silu_experts(layout, layout.deinterleave(up_weight), down_weight, x, ids, routing)
    assert relative(found, expected) < (2e-5 if terms == 2 else 5e-3)
