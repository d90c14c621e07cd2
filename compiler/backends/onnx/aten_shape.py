"""The core ATen operators that move elements, in ONNX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moec.compiler.backends.onnx.aten import Rule
from moec.compiler.errors import MoecError
from moec.compiler.ir import Dim, Node

if TYPE_CHECKING:
    from moec.compiler.backends.onnx.lower import Lowering

_INT64_MIN = -(1 << 63)


def _view(low: Lowering, node: Node) -> str:
    x, old, new = node.inputs[0], low.shape(node.inputs[0]), node.outputs[0].type.shape
    if len(old) == 3 and len(new) == 4 and old[:2] == new[:2]:
        low.set_flat(node.name, low.value(x))  # a later op may want the heads of a token in one row
        return ""
    if len(old) == 4 and len(new) == 3 and old[:2] == new[:2]:
        return low.flat(x)
    return low.shapes.reshape(low.value(x), old, new)


def _permute(low: Lowering, node: Node) -> str:
    return low.e.op("Transpose", low.value(node.inputs[0]), perm=list(node.attrs["dims"]))


def _expand(low: Lowering, node: Node) -> str:
    return low.e.op("Expand", low.value(node.inputs[0]), low.shapes.vector(node.outputs[0].type.shape))


def _repeat(low: Lowering, node: Node) -> str:
    shape, repeats = low.shape(node.inputs[0]), node.attrs["repeats"]
    wide = (*(1,) * (len(repeats) - len(shape)), *shape)
    return low.e.op("Tile", low.shapes.reshape(low.value(node.inputs[0]), shape, wide), low.shapes.vector(repeats))


def cut(low: Lowering, x: str, axis: int, start: Dim, end: Dim, step: int = 1) -> str:
    """x[start:end:step] along one axis."""
    return low.e.op("Slice", x, low.shapes.dim(start), low.shapes.dim(end), low.e.const([axis]), low.e.const([step]))


def _slice(low: Lowering, node: Node) -> str:
    a = node.attrs
    end = a["end"] if a.get("end") is not None else (1 << 62)
    return cut(low, low.value(node.inputs[0]), int(a["dim"]), a.get("start") or 0, end, int(a.get("step", 1)))


def _select(low: Lowering, node: Node) -> str:
    return low.e.op("Gather", low.value(node.inputs[0]), low.shapes.scalar(node.attrs["index"]), axis=int(node.attrs["dim"]))


def _cat(low: Lowering, node: Node) -> str:
    dtype = node.outputs[0].type.dtype
    return low.e.op("Concat", *(low.cast(name, dtype) for name in node.inputs), axis=int(node.attrs["dim"]))


def _pad(low: Lowering, node: Node) -> str:
    pairs, rank = node.attrs["pad"], len(node.outputs[0].type.shape)
    before, after = [0] * rank, [0] * rank
    for i in range(len(pairs) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = pairs[2 * i], pairs[2 * i + 1]
    value = low.number(node.attrs.get("value", 0), node.outputs[0].type.dtype)
    return low.e.op("Pad", low.value(node.inputs[0]), low.e.const([*before, *after]), value)


def _flip(low: Lowering, node: Node) -> str:
    axes = list(node.attrs["dims"])
    starts, ends, steps = ([v] * len(axes) for v in (-1, _INT64_MIN, -1))
    return low.e.op("Slice", low.value(node.inputs[0]), *(low.e.const(v) for v in (starts, ends, axes, steps)))


def _roll(low: Lowering, node: Node) -> str:
    x, shape = low.value(node.inputs[0]), low.shape(node.inputs[0])
    shifts, dims = (v if isinstance(v, tuple) else (v,) for v in (node.attrs["shifts"], node.attrs["dims"]))
    for shift, dim in zip(shifts, dims, strict=True):
        size = shape[dim]
        if not isinstance(size, int):
            raise MoecError(f"aten.roll: %{node.name} rolls an axis of symbolic size, which the onnx backend does not lower")
        at = -shift % size
        x = low.e.op("Concat", cut(low, x, dim, at, size), cut(low, x, dim, 0, at), axis=dim) if at else x
    return x


def _triangle(upper: int) -> Rule:
    return lambda low, node: low.e.op("Trilu", low.value(node.inputs[0]), low.shapes.scalar(node.attrs.get("diagonal", 0)), upper=upper)


def _gather(low: Lowering, node: Node) -> str:
    x, index = (low.value(name) for name in node.inputs)
    dim = int(node.attrs["dim"])
    sizes = [(low.shape(name)[:dim], low.shape(name)[dim + 1 :]) for name in node.inputs]
    if sizes[0] != sizes[1]:  # ONNX wants equal sizes beside the axis
        lead = [i for i in range(len(low.shape(node.inputs[0]))) if i != dim]
        for i in lead:
            x = cut(low, x, i, 0, low.shape(node.inputs[1])[i])
    return low.e.op("GatherElements", x, index, axis=dim)


def _scatter(reduction: str | None) -> Rule:
    def rule(low: Lowering, node: Node) -> str:
        x, index, *source = node.inputs
        dtype, size = node.outputs[0].type.dtype, low.shape(index)
        if source:
            updates = low.cast(source[0], dtype)
            for axis, (have, want) in enumerate(zip(low.shape(source[0]), size, strict=True)):
                updates = cut(low, updates, axis, 0, want) if have != want else updates
        else:
            updates = low.e.op("Expand", low.number(node.attrs["value"], dtype), low.shapes.vector(size))
        return low.e.op("ScatterElements", low.cast(x, dtype), low.value(index), updates, axis=int(node.attrs["dim"]), reduction=reduction)

    return rule


def _index_select(low: Lowering, node: Node) -> str:
    return low.e.op("Gather", low.value(node.inputs[0]), low.value(node.inputs[1]), axis=int(node.attrs["dim"]))


def _index(low: Lowering, node: Node) -> str:
    x, *indices = node.inputs
    if len(indices) == 1:
        return low.e.op("Gather", low.value(x), low.value(indices[0]), axis=0)
    rank = max(len(low.shape(i)) for i in indices)
    shape = low.shapes.vector(node.outputs[0].type.shape[:rank])
    parts = [low.e.op("Unsqueeze", low.e.op("Expand", low.cast(i, "i64"), shape), low.e.const([-1])) for i in indices]
    return low.e.op("GatherND", low.value(x), low.e.op("Concat", *parts, axis=-1))


def _full(low: Lowering, node: Node) -> str:
    kind = node.outputs[0].type
    return low.e.op("Expand", low.number(node.attrs["fill_value"], kind.dtype), low.shapes.vector(kind.shape))


def _arange(low: Lowering, node: Node) -> str:
    dtype = node.outputs[0].type.dtype
    bounds: Sequence[str] = [low.number(node.attrs[n], dtype) for n in ("start", "end", "step")]
    return low.e.op("Range", *bounds)


RULES: dict[str, Rule] = {
    "aten.view.default": _view,
    "aten.permute.default": _permute,
    "aten.expand.default": _expand,
    "aten.repeat.default": _repeat,
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.cat.default": _cat,
    "aten.constant_pad_nd.default": _pad,
    "aten.flip.default": _flip,
    "aten.roll.default": _roll,
    "aten.tril.default": _triangle(0),
    "aten.triu.default": _triangle(1),
    "aten.gather.default": _gather,
    "aten.scatter.src": _scatter(None),
    "aten.scatter.value": _scatter(None),
    "aten.scatter_add.default": _scatter("add"),
    "aten.index_select.default": _index_select,
    "aten.index.Tensor": _index,
    "aten.full.default": _full,
    "aten.arange.start_step": _arange,
}
"""Shapes, indices and tensors made from nothing."""
