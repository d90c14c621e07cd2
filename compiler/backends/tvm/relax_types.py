"""Types of the graph in Relax: element types, and shapes in which one stream of tokens (B = 1) has T tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import relax, tirx

from moec.compiler.errors import MoecError
from moec.compiler.ir import Dim, TensorType, dim_value

DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "f64": "float64",
    "i64": "int64",
    "i32": "int32",
    "i16": "int16",
    "i8": "int8",
    "u8": "uint8",
    "bool": "bool",
}


class Sizes:
    """The sizes of symbols in one lowered function: numbers, or TIR variables.

    Args:
        tokens: T, None for any number.
        rows: R, None for any number.
    """

    def __init__(self, tokens: int | None, rows: int | None) -> None:
        self.tokens: Any = tirx.Var("T", "int64") if tokens is None else tokens
        self.rows: Any = tirx.Var("R", "int64") if rows is None else rows
        self._values: Mapping[str, Any] = {"B": 1, "T": self.tokens, "R": self.rows}

    def dim(self, dim: Dim) -> Any:
        """A dimension as a number or TIR expression."""
        try:
            return dim_value(dim, self._values)
        except ValueError as error:  # Max and Min compare
            raise MoecError(f"the dimension {dim!r} depends on the number of tokens in a way that cannot be compiled") from error

    def type(self, kind: TensorType) -> relax.TensorType:
        """A tensor type."""
        return relax.TensorType([self.dim(d) for d in kind.shape], DTYPES[kind.dtype])


def stream(kind: TensorType) -> tuple[str, int] | None:
    """How a value lies as one row of numbers a token: its symbol (T or R) and the numbers of a token; None if it does not.

    >>> stream(TensorType("f32", ("B", "T", 4, 8))), stream(TensorType("f32", ("B", 4, "T", 8)))
    (('T', 32), None)
    """
    found: tuple[str, int] | None = None
    for dim in kind.shape:
        size: dict[str, int] = {}
        for symbol in ("T", "R"):
            values = {"B": 1, "T": 1, "R": 1}
            one, two, three = (dim_value(dim, {**values, symbol: n}) for n in (1, 2, 3))
            if (two, three) == (2 * one, 3 * one) and one:
                size[symbol] = one
            elif not one == two == three:
                return None
        if not size:
            count = dim_value(dim, {"B": 1, "T": 1, "R": 1})
            if found:
                found = (found[0], found[1] * count)
            elif count != 1:
                return None
        elif found or len(size) > 1:
            return None
        else:
            ((symbol, count),) = size.items()
            found = (symbol, count)
    return found


def typed(x: Any) -> Any:
    """An expression whose type is known: emitted into the function being built, where that is needed."""
    return x if isinstance(x.ty, relax.TensorType) else relax.BlockBuilder.current().emit(x)


def dtype_of(x: Any) -> str:
    """The element type of a Relax variable or constant."""
    return str(x.ty.dtype)


def shape_of(x: Any) -> list[Any]:
    """The shape of a Relax variable or constant, with plain numbers where they are known."""
    return [int(d) if isinstance(d, tirx.IntImm) else d for d in x.ty.shape]
