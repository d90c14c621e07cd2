"""Loops over tokens and over the values of a row, for kernels that treat each token by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.emit import Buffer, Expr

PARALLEL_VALUES = 1 << 14
"""Values below which waking the other threads costs more than they save."""

SMALL_BYTES = 1 << 18
"""Weights of which one thread reads all in the time that it takes to wake the others and wait for them."""


def over_tiles(tokens: int | None, nbytes: int, count: Expr) -> Any:
    """The loop over tiles of rows of weights of `nbytes`: on all threads, unless one token meets few weights."""
    return T.serial(count) if tokens == 1 and nbytes < SMALL_BYTES else T.parallel(count)


def over_tokens(tokens: Expr, values: int, body: Callable[[Expr], None]) -> None:
    """Run `body(token)` for each token, on all threads where there are enough values (`values` of each token)."""
    if isinstance(tokens, int):
        with T.serial(tokens) as token:
            body(token)
        return
    with T.If(tokens * values > PARALLEL_VALUES):
        with T.Then(), T.parallel(tokens) as token:
            body(token)
        with T.Else(), T.serial(tokens) as token:
            body(token)


def over_row(size: int, lanes: int, body: Callable[[Expr, int], None]) -> None:
    """Run `body(first, width)` for vectors of `lanes` values, then for the rest of the row one by one."""
    if size >= lanes:
        with T.serial(size // lanes) as i:
            body(i * lanes, lanes)
    if size % lanes:
        with T.serial(size % lanes) as i:
            body(size // lanes * lanes + i, 1)


def stack(shape: tuple[int, ...], dtype: str = "float32") -> Buffer:
    """An array on the stack, whatever its size (TVM would otherwise allocate more than 1 KiB on the heap at every pass)."""
    return T.alloc_buffer(shape, dtype, layout=None, align=64, annotations={"disable_lower_builtin": True})
