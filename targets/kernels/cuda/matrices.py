"""Several packed matrices with the same columns, as one kernel has them: what it is told of them, its parameters, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Buffer, Expr, argument, when
from moec.targets.kernels.cuda.layout import FragmentLayout


@dataclass(frozen=True)
class Projection:
    """One of the matrices."""

    layout: FragmentLayout
    bias: bool = False


@dataclass(frozen=True)
class MatricesSpec:
    """A kernel for some matrices [N_i, K]."""

    matrices: tuple[Projection, ...]

    def __post_init__(self) -> None:
        assert len({matrix.layout.k for matrix in self.matrices}) == 1, self.matrices

    @cached_property
    def k(self) -> int:
        """Columns."""
        return self.matrices[0].layout.k

    @cached_property
    def blocks(self) -> int:
        """Blocks of 128 columns."""
        return self.matrices[0].layout.blocks

    @property
    def by_format(self) -> list[list[int]]:
        """The matrices that are one piece of code."""
        formats = [matrix.layout.format for matrix in self.matrices]
        return [[i for i, found in enumerate(formats) if found == name] for name in dict.fromkeys(formats)]

    def weights(self) -> tuple[list[dict[str, Buffer]], list[Buffer | None]]:
        """The next parameters of the function being built: arrays of each matrix, then the biases."""
        arrays: list[dict[str, Buffer]] = [
            {name: argument(f"{name}{i}", shape, dtype) for name, (shape, dtype) in matrix.layout.arrays().items()}
            for i, matrix in enumerate(self.matrices)
        ]
        return arrays, [argument(f"bias{i}", (m.layout.n,), "float32") if m.bias else None for i, m in enumerate(self.matrices)]

    def results(self, tokens: Expr) -> list[Buffer]:
        """The next parameters: a result [tokens, N_i] of each matrix."""
        return [argument(f"out{i}", (tokens, matrix.layout.n), "float32") for i, matrix in enumerate(self.matrices)]


class SameFormat:
    """Some matrices of a format.

    Args:
        spec: of all matrices.
        members: which of them.
        arrays, biases, outs: the parameters, of all matrices.
    """

    def __init__(
        self, spec: MatricesSpec, members: Sequence[int], arrays: Sequence[dict[str, Buffer]], biases: Sequence[Buffer | None],
        outs: Sequence[Buffer],
    ) -> None:  # fmt: skip
        self.members = members
        self._arrays, self._biases = [arrays[i] for i in members], [biases[i] for i in members]
        self._outs, self._layouts = [outs[i] for i in members], [spec.matrices[i].layout for i in members]
        self._layout = max(self._layouts, key=lambda layout: layout.n)


def in_ranges(part: Expr, counts: Sequence[int], act: Callable[[int, int], None]) -> None:
    """Deal parts out by ranges of so many: act(number of the range, its first part), for the one that has this part."""
    begin = 0
    for number, count in enumerate(counts):
        if len(counts) == 1:
            act(number, begin)
        else:
            with when(T.And(part >= begin, part < begin + count)):
                act(number, begin)
        begin += count
