"""Rotary position embeddings written on the two numbers of each pair become `rope`, between views where pairs are neighbours.

    %low = %a * %c - %b * %s;  %high = %b * %c + %a * %s
    cat(%low, %high)                              ->   rope(cat(%a, %b), cat(%c, %c), cat(%s, %s))
    cat(%low[..., None], %high[..., None])        ->   the same with its halves interleaved: [..., 2, n] -> [..., n, 2]

and x * repeat(c, 2) + rotated(x) * repeat(s, 2), where rotated puts (-x[2i+1], x[2i]) at (2i, 2i+1), likewise. What complex numbers
become (`moec.compiler.frontend.rules.complex`) has the second form.
"""

from __future__ import annotations

from moec.compiler.frontend.rewrite import Result, Rewriter, Rule, both_orders, same_shape
from moec.compiler.frontend.rules.canonical import permute, view
from moec.compiler.frontend.rules.rope import apply
from moec.compiler.ir import Node, TensorType


def _is_angle(b: Rewriter, name: str) -> bool:
    """Whether a value is a table of cosines or sines, sliced, viewed or scaled."""
    for _ in range(8):
        node = b.made(name)
        if node is None or not node.inputs:
            return False
        if node.op in ("aten.cos.default", "aten.sin.default"):
            return True
        name = node.inputs[0]
    return False


def _turned(b: Rewriter, low: str, high: str) -> tuple[str, str, str, str] | None:
    """(a, b, cos, sin) where low = a * cos - b * sin and high = b * cos + a * sin."""
    difference, total = b.made(low, "aten.sub.Tensor"), b.made(high, "aten.add.Tensor")
    products = [b.made(x, "aten.mul.Tensor") for n in (difference, total) if n for x in n.inputs]
    if len(products) != 4 or not all(p and len(p.inputs) == 2 for p in products):
        return None
    first, second, *others = (p for p in products if p)
    wanted = {frozenset(p.inputs) for p in others}
    for x, cos in both_orders(first):
        for y, sin in both_orders(second):
            fits = {frozenset((y, cos)), frozenset((x, sin))} == wanted and _is_angle(b, cos) and _is_angle(b, sin)
            if fits and same_shape(b.shape(x), b.shape(y)) and same_shape(b.shape(x), b.shape(low)):
                return x, y, cos, sin
    return None


def _joined(b: Rewriter, x: str, y: str) -> str:
    """x and y as the halves of one tensor."""
    kind = b.type(x)
    size = kind.shape[-1]
    assert isinstance(size, int)
    wide = TensorType(kind.dtype, (*kind.shape[:-1], 2 * size))
    return b.emit("aten.cat.default", [x, y], wide, tensors=2, dim=len(kind.shape) - 1)


def _interleaved(b: Rewriter, x: str, pairs: tuple[int | str, ...]) -> str:
    """x with halves [..., 2 * n] as pairs [..., n, 2]."""
    rank = len(pairs)
    split = view(b, x, (*pairs[:-2], 2, pairs[-2]))
    return permute(b, split, (*range(rank - 2), rank - 1, rank - 2))


def _last(b: Rewriter, name: str) -> str | None:
    """x where the value is x with an axis of size one at the end."""
    node = b.made(name, "aten.view.default")
    shape = b.shape(name)
    return view(b, node.inputs[0], shape[:-1]) if node and shape[-1] == 1 else None


def _among_others(b: Rewriter, node: Node) -> Result:
    """A rotation whose halves are two neighbours among the tensors put together (partial rotary embeddings)."""
    for i, (low, high) in enumerate(zip(node.inputs, node.inputs[1:], strict=False)):
        if found := _turned(b, low, high):
            x, y, cos, sin = found
            if (result := apply(b, node, _joined(b, x, y), cos, sin, halves=True)) is None:
                return None
            parts = [*node.inputs[:i], result, *node.inputs[i + 2 :]]
            return b.emit(node.op, parts, node.outputs[0].type, tensors=len(parts), dim=node.attrs["dim"])
    return None


