"""Where the values of parameters come from. A graph knows names, types and formats; the values stay on disk until asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moec.compiler.errors import MoecError


class WeightSource(Protocol):
    """Values of parameters, read one tensor (or one expert) at a time."""

    def load(self, name: str, expert: int | None = None) -> Tensor:
        """The value of a parameter, or of one index of its first axis, in the element type it is stored in."""
        ...


@dataclass(frozen=True)
class MemoryWeights:
    """Values held in memory."""

    tensors: Mapping[str, Tensor]

    def load(self, name: str, expert: int | None = None) -> Tensor:
        if name not in self.tensors:
            raise MoecError(f"no weight is called {name!r}")
        return self.tensors[name] if expert is None else self.tensors[name][expert]
