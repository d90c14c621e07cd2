"""Experts that differ in their neurons: what their arrays are, and the kernels on the emulator against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moec.runtime.errors import MoecError
from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cuda.experts_decode import DecodeSpec, down_func, gate_up_func
from moec.targets.kernels.cuda.experts_layout import ExpertsLayout
from moec.targets.kernels.cuda.experts_prefill import PrefillSpec
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.shape import Shape
from tests.targets.kernels.cuda.packed import packed, relative, silu_experts
from tests.targets.kernels.cuda.test_prefill import run
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.run_cuda import CudaKernel

WIDTHS = (40, 8, 264, 136, 128)
MIXED = ("int4_g32_asym", "fp8_block128", "int3_g256", "bf16", "int4_g32_asym")

Arrays = dict[str, NDArray[Any]]
Values = list[NDArray[np.float64]]


def up_arrays(own: ExpertsLayout, rng: np.random.Generator) -> tuple[Arrays, NDArray[np.float64]]:
    """Random gate and up rows of an expert by itself, as its layout keeps them, and their values [parts F, D]."""
    layout = own.gate_up.classes[0]
    rows = FragmentLayout(own.parts * own.f, own.d, layout.format)
    arrays, values = packed(rows, rng)
    if layout.coded is None:
        return dict(layout.tile_values(own.interleave(rows.untile_values(arrays)))), values
    codes, scale, zero = rows.untile(arrays)
    zeros = None if layout.coded.symmetric else own.interleave(zero)
    return dict(layout.tile(own.interleave(codes), own.interleave(scale), zeros)), values


def draw(layout: ExpertsLayout, rng: np.random.Generator) -> tuple[Arrays, Arrays, Values, Values]:
    """The arrays of gate_up and of down, and the values of each expert."""
    ups = [up_arrays(layout.of(e), rng) for e in range(layout.experts)]
    downs = [packed(layout.down.layout(e), rng) for e in range(layout.experts)]
    arrays = [dict(stack.join([a for a, _ in made])) for stack, made in ((layout.gate_up, ups), (layout.down, downs))]
    return arrays[0], arrays[1], [v for _, v in ups], [v for _, v in downs]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([*MIXED, "int8_channel", "int2_g128"])), min_size=1, max_size=6),
    st.booleans(), st.integers(1, 40),
)  # fmt: skip
def test_arrays_hold_every_expert_and_nothing_else(experts: list[tuple[int, str]], gated: bool, d: int) -> None:
    widths, formats = tuple(8 * w for w, _ in experts), tuple(name for _, name in experts)
    layout = ExpertsLayout(len(experts), 8 * d, max(widths), formats, formats, gated, widths)
    rng = np.random.default_rng(0)
    size = 0
    for name, stack in (("gate_up", layout.gate_up), ("down", layout.down)):
        made = [up_arrays(layout.of(e), rng)[0] if name == "gate_up" else packed(stack.layout(e), rng)[0] for e in range(layout.experts)]
        joined = stack.join(made)
        assert {key: (a.shape, a.dtype.name) for key, a in joined.items()} == stack.arrays()
        table = joined["table"]
        for e, own in enumerate(made):
            end, (index, first, side, count) = stack.suffix(int(table[e, 0])), table[e].tolist()
            assert count == (stack.layout(e).tiles if name == "gate_up" else widths[e])
            assert stack.classes[index].format == formats[e]
            for part, array in own.items():
                begin, flat = first if part in ("codes", "values") else side, array.reshape(-1, *array.shape[2:])
                np.testing.assert_array_equal(joined[part + end][begin : begin + len(flat)], flat)
            assert stack.nbytes(e) == sum(a.nbytes for a in own.values())
        size += sum(a.nbytes for key, a in joined.items() if key != "table")
    assert layout.nbytes() == size


@pytest.mark.parametrize("widths", [(40, 8), (40, 8, 20), (32, 8, 24), (40, 0, 8)])
def test_widths_without_sense_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(MoecError, match="multiples of 8, one for each of 3 experts, the largest 40"):
        ExpertsLayout(3, 64, 40, "int4_g64", "int4_g64", True, widths)


def narrow_ids(tokens: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Two experts a token, some of which there are not."""
    return np.stack([rng.permutation(len(WIDTHS) + 1)[:2] for _ in range(tokens)])


@needs_emulator
@pytest.mark.parametrize(("formats", "gated", "tokens", "terms"), [(MIXED, True, 3, 2), ("int4_g128", True, 1, 2), ("bf16", False, 2, 1)])
def test_few_tokens(formats: str | tuple[str, ...], gated: bool, tokens: int, terms: int) -> None:
    rng = np.random.default_rng(tokens)
    layout = ExpertsLayout(len(WIDTHS), 160, max(WIDTHS), formats, formats, gated, WIDTHS)
    activation = ExpertActivation("silu")
    spec = DecodeSpec(layout, activation, tokens, 2, dtype="float32", terms=terms, warps=4, splits=2, down_warps=3)
    up, down, up_values, down_values = draw(layout, rng)
    x, routing = rng.standard_normal((tokens, layout.d)).astype(np.float32), rng.random((tokens, 2)).astype(np.float32)
    ids = narrow_ids(tokens, rng)
    ids[0] = 1, 2
    poison = np.full(spec.hidden_shape, 0x7FC07FC0, np.uint32)
    gate_up, wanted = CudaKernel(gate_up_func(spec)), CudaKernel(down_func(spec))
    gate_up(x, ids, *up.values(), poison)
    (found,) = wanted(poison, ids, routing, *down.values(), outputs=[((tokens, layout.d), "float32")])
    assert relative(found, silu_experts(layout, up_values, down_values, x, ids, routing)) < (2e-5 if terms == 2 else 5e-3)


@needs_emulator
@pytest.mark.parametrize(
    ("formats", "shape"), [(MIXED, Shape(16, 1, 4, 2, multiprocessors=2)), ("int8_channel", Shape(16, 1, 4, 2, multiprocessors=0))]
)
def test_many_tokens(formats: str | tuple[str, ...], shape: Shape) -> None:
    rng = np.random.default_rng(0)
    layout, tokens = ExpertsLayout(len(WIDTHS), 160, max(WIDTHS), formats, formats, True, WIDTHS), 20
    spec = PrefillSpec(layout, ExpertActivation("silu"), tokens, 2, shape=shape)
    up, down, up_values, down_values = draw(layout, rng)
    x, routing = rng.standard_normal((tokens, layout.d)).astype(np.float32), rng.random((tokens, 2)).astype(np.float32)
    ids = narrow_ids(tokens, rng)
    found = run(spec, x, ids, routing, up.values(), down.values())
    assert relative(found, silu_experts(layout, up_values, down_values, x, ids, routing)) < 2e-5
