"""Weights stored as floating point numbers (`f32`, `bf16`, `f16`) or as the integers they are (`i64`, `i32`, `bool`)."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from moec.runtime.formats import Arrays

STORAGE = {"f32": "<f4", "bf16": "<u2", "f16": "<f2", "f64": "<f8", "i64": "<i8", "i32": "<i4", "u8": "u1", "bool": "?"}
"""numpy's type of the stored array; bfloat16 is stored as its 16 bits."""

NAMES = ["bf16", "f16", "f32"]


@dataclass(frozen=True)
class PlainFormat:
    """One element a number, without scales."""

    name: str

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return prod(shape) * np.dtype(STORAGE[self.name]).itemsize

    def pack(self, values: NDArray[np.float32]) -> Arrays:
        """Values [...] in float32 -> `data` [...], rounded to nearest even."""
        if self.name != "bf16":
            return {"data": values.astype(STORAGE[self.name])}
        bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40  # a NaN stays a NaN instead of rounding up to infinity
        return {"data": np.where(np.isnan(values), quiet, rounded).astype("<u2")}

    def unpack(self, arrays: Arrays, shape: tuple[int, ...]) -> NDArray[np.float32]:
        data = arrays["data"].reshape(shape)
        if self.name == "bf16":
            return (data.astype("<u4") << 16).view("<f4")
        return data.astype(np.float32)


def parse(name: str) -> PlainFormat | None:
    """The format of this name, or None."""
    return PlainFormat(name) if name in STORAGE else None
