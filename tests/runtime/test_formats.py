"""The laws of every weight format: exact sizes, and unpack(pack(x)) == x bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.runtime.errors import MoecError
from moec.runtime.formats import get_format, known_formats
from moec.runtime.formats.float import PlainFormat
from moec.runtime.formats.fp8 import E4M3, Fp8Format
from moec.runtime.formats.int import IntFormat, pack_bits, unpack_bits

SHAPES = [(1, 1), (3, 33), (2, 5, 64), (4, 130), (7, 256), (2, 200, 140), (50,)]


@pytest.mark.parametrize("name", [*known_formats(), "int1_g32", "ternary_g40", "binary_g40", "int5_g48", "int6_channel", "int7_g128_asym"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pack_law(name: str, shape: tuple[int, ...]) -> None:
    fmt = get_format(name)
    rng = np.random.default_rng(1)
    assert fmt.name == name
    if isinstance(fmt, PlainFormat):
        values = rng.standard_normal(shape).astype(np.float32)
        arrays = fmt.pack(values)
        again = fmt.pack(fmt.unpack(arrays, shape))
        assert np.array_equal(again["data"], arrays["data"])
    elif isinstance(fmt, Fp8Format):
        n, k = (1, *shape)[-2:]
        codes = rng.integers(0, 256, shape).astype(np.uint8)
        rows = rng.standard_normal((*(1, *shape)[:-2], fmt.scale_rows(n), fmt.groups(k))).astype(np.float32)
        scale = np.repeat(rows, fmt.block or 1, axis=-2)[..., :n, :].reshape(*shape[:-1], fmt.groups(k))
        arrays = fmt.pack(codes, scale)
        found = fmt.codes(arrays, shape)
        for got, expected in zip(found, (codes, scale, np.zeros(scale.shape, np.uint8)), strict=True):
            np.testing.assert_array_equal(got, expected)
        spread = np.repeat(scale, fmt.group_size(k), axis=-1)[..., :k]
        np.testing.assert_array_equal(fmt.unpack(arrays, shape), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * spread)
    else:
        assert isinstance(fmt, IntFormat)
        codes = rng.integers(0, fmt.levels, shape).astype(np.uint8) * np.uint8(fmt.step)
        scale = rng.standard_normal((*shape[:-1], fmt.groups(shape[-1]))).astype(np.float16)
        zero = rng.integers(0, fmt.levels, scale.shape).astype(np.uint8)
        arrays = fmt.pack(codes, scale, zero)
        found = fmt.codes(arrays, shape)
        assert np.array_equal(found[0], codes)
        assert np.array_equal(found[1], scale)
        assert np.array_equal(found[2], np.full_like(zero, fmt.middle) if fmt.symmetric else zero)
        assert np.array_equal(fmt.unpack(arrays, shape), fmt.dequantize(*found))
    assert sum(a.nbytes for a in arrays.values()) == fmt.nbytes(shape)


@given(bits=st.integers(1, 8), count=st.integers(1, 70), seed=st.integers(0, 99))
def test_bit_stream(bits: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, count)).astype(np.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, -(-count * bits // 8))
    assert np.array_equal(unpack_bits(packed, bits, count), codes)
    # The definition: bit b of code i is bit i * bits + b of the little-endian number that the row is.
    number = int.from_bytes(packed[0].tobytes(), "little")
    assert [number >> (i * bits) & ((1 << bits) - 1) for i in range(count)] == codes[0].tolist()


@settings(max_examples=200)
@given(st.floats(width=32))
def test_bfloat16_rounds_as_torch(value: float) -> None:
    fmt = PlainFormat("bf16")
    bits = fmt.pack(np.array([value], np.float32))["data"]
    expected = torch.tensor([value]).bfloat16()
    assert np.array_equal(fmt.unpack({"data": bits}, (1,)), expected.float().numpy(), equal_nan=True)


@given(
    name=st.sampled_from(["ternary_g32", "ternary_g128", "ternary_g7", "ternary_channel", "binary_g32", "binary_g7", "binary_channel"]),
    n=st.integers(1, 5), k=st.integers(1, 300), seed=st.integers(0, 999),
)  # fmt: skip
def test_few_values_round_trip(name: str, n: int, k: int, seed: int) -> None:
    fmt, rng = get_format(name), np.random.default_rng(seed)
    assert isinstance(fmt, IntFormat)
    ternary = name.startswith("ternary")
    signs = rng.integers(-1, 2, (n, k)) if ternary else rng.choice([-1, 1], (n, k))
    scale = (rng.random((n, fmt.groups(k))) + 0.1).astype(np.float16)
    arrays = fmt.pack((signs + 1).astype(np.uint8), scale)
    spread = np.repeat(scale.astype(np.float32), fmt.group_size(k), axis=1)[:, :k]
    assert np.array_equal(fmt.unpack(arrays, (n, k)), signs * spread)
    assert sum(a.nbytes for a in arrays.values()) == fmt.nbytes((n, k))
    row = arrays["codes"][0].tolist()
    if ternary:  # the definition: five base-3 digits a byte, low digits first
        digits = [byte // 3**i % 3 for byte in row for i in range(5)]
        assert digits[:k] == (signs[0] + 1).tolist()
        assert not any(digits[k:])
        assert max(row) < 243


def test_sizes_in_closed_form() -> None:
    assert get_format("bf16").nbytes((10, 7)) == 140
    assert get_format("int4_g64").nbytes((8, 128)) == 8 * (64 + 2 * 2)
    assert get_format("int3_g32_asym").nbytes((2, 64)) == 2 * (24 + 2 * 2 + 1)
    assert get_format("int2_g32").nbytes((1, 33)) == 8 + 1 + 2 * 2
    assert get_format("int8_channel").nbytes((5, 100)) == 5 * 102
    assert get_format("ternary_g64").nbytes((3, 384)) == 3 * (77 + 2 * 6)  # 1.85 bits
    assert get_format("ternary_channel").nbytes((2, 5, 33)) == 10 * (7 + 2)
    assert get_format("binary_g32").nbytes((2, 33)) == 2 * (4 + 1 + 2 * 2)
    assert get_format("binary_channel").nbytes((7, 384)) == 7 * (48 + 2)
    assert get_format("fp8_channel").nbytes((3, 5, 100)) == 15 * (100 + 4)
    assert get_format("fp8_block128").nbytes((256, 384)) == 256 * 384 + 4 * 2 * 3
    assert get_format("fp8_block128").nbytes((3, 130, 129)) == 3 * (130 * 129 + 4 * 2 * 2)


def test_numbers_of_fp8_are_those_of_an_independent_decoder() -> None:
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(E4M3, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    np.testing.assert_array_equal(E4M3, torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy())
    assert [E4M3[code] for code in (0x00, 0x01, 0x38, 0x7E, 0xFE)] == [0, 2.0**-9, 1, 448, -448]


def test_unknown_names() -> None:
    with pytest.raises(MoecError, match="did you mean 'bf16'"):
        get_format("bf61")
    with pytest.raises(MoecError, match="int<bits>_g<group>"):
        get_format("int4_64")
    with pytest.raises(MoecError, match="'ternary_64': expected ternary_g<group> or ternary_channel"):
        get_format("ternary_64")
    for name in ("fp8", "fp8_block64", "fp8_channel_asym", "fp8_g128"):
        with pytest.raises(MoecError, match=f"unknown format '{name}': expected fp8_block128 or fp8_channel"):
            get_format(name)
    with pytest.raises(MoecError, match="expected binary_g<group>"):
        get_format("binary_g64_asym")
