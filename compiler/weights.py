"""Where the values of parameters come from. A graph knows names, types and formats; the values stay on disk until asked for.

Passes change values without reading them: an `Edited` source answers for some parameters with a function of what lies below, and
passes the rest on, so that dropping an expert of a model of 100 GB costs nothing until its neighbours are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.packed import Quantized


class WeightSource(Protocol):
    """Values of parameters, read one tensor (or one expert) at a time."""

    def load(self, name: str, expert: int | None = None) -> Tensor:
        """The value of a parameter, or of one index of its first axis, in the element type it is stored in."""
        ...


@runtime_checkable
class PackedSource(Protocol):
    """A source that knows the codes of some weights; `load` gives the values that the codes stand for."""

    def load(self, name: str, expert: int | None = None) -> Tensor: ...

    def packed(self, name: str, expert: int | None = None) -> Quantized | None:
        """The codes of a parameter or of one expert of it; None where it has none."""
        ...


@dataclass(frozen=True)
class MemoryWeights:
    """Values held in memory."""

    tensors: Mapping[str, Tensor]

    def load(self, name: str, expert: int | None = None) -> Tensor:
        if name not in self.tensors:
            raise MoecError(f"no weight is called {name!r}")
        return self.tensors[name] if expert is None else self.tensors[name][expert]


Edit = Callable[[int | None], Tensor]
"""The value of an edited parameter: whole (None), or of one expert."""


@dataclass(frozen=True)
class Edited:
    """Another source with some parameters changed or added."""

    base: WeightSource
    edits: Mapping[str, Edit]

    def load(self, name: str, expert: int | None = None) -> Tensor:
        edit = self.edits.get(name)
        return self.base.load(name, expert) if edit is None else edit(expert)

    def packed(self, name: str, expert: int | None = None) -> Quantized | None:
        return None if name in self.edits else packed_of(self.base, name, expert)


def packed_of(weights: WeightSource, name: str, expert: int | None = None) -> Quantized | None:
    """The codes that a source has of a weight, if any."""
    return weights.packed(name, expert) if isinstance(weights, PackedSource) else None


def constant(value: Tensor) -> Edit:
    """An edit that answers with a value in memory."""
    return lambda expert: value if expert is None else value[expert]


def select(base: WeightSource, name: str, keep: Sequence[int]) -> Edit:
    """An edit that keeps some indices of a parameter's first axis, in this order; the others are never read."""
    keep = list(keep)

    def edit(expert: int | None) -> Tensor:
        if expert is not None:
            return base.load(name, keep[expert])
        return torch.stack([base.load(name, index) for index in keep])

    return edit


def each_expert(one: Callable[[int], Tensor], count: int) -> Edit:
    """An edit of a stacked parameter, made an expert at a time."""
    return lambda expert: torch.stack([one(e) for e in range(count)]) if expert is None else one(expert)


def combine(base: WeightSource, name: str, matrix: Tensor) -> Edit:
    """An edit that makes each new expert a weighted sum of old ones: matrix [E', E], new[j] = sum over i of matrix[j, i] old[i]."""
    matrix = matrix.detach().float()

    def row(index: int) -> Tensor:
        members = matrix[index].nonzero()[:, 0].tolist()
        if len(members) == 1 and matrix[index, members[0]] == 1:
            return base.load(name, members[0])
        total = torch.zeros_like(base.load(name, 0), dtype=torch.float32, device=matrix.device)
        for member in members:
            total += matrix[index, member] * base.load(name, member).to(matrix.device).float()
        return total

    return lambda expert: torch.stack([row(i) for i in range(len(matrix))]) if expert is None else row(expert)
