"""How the experts of a layer lie in memory for the CUDA kernels. Experts may differ in format: each format has its own arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from moec.targets.kernels.cuda.layout import BLOCK, ROWS, FragmentLayout, ceil_div

Scalar = TypeVar("Scalar", bound=np.generic)

HALF = ROWS // 2


@dataclass(frozen=True)
class Stack:
    """One projection of all experts: a weight [E, n, k] whose experts have one format, or one each.

    Arrays of class c have the suffix `_c` where there are several classes, and hold the experts of that format in order;
    `table` int32 [E, 2] then says which class an expert is of, and which of its members.
    """

    experts: int
    n: int
    k: int
    formats: tuple[str, ...]

    @property
    def classes(self) -> tuple[FragmentLayout, ...]:
        """The layout of each format that occurs, in order of first use."""
        return tuple(FragmentLayout(self.n, self.k, name) for name in dict.fromkeys(self.formats))

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
        """int32 [E, 2]: the class of each expert, and its place there."""
        found = np.zeros((self.experts, 2), np.int32)
        for index in range(len(self.classes)):
            for place, expert in enumerate(self.members(index)):
                found[expert] = index, place
        return found

    def suffix(self, index: int) -> str:
        """What the names of a class's arrays end in."""
        return f"_{index}" if self.mixed else ""

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every array."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for index, layout in enumerate(self.classes):
            lead = len(self.members(index))
            found |= {f"{name}{self.suffix(index)}": spec for name, spec in layout.arrays(lead).items()}
        return {**found, "table": ((self.experts, 2), "int32")} if self.mixed else found

    def nbytes(self, expert: int | None = None) -> int:
        """Bytes of the weights of all experts, or of one."""
        by_class = [layout.nbytes() for layout in self.classes]
        table = self.table()
        return sum(by_class[c] for c in table[:, 0]) if expert is None else by_class[int(table[expert, 0])]


@dataclass(frozen=True)
class ExpertsLayout:
    """E experts of gate_up [2F, D] (gated, gate rows first) or up [F, D], and down [D, F].

    A tile of gate_up has 8 gate rows, then the 8 up rows that go with them, so that a lane holds both; `interleave` brings rows in that
    order. Each format is a name for all experts, or a tuple with one each.
    """

    experts: int
    d: int
    f: int
    gate_up_format: str | tuple[str, ...]
    down_format: str | tuple[str, ...]
    gated: bool = True

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
        return Stack(self.experts, self.f_tiles * ROWS, self.d, _names(self.gate_up_format, self.experts))

    @property
    def down(self) -> Stack:
        """The stack of down."""
        return Stack(self.experts, self.d, self.f, _names(self.down_format, self.experts))

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

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every array: those of gate_up and down, names prefixed."""
        found = {f"gate_up_{name}": spec for name, spec in self.gate_up.arrays().items()}
        return {**found, **{f"down_{name}": spec for name, spec in self.down.arrays().items()}}

    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self.gate_up.nbytes() + self.down.nbytes()


def _names(formats: str | tuple[str, ...], experts: int) -> tuple[str, ...]:
    return (formats,) * experts if isinstance(formats, str) else formats
