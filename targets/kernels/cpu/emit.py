"""Small words in which the kernels are written, on top of TVM's IRBuilder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.layout import LANES

Expr = Any
Buffer = Any
E4M3_UNIT = 2.0**8
"""What E4M3 bits, shifted to where float16 has its own, are to be multiplied with: the exponents' biases differ by 8."""
OPAQUE = 8  # TOpPattern: never fused with its neighbours


def argument(name: str, shape: tuple[Expr, ...], dtype: str) -> Buffer:
    """The next parameter of the function being built."""
    return T.arg(name, T.buffer(shape, dtype, layout=None))


def workspace(shape: tuple[Expr, ...], dtype: str) -> Buffer:
    """Temporary memory of the function. Never inside a parallel loop, where it would be allocated once an iteration."""
    return T.alloc_buffer(shape, dtype, layout=None, align=64)


class Register:
    """A vector that can be assigned. Scope `global` and less than 1 KiB make TVM put it on the stack and LLVM in a register."""

    def __init__(self, dtype: str, lanes: int) -> None:
        self.dtype, self.lanes = dtype, lanes
        self._buffer = T.alloc_buffer((lanes,), dtype, scope="global", layout=None)
        self._index = T.ramp(0, 1, lanes) if lanes > 1 else 0

    def get(self) -> Expr:
        return self._buffer[self._index]

    def set(self, value: Expr) -> None:
        T.buffer_store(self._buffer, value, [self._index])

    def element(self, lane: Expr) -> Expr:
        """One lane, at a run-time index (the vector then lives on the stack)."""
        return self._buffer[lane]

    def clear(self) -> None:
        self.set(splat(0, self.dtype, self.lanes))


def splat(value: Any, dtype: str, lanes: int) -> Expr:
    """A scalar in every lane."""
    scalar = tirx.const(value, dtype) if isinstance(value, int | float) else value
    return T.broadcast(scalar, lanes) if lanes > 1 else scalar


def vector(buffer: Buffer, *index: Expr, lanes: int) -> Expr:
    """`lanes` neighbours along the last axis, from an index on."""
    *outer, last = index
    return buffer[(*outer, T.ramp(last, 1, lanes) if lanes > 1 else last)]


def store(buffer: Buffer, value: Expr, *index: Expr, lanes: int = 1) -> None:
    """Write `lanes` neighbours along the last axis."""
    *outer, last = index
    T.buffer_store(buffer, value, [*outer, T.ramp(last, 1, lanes) if lanes > 1 else last])


def prefetch(buffer: Buffer, *index: Expr) -> None:
    """Ask for the cache line at an index, which may lie beyond the buffer."""
    read, keep, data = T.int32(0), T.int32(3), T.int32(1)
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(buffer[index]), read, keep, data))


def lane_type(dtype: str, lanes: int) -> str:
    """The name of a vector type."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def to_float(value: Expr, dtype: str, lanes: int) -> Expr:
    """A vector of float32, float16, integers, bfloat16 bits (uint16) or E4M3 bits (uint8; times `E4M3_UNIT`) as float32."""
    if dtype == "float32":
        return value
    if dtype == "uint8":
        wide = T.cast(value, lane_type("uint16", lanes))
        sign = T.shift_left(T.bitwise_and(wide, splat(0x80, "uint16", lanes)), splat(8, "uint16", lanes))
        size = T.shift_left(T.bitwise_and(wide, splat(0x7F, "uint16", lanes)), splat(7, "uint16", lanes))
        return T.cast(T.reinterpret(lane_type("float16", lanes), T.bitwise_or(sign, size)), lane_type("float32", lanes))
    if dtype == "uint16":
        bits = T.shift_left(T.cast(value, lane_type("uint32", lanes)), splat(16, "uint32", lanes))
        return T.reinterpret(lane_type("float32", lanes), bits)
    return T.cast(value, lane_type("float32", lanes))


@contextmanager
def when(condition: Expr) -> Iterator[None]:
    """Run the body where the condition holds."""
    with T.If(condition), T.Then():
        yield


def prim_func(build: Any) -> tirx.PrimFunc:
    """The PrimFunc that a function of no arguments emits."""
    with IRBuilder() as builder, T.prim_func(private=True):
        T.func_name("kernel")
        T.func_attr({"op_pattern": OPAQUE, "tirx.noalias": True})
        build()
    return builder.get()


def store_rows(buffer: Buffer, value: Expr, token: Expr, row: Expr, *, rows: int, lanes: int, add: Buffer | None = None) -> None:
    """Write a vector of rows (plus those of `add` [rows]) to buffer[token, row:], leaving out what lies beyond `rows`."""

    def whole() -> None:
        store(buffer, value if add is None else value + vector(add, row, lanes=lanes), token, row, lanes=lanes)

    if rows % LANES == 0:
        whole()
        return
    with T.If(row + lanes <= rows):
        with T.Then():
            whole()
        with T.Else():
            partial = Register("float32", lanes)
            partial.set(value)
            with T.serial(lanes) as i, when(row + i < rows):
                element = partial.element(i)
                store(buffer, element if add is None else element + add[row + i], token, row + i)


def tensor_shape(x: relax.Expr) -> list[Expr]:
    """The dimensions of a Relax tensor."""
    return list(x.ty.shape)


def tensor_type(shape: tuple[Expr, ...], dtype: str) -> relax.TensorType:
    """The type of a Relax tensor."""
    return relax.TensorType(shape, dtype)


def tensor_dtype(x: relax.Expr) -> str:
    """The element type of a Relax tensor."""
    return str(x.ty.dtype)
