"""What an experts layer computes, in float64 from the weights as the kernels hold them, with torch alone, on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moec.runtime.errors import MoecError
from moec.targets.kernels.cuda.experts_layout import ExpertsLayout, Stack
from moec.targets.kernels.cuda.layout import BLOCK, ROWS, FragmentLayout
from moec.targets.kernels.cuda.packing import PAIRS, packing, vectors

Arrays = Mapping[str, Tensor]
"""The arrays of a stack by name; `codes` as int32, `values` as bfloat16."""


@dataclass(frozen=True)
class Codes:
    """A quantised matrix in the order of its rows: value = (codes - zero) * scale, group by group.

    Args:
        codes: uint8 [n, k].
        scale: float16 [n, groups].
        zero: uint8 [n, groups], None where it is half of the levels.
        bits, group: as in the format; a group of 0 is a row.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int


def matrix_codes(stack: Stack, arrays: Arrays, expert: int) -> Codes:
    """The codes of an expert's matrix.

    Raises:
        MoecError: its format is a floating-point one.
    """
    layout, own = _find(stack, arrays, expert)
    if (integer := layout.integer) is None:
        raise MoecError(f"expert {expert}: format {layout.format} has no integer codes")
    zero = None if integer.symmetric else _sides(own["zero"], layout)
    group = 0 if layout.groups == 1 else integer.group
    return Codes(_lane_codes(layout, own["codes"]), _sides(own["scale"], layout), zero, integer.bits, group)


def _lane_codes(layout: FragmentLayout, words: Tensor) -> Tensor:
    """The codes in a matrix's words: uint8 [n, k]."""
    lead, bits = (layout.tiles, layout.blocks), layout.bits
    own = torch.cat([words[..., 32 * f : 32 * (f + n)].reshape(*lead, 32, n) for f, n in vectors(bits)], -1)
    rows = own.reshape(*lead, 32, 2, bits).transpose(-3, -2)  # [..., 2, 32 lanes, words]
    found = torch.zeros(*lead, 2, 32, PAIRS, 2, dtype=torch.int32, device=words.device)
    for pair, fields in enumerate(packing(bits)):
        for field in fields:
            for o in range(2):
                part = (rows[..., field.word] >> (field.shift + field.at + 16 * o)) & ((1 << field.width) - 1)
                found[..., pair, o] |= part << field.start
    return _rows(found.reshape(*lead, 2, 8, 4, 8, 2, 2), layout).to(torch.uint8)


def matrix(stack: Stack, arrays: Arrays, expert: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """An expert's matrix [n, k]."""
    layout, own = _find(stack, arrays, expert)
    if layout.coded is None:
        values = own["values"].reshape(layout.tiles, layout.blocks, 4, 2, 32, 8)
        lanes = values.permute(0, 1, 3, 4, 2, 5).reshape(layout.tiles, layout.blocks, 2, 8, 4, 8, 2, 2)
        return _rows(lanes, layout).to(dtype)
    if layout.fp8 is not None:
        numbers = _lane_codes(layout, own["codes"]).view(torch.float8_e4m3fn).to(dtype)
        return numbers * _fp8_scales(layout, own["scale"]).to(dtype)
    assert layout.integer is not None
    q = matrix_codes(stack, arrays, expert)
    group = q.group or layout.k
    out = torch.empty(layout.n, layout.k, dtype=dtype, device=q.codes.device)
    middle = torch.full_like(q.scale, layout.integer.levels // 2) if q.zero is None else q.zero.to(q.scale.dtype)
    for begin in range(0, layout.n, 4096):  # of memory, not of speed
        rows = slice(begin, begin + 4096)
        wide = [x[rows].to(torch.float64).repeat_interleave(group, 1)[:, : layout.k] for x in (middle, q.scale)]
        out[rows] = ((q.codes[rows].to(torch.float64) - wide[0]) * wide[1]).to(dtype)
    return out


def experts(
    layout: ExpertsLayout, gate_up: Arrays, down: Arrays, x: Tensor, ids: Tensor, routing_weights: Tensor, activation: str = "silu",
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """float64 [T, D]: the sum over slots of weight * down(f(gate_up(x))); slots whose id is outside of 0 to E - 1 are skipped.

    Args:
        biases: of gate_up [E, n], interleaved as the kernels read them, and of down [E, D].
    """
    out = torch.zeros(x.shape[0], layout.d, dtype=torch.float64, device=x.device)
    wide = x.to(torch.float64)
    for e in ids.unique().tolist():
        if not 0 <= e < layout.experts:
            continue
        token, slot = (ids == e).nonzero(as_tuple=True)
        h = wide[token] @ matrix(layout.gate_up, gate_up, e).T
        if biases is not None:
            h = h + biases[0][e, : h.shape[1]].double()
        y = activate(layout.of(e), h, activation) @ matrix(layout.down, down, e).T
        if biases is not None:
            y = y + biases[1][e].double()
        out.index_add_(0, token, y * routing_weights[token, slot, None].to(torch.float64))
    return out


def activate(layout: ExpertsLayout, h: Tensor, activation: str) -> Tensor:
    """Hidden values [., F] of interleaved gate_up [., n]."""
    if not layout.gated:
        return ACTIVATIONS[activation](h)[:, : layout.f]
    gate, up = h.reshape(len(h), layout.f_tiles, 2, ROWS // 2).unbind(2)
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        found = (up + 1) * gate * torch.sigmoid(1.702 * gate)
    else:
        found = ACTIVATIONS[activation](gate) * up
    return found.reshape(len(h), -1)[:, : layout.f]


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x) ** 2,
}


def _find(stack: Stack, arrays: Arrays, expert: int) -> tuple[FragmentLayout, dict[str, Tensor]]:
    """The layout of an expert by itself, and its part of the arrays."""
    layout, row = stack.layout(expert), [int(value) for value in stack.table()[expert]]
    suffix = stack.suffix(row[0])
    own = {}
    for name, (shape, _) in layout.arrays().items():
        found = arrays[name + suffix]
        begin = row[1] if name in ("codes", "values") or not stack.ragged else row[2]
        own[name] = found[begin : begin + shape[0] * shape[1]].reshape(shape) if stack.ragged else found[begin]
    return layout, own


def _rows(lanes: Tensor, layout: FragmentLayout) -> Tensor:
    """[tiles, blocks, half, g, t, (j, s), h, o] -> [n, k]."""
    rows = lanes.permute(0, 2, 3, 1, 5, 6, 4, 7).reshape(layout.tiles * ROWS, layout.blocks * BLOCK)
    return rows[: layout.n, : layout.k]


def _fp8_scales(layout: FragmentLayout, x: Tensor) -> Tensor:
    """The scale of each weight, [n, k]."""
    if layout.fp8 is not None and layout.fp8.block:  # [tiles, blocks, half]
        wide = x.transpose(1, 2).repeat_interleave(ROWS // 2, 1).reshape(layout.tiles * ROWS, layout.blocks).repeat_interleave(BLOCK, 1)
        return wide[: layout.n, : layout.k]
    return _sides(x, layout).expand(layout.n, layout.k)


def _sides(x: Tensor, layout: FragmentLayout) -> Tensor:
    """Scales or zero points [tiles, S, 8, B, half] -> [n, groups]."""
    return x.permute(0, 4, 2, 1, 3).reshape(layout.tiles * ROWS, -1)[: layout.n, : layout.groups]
