"""embedding: rows of a packed weight [V, D], dequantised from the layout that `linear` reads, so that a tied head is stored once."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tvm import relax, tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.codes import one_code
from moec.targets.kernels.cpu.emit import (
    E4M3_UNIT,
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
from moec.targets.kernels.cpu.layout import FLOAT_STORAGE, LANES, LaneLayout
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
                    if layout.fp8 is not None:
                        value = value * (weights["scale"][tile, k // layout.fp8.group_size(layout.k), lane] * T.float32(E4M3_UNIT))
                    store(out, value, token, k)
            else:
                _integer_row(layout, weights, tile, lane, out, token)

    return prim_func(build)


def _integer_row(layout: LaneLayout, weights: Mapping[str, Buffer], tile: Expr, lane: Expr, out: Buffer, token: Expr) -> None:
    integer = layout.integer
    assert integer is not None
    size = math.gcd(layout.chunk, layout.group)  # codes that have one scale
    with T.serial(layout.padded_k // layout.chunk) as chunk:
        code = one_code(layout, weights["codes"], tile, chunk, lane)
        for first in range(0, layout.chunk, size):
            group = T.Bind(T.min((chunk * layout.chunk + first) // layout.group, layout.groups - 1))
            scale = T.Bind(to_float(weights["scale"][tile, group, lane], "float16", 1))
            zero = T.int32(integer.middle)
            if not integer.symmetric:
                zero = T.Bind(T.cast(weights["zero"][tile, group, lane], "int32"))
            for i in range(first, first + size):
                value = T.Bind(T.cast(code(i) - zero, "float32") * scale)
                k = chunk * layout.chunk + i
                if layout.padded_k == layout.k:
                    store(out, value, token, k)
                else:
                    with when(k < layout.k):
                        store(out, value, token, k)


def embedding(bb: relax.BlockBuilder, ids: relax.Expr, weights: Mapping[str, relax.Expr], layout: LaneLayout) -> relax.Var:
    """Emit rows `ids` (int32 or int64 [T], each from 0 to V - 1, not checked) of a weight [V, D] -> float32 [T, D]."""
    (t,) = tensor_shape(ids)
    tokens = int(t) if isinstance(t, tirx.IntImm) else None
    func = bb.add_func(embedding_func(layout, tokens, tensor_dtype(ids)), "embedding")
    arguments = [ids, *(weights[name] for name in layout.arrays())]
    return bb.emit(relax.call_tir(func, arguments, out_ty=tensor_type((t, layout.k), "float32")))
