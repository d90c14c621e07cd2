"""Complex numbers become pairs of real ones.

    %c: c64[...] = aten.polar.default(%r, %a)      ->   (%r * cos %a, %r * sin %a)
    %z = aten.mul.Tensor(%x, %c)                   ->   (re re - im im, re im + im re)
    %y: f32[..., 2] = aten.view_as_real(%z)        ->   the parts next to each other

While rules run a complex value is a node `moec.complex(re, im)`, which no result depends on once all rules have run.
"""

from __future__ import annotations

from moec.compiler.frontend.rewrite import Result, Rewriter, Rule
from moec.compiler.frontend.rules.canonical import view
from moec.compiler.ir import Node, TensorType


def _pair(b: Rewriter, re: str, im: str) -> str:
    return b.emit("moec.complex", [re, im], TensorType("c64", b.shape(re)))


def _parts(b: Rewriter, name: str) -> tuple[str, str] | None:
    node = b.made(name, "moec.complex")
    return (node.inputs[0], node.inputs[1]) if node else None


def _polar(b: Rewriter, node: Node) -> Result:
    radius, angle = node.inputs
    kind = TensorType("f32", node.outputs[0].type.shape)
    parts = [b.emit(f"aten.{name}.default", [angle], b.type(angle)) for name in ("cos", "sin")]
    return _pair(b, *(b.emit("aten.mul.Tensor", [part, radius], kind) for part in parts))


def _view_as_complex(b: Rewriter, node: Node) -> Result:
    x, shape = node.inputs[0], node.outputs[0].type.shape
    kind = TensorType("f32", shape)
    return _pair(b, *(b.emit("aten.select.int", [x], kind, dim=len(shape), index=i) for i in (0, 1)))


def _view_as_real(b: Rewriter, node: Node) -> Result:
    parts = _parts(b, node.inputs[0])
    if parts is None:
        return None
    shape = node.outputs[0].type.shape
    columns = [view(b, part, (*shape[:-1], 1)) for part in parts]
    return b.emit("aten.cat.default", columns, node.outputs[0].type, tensors=2, dim=len(shape) - 1)


def _mul(b: Rewriter, node: Node) -> Result:
    if node.outputs[0].type.dtype != "c64":
        return None
    kind = TensorType("f32", node.outputs[0].type.shape)

    def times(x: str, y: str) -> str:
        return b.emit("aten.mul.Tensor", [x, y], kind)

    parts = [_parts(b, name) for name in node.inputs]
    if len(parts) == 1 and parts[0]:
        return _pair(b, *(b.emit("aten.mul.Tensor", [p], kind, other=node.attrs["other"]) for p in parts[0]))
    if len(parts) == 2 and parts[0] and parts[1]:
        (a, c), (d, e) = parts[0], parts[1]
        real = b.emit("aten.sub.Tensor", [times(a, d), times(c, e)], kind)
        return _pair(b, real, b.emit("aten.add.Tensor", [times(a, e), times(c, d)], kind))
    for pair, factor in ((parts[0], node.inputs[-1]), (parts[-1], node.inputs[0])):
        if pair:
            return _pair(b, *(times(p, factor) for p in pair))
    return None


def _both(b: Rewriter, node: Node) -> Result:
    """An operation on shape alone."""
    parts = _parts(b, node.inputs[0]) if node.inputs else None
    if parts is None:
        return None
    kind = TensorType("f32", node.outputs[0].type.shape)
    attrs = {name: value for name, value in node.attrs.items() if name != "dtype"}
    return _pair(b, *(b.emit(node.op, [p], kind, **attrs) for p in parts))


_SHAPES = ("view.default", "permute.default", "expand.default", "slice.Tensor", "select.int", "clone.default")

RULES: dict[str, tuple[Rule, ...]] = {
    "aten.polar.default": (_polar,),
    "aten.complex.default": (lambda b, node: _pair(b, *node.inputs),),
    "aten.view_as_complex.default": (_view_as_complex,),
    "aten.view_as_real.default": (_view_as_real,),
    "aten.mul.Tensor": (_mul,),
    "aten._to_copy.default": (_both,),
    **{f"aten.{name}": (_both,) for name in _SHAPES},
}