def _pairs(b: Rewriter, node: Node) -> Result:
    shape = node.outputs[0].type.shape
    if node.attrs["dim"] != len(shape) - 1:
        return None
    if len(node.inputs) != 2:
        return _among_others(b, node)
    low, high = node.inputs
    if found := _turned(b, low, high):
        x, y, cos, sin = found
        return apply(b, node, _joined(b, x, y), cos, sin, halves=True)
    parts = [_last(b, name) for name in node.inputs]
    if parts[0] and parts[1] and (found := _turned(b, parts[0], parts[1])):
        x, y, cos, sin = found
        result = apply(b, node, _joined(b, x, y), cos, sin, halves=True)
        return _interleaved(b, result, shape) if result else None
    return None


def _repeated(b: Rewriter, name: str) -> str | None:
    """c where the value is c with each element of the last axis twice: [..., n] -> [..., n, 1] -> [..., n, 2] -> [..., 2 * n]."""
    outer = b.made(name, "aten.view.default")
    wide = b.made(outer.inputs[0], "aten.expand.default") if outer else None
    if wide is None:
        return None
    shape, narrow = b.shape(name), b.shape(wide.inputs[0])
    if b.shape(outer.inputs[0] if outer else "")[-2:] != (narrow[-2], 2) or narrow[-1] != 1 or shape[-1] != 2 * int(narrow[-2]):
        return None
    if not same_shape(b.shape(wide.outputs[0].name)[:-1], narrow[:-1]):
        return None
    return view(b, wide.inputs[0], (*shape[:-1], narrow[-2]))


def _every_second(b: Rewriter, name: str, start: int) -> str | None:
    """x where the value is x[..., start::2]."""
    node = b.made(name, "aten.slice.Tensor")
    if node and node.attrs["dim"] == len(b.shape(name)) - 1 and (node.attrs["start"], node.attrs["step"]) == (start, 2):
        return node.inputs[0]
    return None


def _rotated(b: Rewriter, name: str) -> tuple[str, str, str] | None:
    """(x, x[..., 0::2], x[..., 1::2]) where the value has (-x[2i+1], x[2i]) at (2i, 2i+1)."""
    outer = b.made(name, "aten.view.default")
    cat = b.made(outer.inputs[0], "aten.cat.default") if outer else None
    if cat is None or len(cat.inputs) != 2 or cat.attrs["dim"] != len(b.shape(cat.outputs[0].name)) - 1:
        return None
    first, second = (_last(b, x) for x in cat.inputs)
    negative = b.made(first, "aten.neg.default") if first else None
    if negative is None or second is None:
        return None
    x = _every_second(b, second, 0)
    return (x, second, negative.inputs[0]) if x and _every_second(b, negative.inputs[0], 1) == x else None


def _repeated_style(b: Rewriter, node: Node) -> Result:
    for left, right in both_orders(node):
        plain, turned = b.made(left, "aten.mul.Tensor"), b.made(right, "aten.mul.Tensor")
        if plain is None or turned is None:
            return None
        for rotated, sin in both_orders(turned):
            found = _rotated(b, rotated)
            for same, cos in both_orders(plain) if found else ():
                tables = [_repeated(b, t) for t in (cos, sin)]
                if found and same == found[0] and tables[0] and tables[1]:
                    result = apply(b, node, _joined(b, found[1], found[2]), tables[0], tables[1], halves=True)
                    shape = node.outputs[0].type.shape
                    pairs = (*shape[:-1], b.shape(found[1])[-1], 2)
                    return view(b, _interleaved(b, result, pairs), shape) if result else None
    return None


RULES: dict[str, tuple[Rule, ...]] = {
    "aten.cat.default": (_pairs,),
    "aten.add.Tensor": (_repeated_style,),
}
