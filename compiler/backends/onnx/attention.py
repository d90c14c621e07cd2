"""`attention` in ONNX, with the keys and values of earlier tokens in a cache [B, HK, tokens, d].

GroupQueryAttention reads and extends the cache in place: past and present of a layer are one buffer, of which the first tokens are in
use. It wants keys and values of one size that is a multiple of 8; other sizes are filled up with zeros. What `chunk` hides is
added to its logits. q is multiplied by `scale` before, because ONNX Runtime has faster kernels for plain products.

GroupQueryAttention goes through the keys block by block, or holds the logits of all of them at once if its softmax has sinks. Sinks of
minus infinity change nothing but that. Measured with ONNX Runtime 1.31.1, one thread of a Sapphire Rapids machine, 6 heads on 3 of 64:
one token after 127: 18 us by blocks, 11 us at once; after 199: 28 and 18 us; 128 tokens: 626 and 263 us. 16 heads of 128: 512 tokens 43
and 29 ms, 512 tokens after 3500 158 and 142 ms, 2048 tokens 351 and 397 ms. So all logits are held at once where they are few; the
executor feeds long prompts in parts.

On a GPU the operator takes q, k, v, the cache and the tables of angles in 16 bits, and the scale; it has other kernels there, so that no
sinks are added.

Standard operators (`portable`) concatenate the cache and the new keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moec.compiler.backends.onnx.emit import CONTRIB
from moec.compiler.errors import MoecError
from moec.compiler.ir import Node

if TYPE_CHECKING:
    from moec.compiler.backends.onnx.lower import Lowering

HIDDEN = np.float32(-1e30)
"""Added to a logit that must not be seen."""

HIDDEN_HALF = np.float32(-60000)
"""The same in the range of float16."""

FULL_LOGITS = 1 << 17
"""Up to so many logits of a token (heads * context) attention holds those of all keys at once."""


@dataclass(frozen=True)
class Cache:
    """The cache of one layer: key/value heads, and sizes of a key and a value."""

    heads: int
    key_size: int
    value_size: int


def _sizes(low: Lowering, node: Node) -> tuple[int, int, int, int]:
    q, k, v = (low.shape(name) for name in node.inputs[:3])
    sizes = (q[2], k[2], q[3], v[3])
    assert all(isinstance(s, int) for s in sizes)
    return sizes  # type: ignore[return-value]  # the assertion above


def lower_attention(low: Lowering, node: Node) -> str:
    """The `attention` op."""
    heads, kv_heads, d, dv = _sizes(low, node)
    layer = len(low.caches)
    if low.portable:
        low.caches.append(Cache(kv_heads, d, dv))
        return _portable(low, node, layer, heads, kv_heads, d, dv)
    e, a = low.e, node.attrs
    size = -(-max(d, dv) // 8) * 8
    low.caches.append(Cache(kv_heads, size, size))
    q, k, v = (
        _wide(low, name, count, have, size) for name, count, have in zip(node.inputs, (heads, kv_heads, kv_heads), (d, d, dv), strict=False)
    )
    shape: list[int | str] = ["B", kv_heads, "cached", size]
    past = [e.input(f"past_{kind}.{layer}", low.kind, shape) for kind in ("key", "value")]
    lengths, total = low.cache_inputs()
    bias = _chunk_bias(low, a["chunk"], lengths, total) if a.get("chunk") else ""
    sinks = low.value(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] else ""
    if low.half and bias and sinks:
        raise MoecError(f"attention %{node.name} has chunks and sinks, which ONNX Runtime's operator for GPUs does not take together")
    present = [f"present_{kind}.{layer}" for kind in ("key", "value")]
    if low.half is None and not sinks and heads * low.context <= FULL_LOGITS:
        sinks = e.const(np.full(heads, -np.inf, np.float32))
    if low.half is None and node.name not in low.fusion.scaled:
        q = e.op("Mul", q, low.number(float(a["scale"]), "f32"))
    turning = low.fusion.turning.get(node.name)
    angles = _angles(low, *turning) if turning else ["", ""]
    q, k, v, bias, sinks, *angles = (low.narrow(x) for x in (q, k, v, bias, sinks, *angles))
    inputs = [q, k, v, *past, lengths, total, *angles, "", bias, sinks]
    while not inputs[-1]:
        inputs.pop()
    result = e.name(node.name)
    e.named(
        "GroupQueryAttention", inputs, (result, *present), CONTRIB, num_heads=heads, kv_num_heads=kv_heads,
        scale=float(a["scale"]) if low.half else 1.0,
        local_window_size=int(a.get("window", 0)) or -1, softcap=float(a.get("softcap", 0.0)), do_rotary=int(turning is not None),
    )  # fmt: skip
    low.present(present, shape)
    result = low.widen(result)
    if size == dv:
        low.set_flat(node.name, result)
        return ""
    split = e.op("Reshape", result, e.const([0, 0, heads, size]))
    return e.op("Slice", split, e.const([0]), e.const([dv]), e.const([3]))


def _angles(low: Lowering, cos: str, sin: str) -> list[str]:
    """Cosines and sines of the whole context: [context, d / 2] each."""
    e, size = low.e, low.shape(cos)[-1]
    assert isinstance(size, int)
    tables = low.of_context((cos, sin))
    halves = [e.op("Slice", table, e.const([0]), e.const([size // 2]), e.const([2])) for table in tables]
    return [e.op("Squeeze", half, e.const([0])) for half in halves]


def _wide(low: Lowering, name: str, heads: int, have: int, size: int) -> str:
    """A value [B, T, heads, have] as [B, T, heads * size], each head filled up with zeros."""
    if have == size:
        return low.flat(name)
    padded = low.e.op("Pad", low.value(name), low.e.const([0] * 7 + [size - have]))
    return low.e.op("Reshape", padded, low.e.const([0, 0, heads * size]))


def _chunk_bias(low: Lowering, chunk: int, lengths: str, total: str) -> str:
    """[B, 1, T, total]: 0 where a token and a key are of the same chunk, a large negative number elsewhere."""
    e, count = low.e, low.number(chunk, "i64")
    new = low.shapes.scalar("T")
    first = e.op("Sub", e.op("Add", low.cast_value(lengths, "i64"), low.number(1, "i64")), new)  # [B]
    at = e.op("Add", e.op("Unsqueeze", first, e.const([1])), e.op("Range", low.number(0, "i64"), new, low.number(1, "i64")))  # [B, T]
    keys = e.op("Range", low.number(0, "i64"), low.cast_value(total, "i64"), low.number(1, "i64"))
    same = e.op("Equal", e.op("Unsqueeze", e.op("Div", at, count), e.const([1, 3])), e.op("Div", keys, count))
    return e.op("Where", same, low.number(0.0, "f32"), e.const(HIDDEN_HALF if low.half else HIDDEN))


def _portable(low: Lowering, node: Node, layer: int, heads: int, kv_heads: int, d: int, dv: int) -> str:
    e, a, groups = low.e, node.attrs, heads // kv_heads
    q = e.op("Reshape", low.value(node.inputs[0]), e.const([0, 0, kv_heads, groups, d]))
    q = e.op("Transpose", q, perm=[0, 2, 3, 1, 4])  # [B, HK, G, T, d]
    cached = []
    for kind, name, size in (("key", node.inputs[1], d), ("value", node.inputs[2], dv)):
        shape: list[int | str] = ["B", kv_heads, "cached", size]
        past = e.input(f"past_{kind}.{layer}", "f32", shape)
        present = f"present_{kind}.{layer}"
        new = e.op("Transpose", low.value(name), perm=[0, 2, 1, 3])
        e.named("Concat", (past, new), (present,), axis=2)
        low.present([present], ["B", kv_heads, "total", size])
        cached.append(e.op("Unsqueeze", present, e.const([2])))  # [B, HK, 1, S, size]
    keys, values = cached
    logits = e.op("MatMul", q, e.op("Transpose", keys, perm=[0, 1, 2, 4, 3]))
    logits = e.op("Mul", logits, low.number(float(a["scale"]), "f32"))
    if cap := a.get("softcap"):
        bound = low.number(float(cap), "f32")
        logits = e.op("Mul", e.op("Tanh", e.op("Div", logits, bound)), bound)
    logits = e.op("Where", _visible(low, int(a.get("window", 0)), int(a.get("chunk", 0))), logits, low.number(-np.inf, "f32"))
    sinks = node.inputs[3] if len(node.inputs) > 3 else ""
    if sinks:
        sink = e.op("Reshape", low.value(sinks), e.const([1, kv_heads, groups, 1, 1]))
        lead = e.op("Concat", e.op("Shape", logits, end=-1), e.const([1]), axis=0)
        logits = e.op("Concat", logits, e.op("Expand", sink, lead), axis=-1)
    weights = e.op("Softmax", logits, axis=-1)
    if sinks:
        weights = e.op("Slice", weights, e.const([0]), e.const([-1]), e.const([4]))
    result = e.op("Transpose", e.op("MatMul", weights, values), perm=[0, 3, 1, 2, 4])  # [B, T, HK, G, dv]
    low.set_flat(node.name, e.op("Reshape", result, e.const([0, 0, heads * dv])))
    return ""


def _visible(low: Lowering, window: int, chunk: int) -> str:
    """[T, total]: whether a new token sees a key."""
    e, one = low.e, low.number(1, "i64")
    past = e.op("Squeeze", e.op("Shape", "past_key.0", start=2, end=3), e.const([0]))
    total = e.op("Add", past, low.shapes.scalar("T"))
    at = e.op("Unsqueeze", e.op("Range", past, total, one), e.const([1]))
    keys = e.op("Range", low.number(0, "i64"), total, one)
    visible = e.op("LessOrEqual", keys, at)
    if window:
        visible = e.op("And", visible, e.op("Less", e.op("Sub", at, keys), low.number(window, "i64")))
    if chunk:
        size = low.number(chunk, "i64")
        visible = e.op("And", visible, e.op("Equal", e.op("Div", keys, size), e.op("Div", at, size)))
    return visible
