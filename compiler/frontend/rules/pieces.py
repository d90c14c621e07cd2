"""Slices, selections and concatenations: one spelling each, and pieces that fit together again."""

from __future__ import annotations

from itertools import pairwise

from moec.compiler.frontend.rewrite import Result, Rewriter, Rule, same_shape
from moec.compiler.frontend.rules.canonical import axis, axis_op, view
from moec.compiler.ir import Node, TensorType


def _slice(b: Rewriter, node: Node) -> Result:
    x, dim, shape = node.inputs[0], axis(b, node), b.shape(node.inputs[0])
    start, end, step = node.attrs.get("start", 0), node.attrs.get("end"), node.attrs.get("step", 1)
    size = shape[dim]
    if same_shape([size], [node.outputs[0].type.shape[dim]]) and step == 1:
        return x
    if isinstance(size, int) and isinstance(start, int) and (end is None or isinstance(end, int)):
        start = max(start + size, 0) if start < 0 else start
        end = size if end is None else max(end + size, 0) if end < 0 else min(end, size)
    elif end is None or (isinstance(end, int) and end >= 1 << 62):
        end = size
    attrs = {"dim": dim, "start": start, "end": end, "step": step}
    return None if dict(node.attrs) == attrs else b.emit(node.op, [x], node.outputs[0].type, **attrs)


def _slice_of_cat(b: Rewriter, node: Node) -> Result:
    """A slice that is just one of the tensors that were put one after the other."""
    cat = b.made(node.inputs[0], "aten.cat.default")
    if cat is None or cat.attrs["dim"] != node.attrs["dim"] or node.attrs["step"] != 1:
        return None
    start = 0
    for part in cat.inputs:
        size = b.shape(part)[node.attrs["dim"]]
        if not isinstance(size, int):
            return None
        if isinstance(node.attrs["end"], int) and start <= node.attrs["start"] and node.attrs["end"] <= start + size:
            if (node.attrs["start"], node.attrs["end"]) == (start, start + size):
                return part
            return cut(b, part, node.attrs["dim"], node.attrs["start"] - start, node.attrs["end"] - start)
        start += size
    return None


def _slice_scatter(b: Rewriter, node: Node) -> Result:
    """x with src at start:end is what comes before, src, and what comes after."""
    x, src = node.inputs
    dim, size = axis(b, node), b.shape(node.inputs[0])[axis(b, node)]
    start, end = node.attrs.get("start") or 0, node.attrs.get("end")
    if not isinstance(size, int):
        return b.decline(node, "slice_scatter over an axis of symbolic size")
    start, end = start % size if start < 0 else start, size if end is None else min(end % size if end < 0 else end, size)
    if (step := int(node.attrs.get("step", 1))) != 1:
        taken = {at: i for i, at in enumerate(range(start, end, step))}
        ones = [cut(b, src, dim, taken[at], taken[at] + 1) if at in taken else cut(b, x, dim, at, at + 1) for at in range(size)]
        return b.emit("aten.cat.default", ones, node.outputs[0].type, tensors=size, dim=dim)
    parts = [cut(b, x, dim, 0, start)] if start else []
    parts += [src, *([cut(b, x, dim, end, size)] if end < size else [])]
    return b.emit("aten.cat.default", parts, node.outputs[0].type, tensors=len(parts), dim=dim)


def _select_scatter(b: Rewriter, node: Node) -> Result:
    """x with src at one index of an axis."""
    x, src = node.inputs
    dim, shape = axis(b, node), b.shape(x)
    size, index = shape[dim], int(node.attrs["index"])
    if not isinstance(size, int):
        return b.decline(node, "select_scatter over an axis of symbolic size")
    index %= size
    parts = [cut(b, x, dim, 0, index)] if index else []
    parts += [view(b, src, (*shape[:dim], 1, *shape[dim + 1 :]))]
    parts += [cut(b, x, dim, index + 1, size)] if index + 1 < size else []
    return b.emit("aten.cat.default", parts, node.outputs[0].type, tensors=len(parts), dim=dim)


def _select_of_cat(b: Rewriter, node: Node) -> Result:
    """One index of tensors put one after the other along that axis, or of an axis that is repeated."""
    dim, index = node.attrs["dim"], node.attrs["index"]
    kind = node.outputs[0].type
    if (wide := b.made(node.inputs[0], "aten.expand.default")) is not None:
        source = b.shape(wide.inputs[0])
        at = dim - (len(b.shape(node.inputs[0])) - len(source))
        if at >= 0 and source[at] == 1:
            rest = view(b, wide.inputs[0], (*source[:at], *source[at + 1 :]))
            return rest if same_shape(b.shape(rest), kind.shape) else b.emit("aten.expand.default", [rest], kind, size=kind.shape)
        if at < 0:
            narrow = wide.inputs[0]
            return narrow if same_shape(source, kind.shape) else b.emit("aten.expand.default", [narrow], kind, size=kind.shape)
    cat = b.made(node.inputs[0], "aten.cat.default")
    if cat is None or cat.attrs["dim"] != dim or not isinstance(index, int):
        return None
    for part in cat.inputs:
        size = b.shape(part)[dim]
        if not isinstance(size, int):
            return None
        if index < size:
            return view(b, part, kind.shape) if size == 1 else b.emit(node.op, [part], kind, dim=dim, index=index)
        index -= size
    return None


