"""What a backend offers to the compiler, and what it gets.

A backend is made for one lowered graph. It states how it wants each parameter stored (so that sizes and file offsets are exact before
a single weight is read), turns quantised weights into those arrays one expert at a time, and writes its code beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moec.compiler.ir import Graph, Param
from moec.compiler.packed import Packed


@dataclass(frozen=True)
class StoredArray:
    """An array in the artifact's weight files. A stacked parameter's arrays have the expert axis first."""

    dtype: str
    """numpy's name: `uint8`, `uint32`, `float16`, `float32`, ..."""
    shape: tuple[int, ...]
    members: tuple[int, ...] | None = None
    """Of a stacked parameter whose experts differ in format: those that the array has, in order. None: all."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize

    def place(self, expert: int) -> int | None:
        """Where an expert is on the first axis of a stacked parameter's array; None if it is not there."""
        if self.members is None:
            return expert
        return self.members.index(expert) if expert in self.members else None


@dataclass(frozen=True)
class Location:
    """Where a stored array lies: a file of the artifact, and the byte range in it (64-byte aligned)."""

    file: str
    offset: int
    nbytes: int


class Backend(Protocol):
    """One backend, for one graph."""

    graph: Graph
    """The graph as this backend lowered it. Its parameters are those that are stored."""

    def stacked(self, param: Param) -> bool:
        """Whether the parameter is stored one index of its first axis (expert) at a time."""
        ...

    def storage(self, param: Param) -> dict[str, StoredArray]:
        """The arrays that a parameter becomes, by component (`weight`, `scale`, ...)."""
        ...

    def store(self, param: Param, packed: Packed, expert: int | None = None) -> dict[str, NDArray[np.generic]]:
        """The arrays of a parameter, or those that an expert of a stacked one is in (then without the expert axis)."""
        ...

    def restore(self, param: Param, arrays: Mapping[str, NDArray[np.generic]], expert: int | None = None) -> Packed:
        """The inverse of `store`, bit for bit."""
        ...

    def build(self, folder: Path, locations: Mapping[tuple[str, str], Location]) -> dict[str, Any]:
        """Write the code that executes the graph.

        Args:
            folder: the artifact's folder (being written).
            locations: where each (parameter, component) will lie.

        Returns:
            What the runtime's executor needs to know, for the manifest's `executor` section.
        """
        ...
