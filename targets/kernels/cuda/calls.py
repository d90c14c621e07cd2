"""What the functions that emit kernels are given: where kernels are kept, and the GPU for which they choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Functions(Protocol):
    """The PrimFuncs of a module, each built once however many layers call it."""

    bb: Any

    def call(self, name: str, key: object, make: Callable[[], Any], args: Sequence[Any], *outs: tuple[Sequence[Any], str]) -> list[Any]:
        """Emit a call of the kernel of this name and key; returns its outputs, whose shapes and dtypes are given."""
        ...

    def once(self, name: str, x: Any, make: Callable[[], Any]) -> Any:
        """What is made of a value under this name: the first time what `make` emits, later the same again."""
        ...

    def get(self, name: str, key: object, make: Callable[[], Any]) -> Any:
        """The global variable of a kernel."""
        ...


@dataclass(frozen=True)
class Gpu:
    """What choices depend on.

    Args:
        shared_bytes: the most shared memory of a block of threads.
        multiprocessors: how many there are.
        clusters: whether blocks can read each other's memory.
    """

    shared_bytes: int
    multiprocessors: int
    clusters: bool = True
