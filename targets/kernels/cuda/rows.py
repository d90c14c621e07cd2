"""Weights that lie as they are, a row after the other: formats that the tensor cores' kernels do not read. Plain kernels do.

f32, f16      any rows
bf16          rows that are no multiple of 8 numbers, such as the left ones of low-rank factors
zero          nothing is stored: a projection that is nothing but its factors
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moec.targets.kernels.cuda.layout import Arrays, FragmentLayout, padded

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "uint16"}


@dataclass(frozen=True)
class RowLayout(FragmentLayout):
    """A weight [n, k] in its rows: `data` [..., n, k]."""

    in_fragments: ClassVar[bool] = False

    def __post_init__(self) -> None:
        assert self.format == "zero" or self.format in DTYPES, self.format

    def arrays(self, *lead: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of the array, with leading axes such as [E]."""
        return {} if self.format == "zero" else {"data": ((*lead, self.n, self.k), DTYPES[self.format])}

    def tile_values(self, values: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
        """Values [..., N, K] -> the array; rows that are missing are zero."""
        values = values.view(DTYPES[self.format])
        return {"data": np.ascontiguousarray(padded(values, self.n, self.k))}

    def untile_values(self, arrays: Arrays) -> NDArray[np.generic]:
        """The inverse of `tile_values`."""
        return np.ascontiguousarray(arrays["data"])


def layout_of(n: int, k: int, name: str) -> FragmentLayout:
    """The layout of a weight [n, k] in a format.

    Raises:
        MoecError: there is no kernel for it.
    """
    rows = name in ("f32", "f16", "zero") or (name == "bf16" and k % 8)
    return RowLayout(n, k, name) if rows else FragmentLayout(n, k, name)
