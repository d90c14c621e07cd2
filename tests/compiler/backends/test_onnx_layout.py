"""The layouts of integer weights keep every bit."""

from __future__ import annotations

import numpy as np
import pytest

from moec.compiler.backends.onnx.layout import IntLayout, common_block, container, pack, unpack
from moec.compiler.packed import Quantized
from moec.runtime.formats import get_format
from moec.runtime.formats.int import IntFormat


def _weight(fmt: IntFormat, n: int, k: int) -> Quantized:
    rng = np.random.default_rng(n * k + fmt.bits)
    shape = (n, fmt.groups(k))
    zero = np.full(shape, fmt.middle, np.uint8) if fmt.symmetric else rng.integers(0, fmt.levels, shape, dtype=np.uint8)
    return Quantized(rng.integers(0, fmt.levels, (n, k), dtype=np.uint8) * np.uint8(fmt.step), rng.random(shape).astype(np.float16), zero)


@pytest.mark.parametrize("shape", [(6, 64), (4, 200), (2, 33), (8, 192)])
@pytest.mark.parametrize("grouping", ["g32", "g64_asym", "g128", "g40_asym", "channel", "channel_asym"])
@pytest.mark.parametrize("kind", [*(f"int{bits}" for bits in range(1, 9)), "ternary", "binary"])
def test_restore_inverts_store(kind: str, grouping: str, shape: tuple[int, int]) -> None:
    fmt = get_format(f"{kind}_{grouping if kind.startswith('int') else grouping.removesuffix('_asym')}")
    assert isinstance(fmt, IntFormat)
    n, k = shape
    weight, block, narrow, wide = _weight(fmt, n, k), common_block(fmt, k), container(fmt.bits), max(container(fmt.bits), 4)
    layouts = [
        IntLayout(fmt, n, k, narrow, block),
        IntLayout(fmt, n, k, narrow, block, interleave=True),
        IntLayout(fmt, n, k, wide, 0),
        IntLayout(fmt, n, k, wide, block, signed=True),
        IntLayout(fmt, n, k, 8, block, split=block > 0),
    ]
    for layout in layouts:
        arrays = layout.store(weight)
        assert {name: (a.dtype.name, a.shape) for name, a in arrays.items()} == {
            name: (a.dtype, a.shape) for name, a in layout.arrays().items()
        }
        restored = layout.restore(arrays)
        for have, want in zip((restored.codes, restored.scale, restored.zero), (weight.codes, weight.scale, weight.zero), strict=True):
            np.testing.assert_array_equal(have, want)


def test_bytes_of_a_four_bit_layout_are_the_formats() -> None:
    fmt = get_format("int4_g64")
    assert isinstance(fmt, IntFormat)
    layout = IntLayout(fmt, 8, 256, 4, common_block(fmt, 256))
    assert sum(a.nbytes for a in layout.arrays().values()) == fmt.nbytes((8, 256)) == 8 * (256 // 2 + 2 * 256 // 64)


def test_three_bits_cost_four() -> None:
    fmt = get_format("int3_g64")
    assert isinstance(fmt, IntFormat)
    layout = IntLayout(fmt, 8, 256, container(3), common_block(fmt, 256))
    assert layout.arrays()["weight"].nbytes == 8 * 256 // 2


def test_ternary_and_binary_cost_two() -> None:
    for name in ("ternary_g64", "binary_g64"):
        fmt = get_format(name)
        assert isinstance(fmt, IntFormat)
        layout = IntLayout(fmt, 8, 256, container(fmt.bits), common_block(fmt, 256))
        assert layout.arrays()["weight"].nbytes == 8 * 256 // 4
        assert not layout.has_zero


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_pack(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 10), dtype=np.uint8)
    np.testing.assert_array_equal(unpack(pack(codes, bits), bits)[:, :10], codes)
