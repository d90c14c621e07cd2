"""`zero`: a weight of zeros, of which nothing is stored. Low-rank factors stand for the whole of such a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moec.runtime.formats import Arrays

NAMES: list[str] = []
"""Passes give this format to a weight whose values they replace; as a choice for weights that have values it makes no sense."""


@dataclass(frozen=True)
class ZeroFormat:
    """No bytes, whatever the shape."""

    name: str = "zero"

    def nbytes(self, shape: tuple[int, ...]) -> int:  # noqa: ARG002  # every format has it
        return 0

    def unpack(self, arrays: Arrays, shape: tuple[int, ...]) -> NDArray[np.float32]:  # noqa: ARG002
        return np.zeros(shape, np.float32)


def parse(name: str) -> ZeroFormat | None:
    """The format of this name, or None."""
    return ZeroFormat() if name == "zero" else None
