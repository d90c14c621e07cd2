"""embedding: rows of a packed weight [V, D], dequantised from the layout that `linear` reads, so that a tied head is stored once."""

from __future__ import annotations

from collections.abc import Mapping

from tvm import relax, tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.emit import (
    Buffer,
    Expr,
    argument,
    prim_func,
    store,
    tensor_dtype,
    tensor_shape,
    tensor_type,
    to_float,
    when,
)
from moec.targets.kernels.cpu.layout import BYTE_ORDER, CHUNK, FLOAT_STORAGE, LANES, LaneLayout, planes
from moec.targets.kernels.cpu.register_tile import weight_arguments


def embedding_func(layout: LaneLayout, tokens: int | None, ids_dtype: str = "int64") -> tirx.PrimFunc:
    """PrimFunc (ids [T], weight arrays..., out float32 [T, D])."""

    def build() -> None:
        t = tokens if tokens is not None else T.int64()
        ids = argument("ids", (t,), ids_dtype)
        weights = weight_arguments(layout)
        out = argument("out", (t, layout.k), "float32")
        with T.serial(t) if tokens == 1 else T.parallel(t) as token:
            row = T.Bind(T.cast(ids[token], "int64"))
            tile, lane = T.Bind(row // LANES), T.Bind(row % LANES)
            if layout.integer is None:
                with T.serial(layout.k) as k:
                    value = to_float(weights["values"][tile, k, lane], FLOAT_STORAGE[layout.format], 1)
                    store(out, value, token, k)
            else:
                _integer_row(layout, weights, tile, lane, out, token)

    return prim_func(build)


def _integer_row(layout: LaneLayout, weights: Mapping[str, Buffer], tile: Expr, lane: Expr, out: Buffer, token: Expr) -> None:
    integer = layout.integer
    assert integer is not None
    with T.serial(layout.padded_k // CHUNK) as chunk:
        group = T.Bind(chunk * CHUNK // layout.group)
        scale = T.Bind(to_float(weights["scale"][tile, group, lane], "float16", 1))
        zero = T.int32(integer.levels // 2)
        if not integer.symmetric:
            zero = T.Bind(T.cast(weights["zero"][tile, group, lane], "int32"))
        words = [T.Bind(weights["codes"][tile, chunk, w, lane]) for w in range(integer.bits)]
        for i in range(CHUNK):
            value = T.Bind(T.cast(_code(words, integer.bits, i) - zero, "float32") * scale)
            k = chunk * CHUNK + i
            if layout.k % CHUNK == 0 and layout.padded_k == layout.k:
                store(out, value, token, k)
            else:
                with when(k < layout.k):
                    store(out, value, token, k)


def _code(words: list[Expr], bits: int, i: int) -> Expr:
    """The i-th code of a chunk, int32, from the chunk's words."""
    code = T.uint32(0)
    for width, start in planes(bits):
        per_word = 32 // width
        shift = 8 * BYTE_ORDER[i % 4] + width * (i % per_word // 4)
        plane = T.bitwise_and(T.shift_right(words[start + i // per_word], T.uint32(shift)), T.uint32((1 << width) - 1))
        code = T.bitwise_or(code, T.shift_left(plane, T.uint32(start)))
    return T.cast(code, "int32")


def embedding(bb: relax.BlockBuilder, ids: relax.Expr, weights: Mapping[str, relax.Expr], layout: LaneLayout) -> relax.Var:
    """Emit rows `ids` (int32 or int64 [T], each from 0 to V - 1, not checked) of a weight [V, D] -> float32 [T, D]."""
    (t,) = tensor_shape(ids)
    tokens = int(t) if isinstance(t, tirx.IntImm) else None
    func = bb.add_func(embedding_func(layout, tokens, tensor_dtype(ids)), "embedding")
    arguments = [ids, *(weights[name] for name in layout.arrays())]
    return bb.emit(relax.call_tir(func, arguments, out_ty=tensor_type((t, layout.k), "float32")))
