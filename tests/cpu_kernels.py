"""What the tests of the CPU kernels share: targets, compiled functions, random packed weights, tolerances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import tirx
from tvm.target import Target, codegen

from moec.targets.kernels.cpu import ExpertsLayout, Isa, LaneLayout

INTEGER = [f"int{b}_{g}{a}" for b in (2, 3, 4, 8) for g in ("g32", "g64", "g128", "channel") for a in ("", "_asym")]
FEW = [f"{kind}_{g}" for kind in ("ternary", "binary") for g in ("g32", "g64", "g128", "channel")]
FLOATS = ["f32", "f16", "bf16"]
FP8 = ["fp8_channel", "fp8_block128"]
TOLERANCE = 1e-4  # 16-bit activations: half a step of 1 / 32767 of a group's largest, against the group's typical value
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
    if (fp8 := layout.fp8) is not None:
        codes = rng.integers(0, 256, (*lead, layout.n, layout.k), np.uint8)
        rows = ((0.5 + rng.random((*lead, fp8.scale_rows(layout.n), layout.groups))) / 448 / layout.k**0.5).astype(np.float32)
        return codes ^ (codes & 0x7F == 0x7F), np.repeat(rows, fp8.block or 1, axis=-2)[..., : layout.n, :], None  # there is no NaN
    assert integer is not None
    side = (*lead, layout.n, layout.groups)
    codes = rng.integers(0, integer.levels, (*lead, layout.n, layout.k), np.uint8) * np.uint8(integer.step)
    scale = ((0.5 + rng.random(side)) / integer.levels / layout.k**0.5).astype(np.float16)
    return codes, scale, None if integer.symmetric else rng.integers(0, integer.levels, side, np.uint8)


def draw_weight(rng: np.random.Generator, layout: LaneLayout, *lead: int) -> tuple[Array, dict[str, Array]]:
    """Random weights [..., N, K] as float64, and their arrays."""
    if layout.fp8 is not None:
        codes, scale, _ = draw_codes(rng, layout, *lead)
        wide = np.repeat(scale, layout.fp8.group_size(layout.k), axis=-1)[..., : layout.k]
        return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * wide, layout.tile(codes, scale)
    if (integer := layout.integer) is not None:
        codes, scale, zero = draw_codes(rng, layout, *lead)
        full = np.full_like(scale, integer.middle, np.uint8) if zero is None else zero
        values = integer.dequantize(codes, scale, full).astype(np.float64)
        return values, layout.tile(codes, scale, zero)
    values = rng.standard_normal((*lead, layout.n, layout.k), np.float32) / layout.k**0.5
    if layout.format == "bf16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64), layout.tile_values(bits)
    stored = values.astype(np.float16 if layout.format == "f16" else np.float32)
    return stored.astype(np.float64), layout.tile_values(stored)


def draw_experts(rng: np.random.Generator, layout: ExpertsLayout) -> tuple[Array, Array, list[Array]]:
    """Random gate_up [E, 2F or F, D] and down [E, D, F] as float64, low-rank factors added to them, and the kernels' arrays in order."""
    values, stored = dict[str, Array](), list[Array]()
    for name, matrix in layout.matrices().items():
        if matrix.format == "zero":
            rows = layout.parts * layout.f if name == "gate_up" else layout.d
            values[name] = np.zeros((layout.experts, rows, matrix.k))
        else:
            values[name], arrays = _draw_matrix(rng, layout, matrix, interleaved=name in ("gate_up", "gate_up_left"))
            stored += arrays.values()
    assert [(a.shape, str(a.dtype)) for a in stored] == list(layout.arrays().values())
    for name in ("gate_up", "down"):
        if f"{name}_left" in values:
            values[name] = values[name] + values[f"{name}_left"] @ values[f"{name}_right"]
    return values["gate_up"], values["down"], stored


def _draw_matrix(
    rng: np.random.Generator, layout: ExpertsLayout, matrix: LaneLayout, *, interleaved: bool
) -> tuple[Array, dict[str, Array]]:
    if not interleaved:
        return draw_weight(rng, matrix, layout.experts)
    rows = LaneLayout(layout.parts * layout.f, matrix.k, matrix.format)
    values, plain = draw_weight(rng, rows, layout.experts)
    if not rows.integer and not rows.fp8:
        return values, matrix.tile_values(layout.interleave(rows.untile_values(plain)))
    codes, scale, zero = rows.untile(plain)
    zeros = None if rows.integer is None or rows.integer.symmetric else layout.interleave(zero)
    return values, matrix.tile(layout.interleave(codes), layout.interleave(scale), zeros)


def typical(x: Array, weight: Array) -> Array:
    """The size of x @ weight.T if the signs of what is added up were random: rows of one sign may cancel each other."""
    found: Array = np.sqrt(x.astype(np.float64) ** 2 @ weight.T**2)
    return found


def close(found: Array, expected: Array, layout: LaneLayout, steps: int = 1, size: Array | None = None) -> None:
    """Equal up to a part in 10^4 of the typical size of the result, for so many matrix products in a row.

    Args:
        size: of the result if what is added up did not cancel; that of `expected` unless given.
    """
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected if size is None else size)
    assert error < steps * (TOLERANCE if layout.integer else 1e-6)


# the layout
