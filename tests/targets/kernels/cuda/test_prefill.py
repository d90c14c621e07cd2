"""The kernels of many tokens, executed by the emulator: their numbers against float64 on the dequantised weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cuda.experts_layout import ExpertsLayout
from moec.targets.kernels.cuda.experts_prefill import PrefillSpec, arrange_func, down_func, gate_up_func
from moec.targets.kernels.cuda.shape import NarrowShape, Shape
from moec.targets.kernels.cuda.sort import combine_func, most_tiles, sort_func
from tests.targets.kernels import emulator
from tests.targets.kernels.cuda.packed import as_e4m3, relative, silu_experts, stack
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.run_cuda import CudaKernel

pytestmark = needs_emulator

NAN = {"uint16": 0x7FC0, "uint8": 0x7F, "float32": np.nan}
"""Not a number, in bfloat16, E4M3 and float32."""

FORMATS = {
    "folded": ("fp8_block128", "int4_g64_asym", "int8_g128", "fp8_block128", "bf16"),
    "E4M3": ("fp8_block128", "fp8_channel", "fp8_channel", "fp8_block128", "fp8_block128"),
    "at the end": ("fp8_channel", "int8_channel", "int4_channel", "fp8_channel", "int3_channel_asym"),
}


def split(x: NDArray[np.float32], terms: int) -> NDArray[np.uint16]:
    """x as bits of bfloat16 terms, rounded to nearest even: [terms, *x.shape]."""
    parts, rest = [], x.copy()
    for _ in range(terms):
        bits = rest.view(np.uint32)
        parts.append(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))
        rest = rest - (parts[-1].astype(np.uint32) << 16).view(np.float32)
    return np.stack(parts)


def run(spec: PrefillSpec, x: NDArray[np.float32], ids: NDArray[Any], routing: NDArray[np.float32], up: Any, down: Any) -> NDArray[Any]:
    """The layer's output [T, D]; `up` and `down` are arrays in order."""
    layout, size, (tokens, top_k) = spec.layout, spec.shape.tokens, ids.shape
    slots = tokens * top_k
    most = most_tiles(slots, layout.experts, size)
    sort = CudaKernel(sort_func(layout.experts, top_k, spec.ids_dtype, size, tokens))
    order, places, tiles = sort(ids, outputs=[((slots,), "int32"), ((slots,), "int32"), ((most + 1, 4), "int32")])
    terms, images = split(x, spec.shape.terms), list[NDArray[Any]]()
    hidden_types: list[tuple[Any, str]] = [((spec.shape.terms, slots, layout.padded_f), "uint16")]
    if spec.shape.cluster:
        images = CudaKernel(arrange_func(spec))(terms, order, tiles, outputs=spec.image_types(most, layout.d))
        hidden_types = spec.image_types(most, layout.f)
    hidden = [np.full(kind, NAN[dtype], dtype) for kind, dtype in hidden_types]  # where nothing is written
    y = np.full((slots, layout.d), np.nan, spec.dtype)
    CudaKernel(gate_up_func(spec))(terms, *images, order, tiles, *up, *hidden)
    CudaKernel(down_func(spec))(*hidden, tiles, *down, y)
    (out,) = CudaKernel(combine_func(layout.d, top_k, spec.dtype, tokens))(y, places, routing, outputs=[((tokens, layout.d), spec.dtype)])
    return out