def _cat(b: Rewriter, node: Node) -> Result:
    """One tensor is itself; a cat of a cat along the same axis is one cat."""
    if len(node.inputs) == 1:
        return node.inputs[0]
    inner = [b.made(x, "aten.cat.default") for x in node.inputs]
    same = [c if c and c.attrs["dim"] == node.attrs["dim"] else None for c in inner]
    if any(same):
        parts = [p for c, x in zip(same, node.inputs, strict=True) for p in (c.inputs if c else (x,))]
        return b.emit("aten.cat.default", parts, node.outputs[0].type, tensors=len(parts), dim=node.attrs["dim"])
    return None


def _cat_of_slices(b: Rewriter, node: Node) -> Result:
    """Neighbouring slices of one tensor, put together again."""
    parts = [b.made(x, "aten.slice.Tensor") for x in node.inputs]
    dim = node.attrs["dim"]
    if not all(p and p.attrs["dim"] == dim and p.attrs["step"] == 1 for p in parts):
        return None
    slices = [p for p in parts if p]
    adjacent = all(p.attrs["end"] == q.attrs["start"] for p, q in pairwise(slices))
    if not adjacent or len({p.inputs[0] for p in slices}) != 1:
        return None
    attrs = {"dim": dim, "start": slices[0].attrs["start"], "end": slices[-1].attrs["end"], "step": 1}
    return b.emit("aten.slice.Tensor", [slices[0].inputs[0]], node.outputs[0].type, **attrs)


def _copy(b: Rewriter, node: Node) -> Result:
    """x overwritten with src is src, in x's shape and element type."""
    src = node.inputs[1]
    kind = node.outputs[0].type
    if b.type(src).dtype != kind.dtype:
        src = b.emit("aten._to_copy.default", [src], TensorType(kind.dtype, b.shape(src)), dtype=kind.dtype)
    return src if same_shape(b.shape(src), kind.shape) else b.emit("aten.expand.default", [src], kind, size=kind.shape)


def cut(b: Rewriter, x: str, dim: int, start: int, end: int) -> str:
    """x[start:end] along one axis."""
    kind = b.type(x)
    shape = (*kind.shape[:dim], end - start, *kind.shape[dim + 1 :])
    return b.emit("aten.slice.Tensor", [x], TensorType(kind.dtype, shape), dim=dim, start=start, end=end, step=1)


def _split(b: Rewriter, node: Node) -> Result:
    dim, results, start = axis(b, node), [], 0
    for output in node.outputs:
        size = output.type.shape[dim]
        if not isinstance(size, int):
            return b.decline(node, "splits an axis of symbolic size")
        results.append(cut(b, node.inputs[0], dim, start, start + size))
        start += size
    return tuple(results)


def _unbind(b: Rewriter, node: Node) -> Result:
    dim = axis(b, node)
    return tuple(b.emit("aten.select.int", node.inputs, o.type, dim=dim, index=i) for i, o in enumerate(node.outputs))


def _stack(b: Rewriter, node: Node) -> Result:
    shape = node.outputs[0].type.shape
    dim = int(node.attrs.get("dim", 0)) % len(shape)
    one = (*shape[:dim], 1, *shape[dim + 1 :])
    parts = [view(b, x, one) for x in node.inputs]
    return b.emit("aten.cat.default", parts, node.outputs[0].type, tensors=len(parts), dim=dim)


def _axis_select(b: Rewriter, node: Node) -> Result:
    """A negative axis or index becomes the same counted from the front."""
    dim, index = axis(b, node), node.attrs["index"]
    size = b.shape(node.inputs[0])[dim]
    if isinstance(index, int) and index < 0 and isinstance(size, int):
        index += size
    attrs = {"dim": dim, "index": index}
    return None if dict(node.attrs) == attrs else b.emit(node.op, node.inputs, node.outputs[0].type, **attrs)


RULES: dict[str, tuple[Rule, ...]] = {
    **{f"aten.{name}": (_split,) for name in ("split.Tensor", "split.sizes", "split_with_sizes.default", "chunk.default")},
    "aten.slice.Tensor": (_slice, _slice_of_cat),
    "aten.slice_scatter.default": (_slice_scatter,),
    "aten.copy.default": (_copy,),
    "aten.unbind.int": (_unbind,),
    "aten.stack.default": (_stack,),
    "aten.cat.default": (axis_op(dim=0), _cat, _cat_of_slices),
    "aten.select.int": (_axis_select, _select_of_cat),
    "aten.select_scatter.default": (_select_scatter,),
}  # fmt: skip
