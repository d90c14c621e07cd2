"""Weight formats: how the numbers of a weight are stored.

A format is found by its name, whose first word names the file in this folder (`int4_g64` is in `int.py`, `ternary_g64` in
`ternary.py`; the plain ones, such as `bf16`, are all in `float.py`).
It is stateless: `nbytes(shape)` is exact without data, and `unpack(pack(x)) == x` bit for bit.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from moec.runtime.errors import MoecError, unknown

Scales = NDArray[np.floating[Any]]
"""Scales: float16 of integer formats, float32 of fp8."""

Arrays = Mapping[str, NDArray[np.generic]]
"""The stored arrays of one weight by component (`data`; or `codes`, `scale` and, where an integer format is asymmetric, `zero`)."""


@runtime_checkable
class Format(Protocol):
    """What every weight format offers. Shapes are those of the weight: [..., N, K], quantised in groups along K."""

    @property
    def name(self) -> str:
        """The full name, such as `int4_g64`."""
        ...

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a packed weight of this shape, scales and zero points included."""
        ...

    def unpack(self, arrays: Arrays, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """The values of a packed weight, in float32."""
        ...


@lru_cache(maxsize=256)
def get_format(name: str) -> Format:
    """The format of this name.

    >>> get_format("int4_g64").nbytes((8, 128))
    544

    Raises:
        MoecError: no format has that name; the message lists the names that exist.
    """
    for module in pkgutil.iter_modules(__path__):
        found = importlib.import_module(f"{__name__}.{module.name}").parse(name)
        if found is not None:
            assert isinstance(found, Format)
            return found
    if re.fullmatch(r"int\d+.*", name):
        raise MoecError(f"unknown format {name!r}: expected int<bits>_g<group>[_asym] or int<bits>_channel[_asym], bits 1 to 8")
    if name.startswith("fp8"):
        raise MoecError(f"unknown format {name!r}: expected fp8_block128 or fp8_channel, E4M3 with a scale for each block or row")
    if (kind := re.match(r"ternary|binary", name)) is not None:
        raise MoecError(f"unknown format {name!r}: expected {kind[0]}_g<group> or {kind[0]}_channel")
    raise unknown("format", name, known_formats())


def known_formats() -> list[str]:
    """The names of a representative set: every float format, and every other one at its usual group sizes."""
    names: list[str] = []
    for module in pkgutil.iter_modules(__path__):
        names += importlib.import_module(f"{__name__}.{module.name}").NAMES
    return sorted(names)
