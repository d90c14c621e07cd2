"""projections: several matrices in one kernel, executed by the emulator, against float64 on the dequantised weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.matrices import Projection
from moec.targets.kernels.cuda.projections import ProjectionsSpec, projections_func
from moec.targets.kernels.specs import NormSpec
from tests.targets.kernels.cuda.packed import MULTIPROCESSORS, packed
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.run_cuda import CudaKernel

pytestmark = needs_emulator

FORMATS = ["bf16", "int8_g32_asym", "int4_g128", "int4_g32_asym", "int3_channel", "int2_g64", "fp8_channel", "fp8_block128"]


def check(spec: ProjectionsSpec, seed: int = 0) -> None:
    """Run a kernel on random numbers, and compare all that it writes."""
    rng = np.random.default_rng(seed)
    norm, k, tokens = spec.norm, spec.k, spec.tokens
    rows, inputs, results = rows_of(norm, k, tokens, rng)
    arrays: list[NDArray[Any]] = []
    biases, expected, scales, outputs = [], [], [], [(tokens, k)] * len(results)
    for matrix in spec.matrices:
        parts, weight = packed(matrix.layout, rng)
        arrays += parts.values()
        bias = rng.standard_normal(matrix.layout.n).astype(np.float32)
        biases += [bias] if matrix.bias else []
        expected.append(rows @ weight.T + (bias if matrix.bias else 0))
        scales.append(np.abs(rows) @ np.abs(weight.T) + (np.abs(bias) if matrix.bias else 0))  # of what is added up
        outputs.append((tokens, matrix.layout.n))
    if spec.written:
        results.append(rows)
        outputs.insert(len(results) - 1, (tokens, k))
    found = CudaKernel(projections_func(spec))(*inputs, *arrays, *biases, outputs=[(shape, "float32") for shape in outputs])
    for got, wanted, scale in zip(found, [*results, *expected], [*results, *scales], strict=True):
        for token in range(tokens):
            assert np.linalg.norm(got[token] - wanted[token]) < 2e-5 * np.linalg.norm(scale[token])


def rows_of(
    norm: NormSpec | None, k: int, tokens: int, rng: np.random.Generator
) -> tuple[NDArray[Any], list[NDArray[Any]], list[NDArray[Any]]]:
    """The rows that are multiplied, the kernel's inputs up to the weights, and its first results. Tokens differ in magnitude."""
    size = 10.0 ** rng.permutation(np.arange(tokens) - tokens // 2)[:, None]
    x = ((rng.standard_normal((tokens, k)) * 3 + 1) * size).astype(np.float32)
    if norm is None:
        return x.astype(np.float64), [x], []
    inputs, results, rows = [x], [], x.astype(np.float64)
    if norm.residual:
        inputs.append((rng.standard_normal((tokens, k)) * size).astype(np.float32))
        rows = rows + inputs[-1]
        results.append(rows)
    if norm.center:
        rows = rows - rows.mean(1, keepdims=True)
    rows = rows / np.sqrt((rows**2).mean(1, keepdims=True) + norm.eps)
    if norm.weight:
        inputs.append(rng.standard_normal(k).astype(np.float32))
        rows = rows * (inputs[-1] + norm.offset)
    if norm.bias:
        inputs.append(rng.standard_normal(k).astype(np.float32))
        rows = rows + inputs[-1]
    return rows, inputs, results


@pytest.mark.parametrize("name", FORMATS)
def test_one_matrix(name: str) -> None:
    check(ProjectionsSpec.of([Projection(FragmentLayout(40, 392, name), bias=True)], MULTIPROCESSORS))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_several_tokens(data: st.DataObject) -> None:
    """Any formats, shapes and options together, each token of a magnitude of its own."""
    draw, k = data.draw, 8 * data.draw(st.integers(1, 80))
    shapes = draw(st.lists(st.tuples(st.integers(1, 70), st.sampled_from(FORMATS), st.booleans()), min_size=1, max_size=3))
    matrices = [Projection(FragmentLayout(n, k, name), bias) for n, name, bias in shapes]
    weight, norm = draw(st.booleans()), None
    if draw(st.booleans()):
        residual, center, bias = draw(st.booleans()), draw(st.booleans()), weight and draw(st.booleans())
        offset = draw(st.sampled_from([0.0, 1.0])) if weight else 0.0
        norm = NormSpec(k, 1, 1e-5, offset=offset, residual=residual, center=center, weight=weight, bias=bias)
    tokens = draw(st.sampled_from([2, 4, 8]))
    spec = ProjectionsSpec.of(matrices, draw(st.sampled_from([1, 3, 132])), norm, norm is not None and draw(st.booleans()), tokens)
    if draw(st.booleans()):
        splits = min(draw(st.sampled_from([1, 2, 4])), 1 << spec.blocks.bit_length() - 1)
        warps, tiles, unroll = splits * draw(st.sampled_from([1, 2])), draw(st.integers(1, 4)), 32 * draw(st.integers(1, 8))
        spec = replace(spec, warps=warps, splits=splits, tiles=tiles, unroll=unroll)
    check(spec, draw(st.integers(0, 1 << 30)))


def test_infinite_and_missing_numbers_stay_with_their_token() -> None:
    """What is not a number in one token is none in its results, and is nothing to the others."""
    spec = ProjectionsSpec.of(
        [Projection(FragmentLayout(20, 256, "int4_g32"))], MULTIPROCESSORS, NormSpec(256, 1, 1e-5, weight=False), tokens=4
    )
    rng = np.random.default_rng(5)
    x = rng.standard_normal((4, 256)).astype(np.float32)
    x[1, 7], x[3] = np.nan, 0
    parts, weight = packed(spec.matrices[0].layout, rng)
    (found,) = CudaKernel(projections_func(spec))(x, *parts.values(), outputs=[((4, 20), "float32")])
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[3], 0)
    rows = x[[0, 2]].astype(np.float64)
    rows /= np.sqrt((rows**2).mean(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(found[[0, 2]], rows @ weight.T, atol=1e-4)


def test_matrices_of_several_formats_behind_a_norm() -> None:
    shapes = [(100, "int4_g32"), (33, "bf16"), (20, "int4_g32"), (50, "int8_channel")]
    matrices = [Projection(FragmentLayout(n, 264, name), bias=n == 20) for n, name in shapes]
    norm = NormSpec(264, 1, 1e-5, offset=1.0, residual=True)
    spec = ProjectionsSpec.of(matrices, MULTIPROCESSORS, norm, written=True)
    check(spec)
    check(replace(spec, warps=4, splits=2, tiles=2))


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_norm(bias: bool) -> None:
    norm = NormSpec(256, 1, 1e-5, center=True, weight=bias, bias=bias)
    check(ProjectionsSpec.of([Projection(FragmentLayout(32, 256, "int4_g128"))], MULTIPROCESSORS, norm, written=bias))


@pytest.mark.parametrize(
    ("warps", "splits", "tiles", "unroll"), [(4, 4, 5, 64), (4, 2, 3, 32), (2, 1, 7, 32), (8, 4, 3, 256), (1, 1, 1, 512)]
)
def test_options(warps: int, splits: int, tiles: int, unroll: int) -> None:
    """Rounds of several tiles, of one, and of parts of one, with columns that are no multiple of what a round has."""
    matrices = tuple(Projection(FragmentLayout(n, 1160, "int4_g64")) for n in (200, 24))
    check(ProjectionsSpec(matrices, NormSpec(1160, 1, 1e-6), False, warps, splits, tiles, unroll))


def test_options_follow_the_shapes() -> None:
    """The grid is one block for each multiprocessor where there are rows enough, or two where there are many."""

    def grid(k: int, *rows: int) -> tuple[int, int, int, int]:
        spec = ProjectionsSpec.of([Projection(FragmentLayout(n, k, "int4_g128")) for n in rows], MULTIPROCESSORS)
        return spec.warps, spec.splits, spec.tiles, sum(spec.blocks_of(i) for i in range(len(rows)))

    assert grid(2048, 2048, 2048, 2048) == (16, 16, 3, 129)
    assert grid(2048, 4096, 512, 512) == (16, 16, 3, 108)
    assert grid(2048, 2048) == (16, 16, 1, 128)
    assert grid(4096, 2048) == (16, 16, 1, 128)
    assert grid(2048, 50304) == (16, 16, 12, 262)
    assert grid(768, 2048) == (4, 4, 1, 128)
    assert grid(512, 50304) == (16, 4, 3, 262)


def test_options_of_several_tokens() -> None:
    """A block more a multiprocessor than there is room for becomes a tile more a block."""

    def grid(tokens: int, *rows: int) -> tuple[int, int]:
        spec = ProjectionsSpec.of([Projection(FragmentLayout(n, 2048, "int4_g128")) for n in rows], MULTIPROCESSORS, tokens=tokens)
        return spec.tiles, spec.grid

    assert [grid(t, 2048, 2048, 2048) for t in (1, 2, 4, 8)] == [(3, 129)] * 4
    assert grid(1, 3 * 16 * 131 + 16, 16, 16) == (3, 134)
    assert grid(8, 3 * 16 * 131 + 16, 16, 16) == (4, 101)
