"""The layouts of weights for CUDA kernels: what goes in comes out, and sizes are known without data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.runtime.errors import MoecError
from moec.targets.kernels.cuda.experts_layout import ExpertsLayout, Stack
from moec.targets.kernels.cuda.layout import BLOCK, ROWS, FragmentLayout
from moec.targets.kernels.cuda.packing import MANTISSA, PAIRS, packing

GROUPS = ("g16", "g32", "g64", "g128", "g256", "channel")
FORMATS = [f"int{bits}_{group}{end}" for bits in range(1, 9) for group in GROUPS for end in ("", "_asym")]
SIZES = st.integers(1, 50), st.integers(1, 40).map(lambda k: 8 * k)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(FORMATS), *SIZES, st.integers(1, 3), st.integers(0, 2**31))
def test_integer_formats_come_back_bit_for_bit(name: str, n: int, k: int, lead: int, seed: int) -> None:
    layout, random = FragmentLayout(n, k, name), np.random.default_rng(seed)
    integer = layout.integer
    assert integer is not None
    codes = random.integers(0, integer.levels, (lead, n, k)).astype(np.uint8)
    scale = random.standard_normal((lead, n, layout.groups)).astype(np.float16)
    zero = random.integers(0, integer.levels, scale.shape).astype(np.uint8)
    arrays = layout.tile(codes, scale, None if integer.symmetric else zero)
    assert {key: (a.shape, a.dtype.name) for key, a in arrays.items()} == layout.arrays(lead)
    assert sum(a.nbytes for a in arrays.values()) == layout.nbytes(lead)
    found = layout.untile(arrays)
    expected_zero = np.full_like(zero, integer.levels // 2) if integer.symmetric else zero
    for got, expected in zip(found, (codes, scale, expected_zero), strict=True):
        np.testing.assert_array_equal(got, expected)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["fp8_channel", "fp8_block128"]), st.integers(1, 300), SIZES[1], st.integers(1, 3), st.integers(0, 2**31))
def test_fp8_comes_back_bit_for_bit(name: str, n: int, k: int, lead: int, seed: int) -> None:
    layout, random = FragmentLayout(n, k, name), np.random.default_rng(seed)
    assert layout.fp8 is not None
    codes = random.integers(0, 256, (lead, n, k)).astype(np.uint8)
    rows = (1 + random.random((lead, layout.fp8.scale_rows(n), layout.groups))).astype(np.float32)
    scale = np.repeat(rows, layout.fp8.block or 1, axis=1)[:, :n]
    arrays = layout.tile(codes, scale)
    assert {key: (a.shape, a.dtype.name) for key, a in arrays.items()} == layout.arrays(lead)
    assert sum(a.nbytes for a in arrays.values()) == layout.nbytes(lead)
    for got, expected in zip(layout.untile(arrays), (codes, scale, np.zeros(scale.shape, np.uint8)), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_bytes_of_fp8_in_closed_form() -> None:
    assert FragmentLayout(256, 384, "fp8_channel").nbytes(2) == 2 * (256 * 384 + 256 * 4)
    assert FragmentLayout(256, 384, "fp8_block128").nbytes(2) == 2 * (256 * 384 + 256 // 8 * 3 * 4)


@pytest.mark.parametrize(("f", "fine"), [(264, True), (100, False)])
def test_blocks_of_gate_and_up_rows(f: int, fine: bool) -> None:
    """Blocks of 128 rows of gate_up [2F, D] stay whole in interleaved halves of tiles where F is a multiple of 8."""
    layout, random = ExpertsLayout(2, 256, f, "fp8_block128", "bf16" if not fine else "fp8_block128"), np.random.default_rng(0)
    codes = random.integers(0, 256, (2, 2 * f, 256)).astype(np.uint8)
    scale = np.repeat(1 + random.random((2, -(-2 * f // 128), 2)), 128, axis=1)[:, : 2 * f].astype(np.float32)
    found = layout.gate_up.classes[0]
    if not fine:
        with pytest.raises(MoecError, match="a multiple of 8 neurons, or choose fp8_channel"):
            found.tile(layout.interleave(codes), layout.interleave(scale))
        return
    arrays = found.tile(layout.interleave(codes), layout.interleave(scale))
    back = [layout.deinterleave(x) for x in found.untile(arrays)]
    np.testing.assert_array_equal(back[0], codes)
    np.testing.assert_array_equal(back[1], scale)


@settings(deadline=None, max_examples=30)
@given(*SIZES, st.integers(0, 2**31))
def test_bf16_comes_back_bit_for_bit(n: int, k: int, seed: int) -> None:
    layout = FragmentLayout(n, k, "bf16")
    values = np.random.default_rng(seed).integers(0, 1 << 16, (2, n, k)).astype(np.uint16)
    arrays = layout.tile_values(values)
    assert {key: (a.shape, a.dtype.name) for key, a in arrays.items()} == layout.arrays(2)
    np.testing.assert_array_equal(layout.untile_values(arrays), values)


def test_a_lane_has_the_numbers_that_the_tensor_core_wants() -> None:
    """Lane 4 g + t: rows g and g + 8, columns 32 j + 16 s + 8 h + 2 t + o in this order (PTX ISA, fragments of mma.m16n8k16)."""
    values = np.arange(ROWS * BLOCK, dtype=np.uint16).reshape(ROWS, BLOCK)
    lanes = FragmentLayout(ROWS, BLOCK, "bf16").tile_values(values)["values"].reshape(4, 2, 32, 8)
    for lane in (0, 5, 31):
        g, t = divmod(lane, 4)
        for j, half in ((0, 0), (3, 1)):
            columns = [32 * j + 16 * s + 8 * h + 2 * t + o for s in range(2) for h in range(2) for o in range(2)]
            assert lanes[j, half, lane].tolist() == values[g + 8 * half, columns].tolist()


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_bit_of_a_word_is_used_once(bits: int) -> None:
    found = [(f.word, f.shift + f.at + i) for fields in packing(bits) for f in fields for i in range(f.width)]
    assert len(packing(bits)) == PAIRS and sorted(found) == [(w, b) for w in range(bits) for b in range(16)]
    for fields in packing(bits):
        assert len({f.at - f.start for f in fields}) == 1
        assert all(f.at >= 0 and f.at + f.width <= (8 if bits == 8 else MANTISSA) for f in fields)
        assert sorted(f.start + i for f in fields for i in range(f.width)) == list(range(bits))


@pytest.mark.parametrize(("n", "k", "name"), [(16, 128, "f8"), (16, 128, "int4_g48"), (16, 12, "int4_g64")])
def test_what_no_kernel_can_read_is_refused(n: int, k: int, name: str) -> None:
    with pytest.raises(MoecError, match=name if name == "f8" else "no CUDA kernel"):
        FragmentLayout(n, k, name)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 70), st.integers(1, 3), st.booleans(), st.integers(0, 2**31))
def test_rows_of_gate_and_up_come_back(experts: int, f: int, m: int, gated: bool, seed: int) -> None:
    layout = ExpertsLayout(experts, 64, f, "int4_g64", "int4_g64", gated)
    x = np.random.default_rng(seed).standard_normal((experts, layout.parts * f, m)).astype(np.float32)
    inside = layout.interleave(x)
    assert inside.shape == (experts, layout.gate_up.n, m)
    np.testing.assert_array_equal(layout.deinterleave(inside), x)
    if gated:  # a gate row is 8 rows before its up row
        for row in (0, f - 1):
            at = row // 8 * ROWS + row % 8
            np.testing.assert_array_equal(inside[:, at], x[:, row])
            np.testing.assert_array_equal(inside[:, at + 8], x[:, f + row])


@given(
    st.lists(st.sampled_from(["int2_g64", "int3_g64", "int4_g128_asym", "int8_channel", "bf16", "fp8_block128"]), min_size=1, max_size=9)
)
def test_every_expert_of_a_stack_has_its_place(formats: list[str]) -> None:
    stack = Stack(len(formats), 24, 128, tuple(formats))
    for expert, (index, place) in enumerate(stack.table().tolist()):
        assert stack.classes[index].format == formats[expert]
        assert stack.members(index)[place] == expert
        assert stack.nbytes(expert) == FragmentLayout(24, 128, formats[expert]).nbytes()
    assert stack.nbytes() == sum(stack.nbytes(e) for e in range(len(formats)))
    assert ("table" in stack.arrays()) == stack.mixed == (len(set(formats)) > 1)
    assert all(shape[0] == len(stack.members(i)) for i in range(len(stack.classes)) for name, (shape, _) in stack.arrays().items()
               if name.endswith(f"_{i}"))  # fmt: skip
