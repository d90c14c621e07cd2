"""How the experts of a layer lie in memory for the CUDA kernels. Experts may differ in format: each format has its own arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from moec.runtime.errors import MoecError
from moec.targets.kernels.cuda.layout import BLOCK, ROWS, FragmentLayout, ceil_div
from moec.targets.kernels.cuda.rows import layout_of

Scalar = TypeVar("Scalar", bound=np.generic)

HALF = ROWS // 2

Factors = tuple[int, str, str]
"""Low-rank factors of a projection [N, K]: the rank, and the formats of left [N, rank] and right [rank, K]."""


@dataclass(frozen=True)
class Stack:
    """One projection of all experts: a weight [E, n, k] whose experts have one format, or one each.

    Arrays of class c have the suffix `_c` where there are several classes, and hold the experts of that format in order;
    `table` int32 [E, 2] then says which class an expert is of, and which of its members.

    Experts may differ in size (`rows` or `columns` of each, n or k the most). The first two axes of an array, an expert's tiles and blocks,
    are one then, and the experts of a class follow each other along it; `table` int32 [E, 4] has the class, where the expert begins in the
    arrays of numbers and in those of scales, and how many tiles (of `rows`) or columns (of `columns`) it has.
    """

    experts: int
    n: int
    k: int
    formats: tuple[str, ...]
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    @property
    def classes(self) -> tuple[FragmentLayout, ...]:
        """The layout of each format that occurs, in order of first use."""
        return tuple(layout_of(self.n, self.k, name) for name in dict.fromkeys(self.formats))

    @property
    def ragged(self) -> bool:
        """Whether the experts differ in size."""
        return bool(self.rows or self.columns)

    @property
    def tabled(self) -> bool:
        """Whether there is a table."""
        return self.mixed or self.ragged

    def layout(self, expert: int) -> FragmentLayout:
        """The layout of an expert by itself."""
        n, k = self.rows[expert] if self.rows else self.n, self.columns[expert] if self.columns else self.k
        return layout_of(n, k, self.formats[expert])

    @property
    def mixed(self) -> bool:
        """Whether the experts differ in format."""
        return len(self.classes) > 1

    def members(self, index: int) -> list[int]:
        """The experts of a class."""
        if not self.mixed:
            return list(range(self.experts))
        name = self.classes[index].format
        return [e for e, other in enumerate(self.formats) if other == name]

    def table(self) -> NDArray[np.int32]:
        """int32 [E, 2]: the class of each expert, and its place there; [E, 4] where they differ in size."""
        found = np.zeros((self.experts, 4 if self.ragged else 2), np.int32)
        for index in range(len(self.classes)):
            first, side = 0, 0
            for place, expert in enumerate(self.members(index)):
                own = self.layout(expert)
                size = own.tiles if self.rows else ceil_div(own.k, 8) * 8
                found[expert] = (index, first, side, size) if self.ragged else (index, place)
                first, side = first + own.tiles * own.blocks, side + own.tiles * own.scale_blocks
        return found

    def join(self, experts: Sequence[Mapping[str, NDArray[np.generic]]]) -> dict[str, NDArray[np.generic]]:
        """The arrays of the stack from those of each expert by itself, as its `layout` makes them."""
        found: dict[str, NDArray[np.generic]] = {}
        for index in range(len(self.classes)):
            members = [experts[e] for e in self.members(index)]
            for name in members[0]:
                parts = [arrays[name] for arrays in members]
                joined = np.concatenate([p.reshape(-1, *p.shape[2:]) for p in parts]) if self.ragged else np.stack(parts)
                found[name + self.suffix(index)] = joined
        return {**found, "table": self.table()} if self.tabled else found

    def suffix(self, index: int) -> str:
        """What the names of a class's arrays end in."""
        return f"_{index}" if self.mixed else ""

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every array."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for index, layout in enumerate(self.classes):
            members = self.members(index)
            specs = layout.arrays(len(members))
            if self.ragged:
                own = [self.layout(e).arrays() for e in members]
                specs = {n: ((sum(o[n][0][0] * o[n][0][1] for o in own), *shape[3:]), dtype) for n, (shape, dtype) in specs.items()}
            found |= {f"{name}{self.suffix(index)}": spec for name, spec in specs.items()}
        return {**found, "table": ((self.experts, 4 if self.ragged else 2), "int32")} if self.tabled else found

    def nbytes(self, expert: int | None = None) -> int:
        """Bytes of the weights of all experts, or of one."""
        return sum(self.layout(e).nbytes() for e in (range(self.experts) if expert is None else (expert,)))


