"""How the experts of a layer lie in memory, and the operands of their kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tvm.tirx.script import builder as T

from moec.runtime.counters import COUNTS
from moec.targets.kernels.cpu.emit import Buffer, Expr, argument, store
from moec.targets.kernels.cpu.layout import LANES, LaneLayout, ceil_div
from moec.targets.kernels.cpu.register_tile import weight_arguments

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class Factors:
    """Low-rank factors of a projection [N, K]: left [N, rank] and right [rank, K], and their formats."""

    rank: int
    left: str
    right: str


@dataclass(frozen=True)
class ExpertsLayout:
    """E experts of gate_up [2F, D] (gated, gate rows first) or up [F, D], and down [D, F].

    The rows of gate_up are stored in tiles of 16 gate rows followed by the 16 up rows that go with them, so that an expert is one
    stream; `interleave` brings them in that order. Where a projection has factors, left right is added to it, and the rows of the left
    one of gate_up are stored likewise. A projection that is nothing but its factors has the format `zero`.
    """

    experts: int
    d: int
    f: int
    gate_up_format: str
    down_format: str
    gated: bool = True
    gate_up_factors: Factors | None = None
    down_factors: Factors | None = None

    @property
    def parts(self) -> int:
        """2 for gate and up, 1 without a gate."""
        return 2 if self.gated else 1

    @property
    def f_tiles(self) -> int:
        """Tiles of the hidden rows."""
        return ceil_div(self.f, LANES)

    @property
    def gate_up(self) -> LaneLayout:
        """The layout of an expert's interleaved gate_up."""
        return LaneLayout(self.parts * self.f_tiles * LANES, self.d, self.gate_up_format)

    @property
    def down(self) -> LaneLayout:
        """The layout of an expert's down."""
        return LaneLayout(self.d, self.f, self.down_format)

    def matrices(self) -> dict[str, LaneLayout]:
        """The layouts of all that an expert has, by name."""
        found = {"gate_up": self.gate_up, "down": self.down}
        for name, factors in (("gate_up", self.gate_up_factors), ("down", self.down_factors)):
            if factors is not None:
                found[f"{name}_left"] = LaneLayout(found[name].n, factors.rank, factors.left)
                found[f"{name}_right"] = LaneLayout(factors.rank, found[name].k, factors.right)
        return found

    @property
    def bias_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of what `biases` returns."""
        return (self.experts, self.gate_up.n), (self.experts, self.down.tiles * LANES)

    def interleave(self, x: NDArray[Scalar]) -> NDArray[Scalar]:
        """Rows [..., parts * F, m] (all of gate, then all of up) -> [..., gate_up.n, m], zero rows added.

        For codes, scales and zero points alike; a bias [E, parts * F] goes through it as [E, parts * F, 1].
        """
        *lead, _, m = x.shape
        parts = x.reshape(*lead, self.parts, self.f, m)
        widths = [(0, 0)] * len(lead) + [(0, 0), (0, self.f_tiles * LANES - self.f), (0, 0)]
        tiles = np.pad(parts, widths).reshape(*lead, self.parts, self.f_tiles, LANES, m)
        return np.ascontiguousarray(np.moveaxis(tiles, -4, -3)).reshape(*lead, self.gate_up.n, m)

    def deinterleave(self, x: NDArray[Scalar]) -> NDArray[Scalar]:
        """The inverse of `interleave`."""
        *lead, _, m = x.shape
        tiles = np.moveaxis(x.reshape(*lead, self.f_tiles, self.parts, LANES, m), -3, -4)
        rows = tiles.reshape(*lead, self.parts, self.f_tiles * LANES, m)[..., : self.f, :]
        return np.ascontiguousarray(rows).reshape(*lead, self.parts * self.f, m)

    def biases(self, gate_up: NDArray[np.float32], down: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Biases [E, parts * F] and [E, D] -> [E, gate_up.n] and [E, D in whole tiles], as the kernels read them."""
        padding = self.down.tiles * LANES - self.d
        interleaved = self.interleave(gate_up[..., None])[..., 0]
        return interleaved.astype(np.float32), np.pad(down, [(0, 0), (0, padding)]).astype(np.float32)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every array: those of `matrices`, names prefixed, with a leading axis E."""
        parts = self.matrices().items()
        return {f"{part}_{name}": spec for part, layout in parts for name, spec in layout.arrays(self.experts).items()}

    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(layout.nbytes(self.experts) for layout in self.matrices().values())


class ExpertsOperands:
    """The parameters of an experts function: (x, ids, weights, arrays..., [gate_up_bias, down_bias], [counts], out)."""

    def __init__(self, layout: ExpertsLayout, tokens: int | None, top_k: int, ids_dtype: str, biases: bool, counted: bool) -> None:
        self.layout, self.top_k = layout, top_k
        self.tokens: Expr = tokens if tokens is not None else T.int64()
        self.x = argument("x", (self.tokens, layout.d), "float32")
        self.ids = argument("ids", (self.tokens, top_k), ids_dtype)
        self.weights = argument("weights", (self.tokens, top_k), "float32")
        self.matrices = {name: weight_arguments(matrix, layout.experts, prefix=f"{name}_") for name, matrix in layout.matrices().items()}
        self.gate_up_bias: Buffer | None = None
        self.down_bias: Buffer | None = None
        if biases:
            self.gate_up_bias = argument("gate_up_bias", (layout.experts, layout.gate_up.n), "float32")
            self.down_bias = argument("down_bias", (layout.experts, layout.down.tiles * LANES), "float32")
        self.counts = argument("counts", (COUNTS,), "int64") if counted else None
        self.out = argument("out", (self.tokens, layout.d), "float32")

    def count(self, tokens: Expr, experts: Expr) -> None:
        """Add to the counts: tokens, and experts that run for them. Not in a parallel loop."""
        if self.counts is not None:
            for i, amount in enumerate((tokens, experts)):
                store(self.counts, self.counts[i] + T.cast(amount, "int64"), i)

    def runs(self, token: Expr, slot: Expr) -> Expr:
        """Whether a slot has an expert: it is skipped where its id is outside of 0 to E - 1."""
        expert = T.cast(self.ids[token, slot], "int64")  # int32 would take 2^32 for 0
        return T.And(expert >= T.int64(0), expert < T.int64(self.layout.experts))