@pytest.mark.parametrize(("kind", "d", "shape", "limit"), [
    ("folded", 520, Shape(16, 1, 4, 2, multiprocessors=0), 2e-5),
    ("folded", 264, Shape(16, 2, 4, 1, exact=False, depth=3, multiprocessors=2), 8e-3),  # all columns at once
    ("folded", 520, Shape(16, 2, 4, 1, exact=False, multiprocessors=2, cluster=1), 8e-3),
    ("folded", 520, Shape(16, 2, 3, 1, exact=False, multiprocessors=2, cluster=1, ring=4), 8e-3),
    ("folded", 520, Shape(16, 2, 4, 1, exact=False, multiprocessors=4, cluster=2), 8e-3),
    ("at the end", 520, Shape(16, 2, 4, 1, exact=False, multiprocessors=2, cluster=1, ring=3), 8e-3),
    ("folded", 392, Shape(16, 1, 3, 2, multiprocessors=2, groups=1), 2e-5),
    ("folded", 520, Shape(72, 2, 3, 1, exact=False, multiprocessors=4, cluster=2, groups=1), 8e-3),  # results in two parts
    ("folded", 392, Shape(16, 2, 4, 1, exact=False, residency=2, multiprocessors=4, cluster=4, groups=1), 8e-3),
    ("at the end", 392, Shape(144, 1, 6, 1, exact=False, depth=4, multiprocessors=4, cluster=4, halved=True), 8e-3),
    ("folded", 520, Shape(16, 2, 5, 1, exact=False, multiprocessors=2, cluster=1, ring=3, halved=True), 8e-3),
    ("folded", 264, Shape(24, 2, 4, 1, exact=True, residency=2, multiprocessors=2, cluster=2, groups=1, halved=True), 8e-3),
    ("at the end", 392, Shape(16, 1, 3, 2, exact=False, depth=2, multiprocessors=1), 2e-5),
    ("at the end", 264, Shape(8, 1, 16, 2, depth=2, multiprocessors=1), 2e-5),
    ("E4M3", 520, NarrowShape(16, 2, 4, depth=2, multiprocessors=2, cluster=1, chunk=16, buffers=1), 5e-2),
    ("E4M3", 392, NarrowShape(24, 2, 3, multiprocessors=4, cluster=2, ring=3, chunk=16, buffers=2), 5e-2),
    ("E4M3", 264, NarrowShape(32, 2, 3, multiprocessors=1, cluster=1, ring=3, chunk=8, buffers=2), 5e-2),
])  # fmt: skip
def test_the_experts_of_many_tokens(kind: str, d: int, shape: Shape, limit: float) -> None:
    check(kind, d, shape, limit)


@pytest.mark.parametrize(("kind", "d", "shape", "limit"), [
    ("folded", 264, Shape(24, 1, 4, 2, multiprocessors=0), 2e-5),
    ("folded", 392, Shape(16, 2, 3, 1, exact=False, depth=3, multiprocessors=2, ring=4), 8e-3),
    ("at the end", 264, Shape(8, 1, 16, 1, multiprocessors=1), 8e-3),
])  # fmt: skip
def test_without_products_of_warpgroups(kind: str, d: int, shape: Shape, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "ARCH", "sm_80")
    check(kind, d, shape, limit)


def check(kind: str, d: int, shape: Shape, limit: float) -> None:
    rng = np.random.default_rng(0)
    layout, top_k, tokens = ExpertsLayout(5, d, 72, FORMATS[kind], FORMATS[kind]), 2, 21
    spec = PrefillSpec(layout, ExpertActivation("silu"), tokens, top_k, shape=shape)
    (up, up_weight), (down, down_weight) = stack(layout.gate_up, rng), stack(layout.down, rng)
    x = rng.standard_normal((tokens, layout.d)).astype(np.float32)
    ids = np.stack([rng.permutation(6)[:top_k] for _ in range(tokens)])  # 5 is skipped
    ids[:, 0] = np.where(ids[:, 0] == 1, 2, ids[:, 0])  # one expert has more than a tile
    routing = rng.random((tokens, top_k)).astype(np.float32)
    found = run(spec, x, ids, routing, up.values(), down.values())
    expected = silu_experts(layout, layout.deinterleave(up_weight), down_weight, x, ids, routing)
    assert relative(found, expected) < limit
    if shape.narrow:  # the same rounding, which in few tokens falls on the other side for one of the hidden values
        expected = silu_experts(layout, layout.deinterleave(up_weight), down_weight, x, ids, routing, as_e4m3)
        errors = [relative(*both) for both in zip(found, expected, strict=True) if both[1].any()]
        assert np.median(errors) < 1e-5
        assert max(errors) < 5e-2