@dataclass(frozen=True)
class ExpertsLayout:
    """E experts of gate_up [2F, D] (gated, gate rows first) or up [F, D], and down [D, F].

    A tile of gate_up has 8 gate rows, then the 8 up rows that go with them, so that a lane holds both; `interleave` brings rows in that
    order. Each format is a name for all experts, or a tuple with one each. Where a projection has low-rank factors, left right is added to
    it, and the rows of the left one of gate_up are interleaved likewise; if it is nothing but them, its format is `zero`.

    Args:
        widths: F of each expert, a multiple of 8, where they differ; f is the largest.

    Raises:
        MoecError: there is a width too many or too few, or one that is no multiple of 8 from 8 to f.
    """

    experts: int
    d: int
    f: int
    gate_up_format: str | tuple[str, ...]
    down_format: str | tuple[str, ...]
    gated: bool = True
    widths: tuple[int, ...] = ()
    gate_up_factors: Factors | None = None
    down_factors: Factors | None = None

    def __post_init__(self) -> None:
        if not self.widths:
            return
        if len(self.widths) != self.experts or max(self.widths) != self.f or any(w < 8 or w % 8 for w in self.widths):
            raise MoecError(
                f"experts of {self.f} neurons at most: the widths {self.widths} are to be multiples of 8, one for each of {self.experts} "
                f"experts, the largest {self.f}"
            )

    def of(self, expert: int) -> ExpertsLayout:
        """The layout of an expert by itself, in whose order its rows are."""
        up, down = (_names(names, self.experts)[expert] for names in (self.gate_up_format, self.down_format))
        return ExpertsLayout(1, self.d, self.widths[expert] if self.widths else self.f, up, down, self.gated)

    @property
    def parts(self) -> int:
        """2 for gate and up, 1 without a gate."""
        return 2 if self.gated else 1

    @property
    def tile_rows(self) -> int:
        """Hidden values of a tile of gate_up."""
        return HALF if self.gated else ROWS

    @property
    def f_tiles(self) -> int:
        """Tiles of gate_up."""
        return ceil_div(self.f, self.tile_rows)

    @property
    def padded_f(self) -> int:
        """Hidden values in whole blocks."""
        return ceil_div(self.f, BLOCK) * BLOCK

    @property
    def gate_up(self) -> Stack:
        """The stack of interleaved gate_up."""
        rows = tuple(ceil_div(width, self.tile_rows) * ROWS for width in self.widths)
        return Stack(self.experts, self.f_tiles * ROWS, self.d, _names(self.gate_up_format, self.experts), rows)

    @property
    def down(self) -> Stack:
        """The stack of down."""
        return Stack(self.experts, self.d, self.f, _names(self.down_format, self.experts), (), self.widths)

    def interleave(self, x: NDArray[Scalar]) -> NDArray[Scalar]:
        """Rows [..., parts * F, m] (all of gate, then all of up) -> [..., gate_up.n, m], zero rows added.

        For codes, scales and zero points alike; a bias [E, parts * F] goes through it as [E, parts * F, 1].
        """
        *lead, _, m = x.shape
        parts = x.reshape(*lead, self.parts, self.f, m)
        widths = [(0, 0)] * (len(lead) + 1) + [(0, self.f_tiles * self.tile_rows - self.f), (0, 0)]
        tiles = np.pad(parts, widths).reshape(*lead, self.parts, self.f_tiles, self.tile_rows, m)
        return np.ascontiguousarray(np.moveaxis(tiles, -4, -3)).reshape(*lead, self.f_tiles * ROWS, m)

    def deinterleave(self, x: NDArray[Scalar]) -> NDArray[Scalar]:
        """The inverse of `interleave`."""
        *lead, _, m = x.shape
        tiles = np.moveaxis(x.reshape(*lead, self.f_tiles, self.parts, self.tile_rows, m), -3, -4)
        rows = tiles.reshape(*lead, self.parts, self.f_tiles * self.tile_rows, m)[..., : self.f, :]
        return np.ascontiguousarray(rows).reshape(*lead, self.parts * self.f, m)

    def biases(self, gate_up: NDArray[np.float32], down: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Biases [E, parts * F] and [E, D] -> [E, gate_up.n] and [E, D], as the kernels read them."""
        return self.interleave(gate_up[..., None])[..., 0].astype(np.float32), down.astype(np.float32)

    def stacks(self) -> dict[str, Stack]:
        """All that an expert has, by name."""
        found = {"gate_up": self.gate_up, "down": self.down}
        for name, factors in (("gate_up", self.gate_up_factors), ("down", self.down_factors)):
            if factors is not None:
                (rank, left, right), base = factors, found[name]
                found[f"{name}_left"] = Stack(self.experts, base.n, rank, (left,) * self.experts)
                found[f"{name}_right"] = Stack(self.experts, rank, base.k, (right,) * self.experts)
        return found

    @property
    def in_fragments(self) -> bool:
        """Whether the kernels of the tensor cores read all of it."""
        stacks = self.stacks()
        return len(stacks) == 2 and all(layout.in_fragments for stack in stacks.values() for layout in stack.classes)

    def names(self, part: str) -> list[str]:
        """The names of the arrays of one of the stacks."""
        return [f"{part}_{name}" for name in self.stacks()[part].arrays()]

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every array: those of the stacks, names prefixed."""
        return {f"{part}_{name}": spec for part, stack in self.stacks().items() for name, spec in stack.arrays().items()}

    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(stack.nbytes() for stack in self.stacks().values())


def _names(formats: str | tuple[str, ...], experts: int) -> tuple[str, ...]:
    return (formats,) * experts if isinstance(formats, str) else formats
