"""Random packed weights for the CUDA kernels, what they stand for, and what experts compute with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from moec.targets.kernels.cuda.experts_layout import ExpertsLayout, Stack
from moec.targets.kernels.cuda.layout import BLOCK, FragmentLayout

MULTIPROCESSORS = 132
"""Of an H100."""


def packed(layout: FragmentLayout, rng: np.random.Generator, *lead: int) -> tuple[dict[str, NDArray[Any]], NDArray[np.float64]]:
    """The arrays of random weights [*lead, n, k], and their values."""
    shape = (*lead, layout.n, layout.k)
    if layout.fp8 is not None:
        codes = rng.integers(0, 256, shape, np.uint8)
        codes ^= codes & 0x7F == 0x7F  # there is no NaN
        rows = (0.01 + 0.02 * rng.random((*lead, -(-layout.n // 8) if layout.fp8.block else layout.n, layout.groups))).astype(np.float32)
        scale = np.repeat(rows, 8, axis=-2)[..., : layout.n, :] if layout.fp8.block else rows  # rows of half a tile have one
        wide = np.repeat(scale, BLOCK if layout.fp8.block else layout.k, axis=-1)[..., : layout.k]
        return dict(layout.tile(codes, scale)), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * wide
    if layout.integer is None:
        bits = (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return dict(layout.tile_values(bits)), (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    integer, sides = layout.integer, (*lead, layout.n, layout.groups)
    codes = rng.integers(0, integer.levels, shape, np.uint8)
    scales = (0.01 + 0.02 * rng.random(sides)).astype(np.float16)
    zero = rng.integers(0, integer.levels, sides, np.uint8)
    if integer.symmetric:
        zero[...] = integer.levels // 2
    size = layout.k if layout.groups == 1 else integer.group
    both = [np.repeat(side.astype(np.float64), size, axis=-1)[..., : layout.k] for side in (scales, zero)]
    return dict(layout.tile(codes, scales, None if integer.symmetric else zero)), (codes - both[1]) * both[0]


def stack(layout: Stack, rng: np.random.Generator) -> tuple[dict[str, NDArray[Any]], NDArray[np.float64]]:
    """The arrays of a stack, and what they stand for [E, n, k]."""
    arrays: dict[str, NDArray[Any]] = {}
    values = np.zeros((layout.experts, layout.n, layout.k))
    for index, found in enumerate(layout.classes):
        members = layout.members(index)
        parts, values[members] = packed(found, rng, len(members))
        arrays |= {f"{name}{layout.suffix(index)}": array for name, array in parts.items()}
    return {**arrays, "table": layout.table()} if layout.mixed else arrays, values


def as_e4m3(x: NDArray[Any]) -> NDArray[np.float64]:
    """Rounded to bfloat16, then in blocks of 128 to E4M3 times the scale with which the largest is 448."""
    found = np.zeros(-(-x.size // BLOCK) * BLOCK)
    found[: x.size] = x.astype(ml_dtypes.bfloat16).astype(np.float64)
    blocks = found.reshape(-1, BLOCK)
    scale = np.maximum(np.abs(blocks).max(1, keepdims=True), 1e-30) / 448
    values: NDArray[np.float64] = (blocks / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    return values.reshape(-1)[: x.size]


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """|found - expected| / |expected|."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def silu_experts(
    layout: ExpertsLayout,
    up: Sequence[Any] | NDArray[Any],
    down: Sequence[Any] | NDArray[Any],
    x: NDArray[Any],
    ids: NDArray[Any],
    routing: NDArray[Any],
    rounded: Callable[[NDArray[Any]], NDArray[Any]] = lambda x: x.astype(np.float64),
) -> NDArray[np.float64]:
    """What experts with silu compute, by the definition [T, D].

    Args:
        up, down: the values of each expert, [parts F, D] (all of gate, then all of up) and [D, F].
        rounded: what becomes of tokens and of hidden values before they are multiplied.
    """
    out = np.zeros((len(x), layout.d))
    for token, slot in np.ndindex(*ids.shape):
        if 0 <= (e := int(ids[token, slot])) < layout.experts:
            y = (up[e] @ rounded(x[token])).reshape(layout.parts, -1)
            hidden = y[0] / (1 + np.exp(-y[0])) * (y[1] if layout.gated else 1)
            out[token] += routing[token, slot] * (down[e] @ rounded(hidden))
    return out
