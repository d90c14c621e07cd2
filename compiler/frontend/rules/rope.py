"""Rotary position embeddings become `rope`.

    %r = cat(neg(%x[..., d/2:]), %x[..., :d/2])                   (half style)
    %y = add(mul(%x, %cos), mul(%r, %sin))                        ->   %y = rope(%x, %cos, %sin)

with x [B, T, H, d] and the angles [B, T, 1, d] broadcast over heads.
"""

from __future__ import annotations

from moec.compiler.frontend.rewrite import Result, Rewriter, Rule, both_orders, same_shape
from moec.compiler.frontend.rules.canonical import permute, view
from moec.compiler.ir import Dim, Node, TensorType


def half(b: Rewriter, name: str) -> tuple[str, int] | None:
    """(x, which) where the value is the first (0) or second (1) half of x's last axis."""
    node = b.made(name, "aten.slice.Tensor")
    if node is None or node.attrs["dim"] != len(b.shape(name)) - 1 or node.attrs["step"] != 1:
        return None
    size, start, end = b.shape(node.inputs[0])[-1], node.attrs["start"], node.attrs["end"]
    if not isinstance(size, int) or size % 2:
        return None
    return {(0, size // 2): (node.inputs[0], 0), (size // 2, size): (node.inputs[0], 1)}.get((start, end))


def _rotated(b: Rewriter, name: str) -> str | None:
    """x where the value is cat(-second half of x, first half of x)."""
    cat = b.made(name, "aten.cat.default")
    if cat is None or len(cat.inputs) != 2 or cat.attrs["dim"] != len(b.shape(name)) - 1:
        return None
    negative = b.made(cat.inputs[0], "aten.neg.default")
    first, second = (half(b, negative.inputs[0]) if negative else None), half(b, cat.inputs[1])
    if first and second and first == (second[0], 1) and second[1] == 0:
        return first[0]
    return None


def angles(b: Rewriter, name: str, shape: tuple[Dim, ...], heads: int) -> str | None:
    """An angle tensor as [B, T, d], if it broadcasts over axis `heads` of x of the given shape."""
    found = b.shape(name)
    if len(found) != len(shape) or found[heads] != 1:
        return None
    tokens = 3 - heads
    if not same_shape([found[tokens], found[3]], [shape[tokens], shape[3]]):
        return None
    flat = view(b, name, (found[0], found[tokens], found[3]))
    full = (shape[0], shape[tokens], shape[3])
    if same_shape(b.shape(flat), full):
        return flat
    if found[0] != 1:
        return None
    return b.emit("aten.expand.default", [flat], TensorType(b.type(name).dtype, full), size=full)


def apply(b: Rewriter, node: Node, x: str, cos: str, sin: str, halves: bool = False) -> str | None:
    """rope(x, cos, sin) in place of `node`, whichever of axes 1 and 2 of x the heads are (none: one head).

    Args:
        halves: the angles are those of one half of x, and both halves turn alike.
    """
    if len(b.shape(x)) == 3:
        batch, tokens, size = b.shape(x)
        tall = [view(b, t, (*b.shape(t)[:-1], 1, b.shape(t)[-1])) for t in (cos, sin) if len(b.shape(t)) == 3]
        if len(tall) != 2:
            return b.decline(node, "rope: x has no heads, and the angles have")
        one_head = apply(b, node, view(b, x, (batch, tokens, 1, size)), tall[0], tall[1], halves=halves)
        return view(b, one_head, (batch, tokens, size)) if one_head else None
    shape = b.shape(x)
    if len(shape) != 4:
        return b.decline(node, f"rope of a tensor of {len(shape)} axes")
    part = (*shape[:3], b.shape(cos)[-1]) if halves else shape
    for heads in (2, 1):
        tables = [t for table in (cos, sin) if (t := angles(b, table, part, heads))]
        if len(tables) == 2:
            swap = (0, 2, 1, 3) if heads == 1 else (0, 1, 2, 3)
            turned = permute(b, x, swap)
            tables = [twice(b, t) for t in tables] if halves else tables
            return permute(b, b.emit("rope", [turned, *tables], b.type(turned)), swap)
    return b.decline(node, f"rope: the angles {b.type(cos)} do not broadcast over the heads of {b.type(x)}")


def _half_style(b: Rewriter, node: Node) -> Result:
    for left, right in both_orders(node):
        plain, turned = b.made(left, "aten.mul.Tensor"), b.made(right, "aten.mul.Tensor")
        if plain is None or turned is None:
            return None
        for rotated, sin in both_orders(turned):
            x = _rotated(b, rotated)
            for same, cos in both_orders(plain) if x else ():
                if same == x:
                    return apply(b, node, x, cos, sin)
    return None


def twice(b: Rewriter, name: str) -> str:
    """An angle table next to itself: [..., d/2] -> [..., d]."""
    kind = b.type(name)
    size = kind.shape[-1]
    assert isinstance(size, int)
    wide = TensorType(kind.dtype, (*kind.shape[:-1], 2 * size))
    return b.emit("aten.cat.default", [name, name], wide, tensors=2, dim=len(kind.shape) - 1)


RULES: dict[str, tuple[Rule, ...]] = {"aten.add.Tensor": (_half_style,)}
