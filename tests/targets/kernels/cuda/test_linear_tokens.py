"""linear_tokens: several matrices in one kernel, for any number of tokens, by the emulator against float64 on the dequantised weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moec.targets.kernels.cuda.calls import Gpu
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.linear_tokens import MOST_CALL, MOST_TOKENS, TokensSpec, linear_tokens_func
from moec.targets.kernels.cuda.matrices import Projection
from tests.targets.kernels.cuda.packed import MULTIPROCESSORS, packed
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.run_cuda import CudaKernel

GPU = Gpu(232_448, MULTIPROCESSORS)
FORMATS = [
    "bf16",
    "int8_g128",
    "int8_g32_asym",
    "int4_g128",
    "int4_g256_asym",
    "int3_channel",
    "int2_g64",
    "int4_g16",
    "fp8_channel",
    "fp8_block128",
]
SQUARE = Projection(FragmentLayout(2048, 2048, "int4_g128"))


def matrices(*shapes: tuple[int, str, bool], k: int) -> tuple[Projection, ...]:
    return tuple(Projection(FragmentLayout(n, k, name), bias) for n, name, bias in shapes)


def check(spec: TokensSpec, counts: list[int], seed: int) -> None:
    """Run a kernel with so many random tokens, each of a magnitude of its own, and compare all that it writes."""
    rng = np.random.default_rng(seed)
    arrays: list[NDArray[Any]] = []
    weights, biases = [], []
    for matrix in spec.matrices:
        parts, weight = packed(matrix.layout, rng)
        arrays += parts.values()
        weights.append(weight)
        biases.append(rng.standard_normal(matrix.layout.n).astype(np.float32) if matrix.bias else None)
    kernel = CudaKernel(linear_tokens_func(spec))
    for count in counts:
        size = 10.0 ** rng.integers(-2, 3, count)[:, None]
        x = (rng.standard_normal((count, spec.k)) * size).astype(np.float32)
        outs = [np.full((count, matrix.layout.n), np.nan, np.float32) for matrix in spec.matrices]
        given = [x, *arrays, *(bias for bias in biases if bias is not None)]
        found = kernel(*given, outputs=[(out.shape, "float32") for out in outs])
        for got, weight, bias in zip(found, weights, biases, strict=True):
            expected = x.astype(np.float64) @ weight.T + (0 if bias is None else bias)
            magnitude = np.abs(x.astype(np.float64)) @ np.abs(weight.T) + (0 if bias is None else np.abs(bias))
            assert (np.abs(got - expected) < 1e-5 * magnitude).all()


@needs_emulator
@pytest.mark.parametrize("name", FORMATS)
def test_one_matrix(name: str) -> None:
    """More columns than the blocks of a cluster share evenly, and fewer stages than columns."""
    check(TokensSpec(matrices((72, name, True), k=904), 16, 1, 2, 3), [13, 16, 21], seed=1)


@needs_emulator
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_matrices_and_options(data: st.DataObject) -> None:
    draw, k = data.draw, 8 * data.draw(st.integers(1, 80))
    shapes = draw(st.lists(st.tuples(st.integers(1, 150), st.sampled_from(FORMATS), st.booleans()), min_size=1, max_size=3))
    some, blocks = matrices(*shapes, k=k), -(-k // 128)
    splits = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if n <= blocks]))
    groups, tokens = draw(st.integers(1, 4)), 8 * draw(st.integers(1, 8))
    stages = draw(st.integers(1, -(-blocks // splits)))
    spec = TokensSpec(some, tokens, groups, splits, stages, held=draw(st.sampled_from([8, 16, 32])))
    check(spec, draw(st.lists(st.integers(1, 2 * tokens), min_size=2, max_size=3)), seed=draw(st.integers(0, 1 << 30)))


@needs_emulator
def test_what_is_chosen_for_a_small_model_is_right() -> None:
    some = matrices((256, "int4_g128", False), (64, "int8_g128", True), (64, "int8_g128", True), k=640)
    for most in (48, 192):
        check(TokensSpec.of(some, GPU, most), [1, 9, 48, 65], seed=most)


def test_what_is_chosen() -> None:
    """Blocks of threads for most multiprocessors, each with all of its columns of the tokens in shared memory."""
    several, one = (TokensSpec.of([SQUARE] * n, GPU, 48) for n in (3, 1))
    assert (several.tokens, several.groups, several.splits, several.stages) == (48, 4, 4, 4)
    assert (one.tokens, one.groups, one.splits, one.stages) == (48, 3, 8, 2)
    assert (several.grid, one.grid) == (96, 88)  # clusters do not fill the GPU
    assert several.columns == (16, 32, 48)
    for most in (9, 48, 100, 192):
        for few in (1, 3):
            found = TokensSpec.of([SQUARE] * few, GPU, most)
            assert found.tokens <= MOST_TOKENS and 4 * found.words <= GPU.shared_bytes
            halves = replace(found, splits=found.splits // 2) if found.splits > 1 else found
            assert sum(found.clocks(n, MULTIPROCESSORS) - halves.clocks(n, MULTIPROCESSORS) for n in (found.tokens, most)) <= 0


@pytest.mark.parametrize("tokens", range(8, MOST_TOKENS + 1, 8))
def test_products_are_made_for_enough_tokens(tokens: int) -> None:
    columns = TokensSpec((SQUARE,), tokens).columns
    assert columns[-1] == tokens and list(columns) == sorted(set(columns)) and all(n % 8 == 0 and n > 0 for n in columns)


def test_what_it_is_for() -> None:
    assert TokensSpec.suits([SQUARE] * 3, GPU, 48)
    assert TokensSpec.suits([SQUARE], GPU, MOST_CALL)
    assert not TokensSpec.suits([SQUARE], GPU, MOST_CALL + 1)
    assert not TokensSpec.suits([SQUARE], GPU, None)
    assert not TokensSpec.suits([Projection(FragmentLayout(50304, 2048, "int4_g128"))], GPU, 48)  # its rows keep the GPU busy
    assert not TokensSpec.suits([SQUARE], Gpu(48 << 10, MULTIPROCESSORS), 48)


def test_columns_of_one_length_are_needed() -> None:
    with pytest.raises(AssertionError):
        TokensSpec((SQUARE, Projection(FragmentLayout(2048, 1024, "int4_g128"))), 16)
