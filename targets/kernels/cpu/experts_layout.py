"""How the experts of a layer lie in memory, and the operands of their kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.emit import Buffer, Expr, argument
from moec.targets.kernels.cpu.layout import LANES, LaneLayout, ceil_div
from moec.targets.kernels.cpu.register_tile import weight_arguments

Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class ExpertsLayout:
    """E experts of gate_up [2F, D] (gated, gate rows first) or up [F, D], and down [D, F].

    The rows of gate_up are stored in tiles of 16 gate rows followed by the 16 up rows that go with them, so that an expert is one
    stream; `interleave` brings them in that order.
    """

    experts: int
    d: int
    f: int
    gate_up_format: str
    down_format: str
    gated: bool = True

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
        """Shape and dtype of every array: those of gate_up and down, names prefixed, with a leading axis E."""
        found = {f"gate_up_{name}": spec for name, spec in self.gate_up.arrays(self.experts).items()}
        return {**found, **{f"down_{name}": spec for name, spec in self.down.arrays(self.experts).items()}}

    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.gate_up.nbytes(self.experts) + self.down.nbytes(self.experts)


class ExpertsOperands:
    """The parameters of an experts function: (x, ids, weights, arrays..., [gate_up_bias, down_bias], out)."""

    def __init__(self, layout: ExpertsLayout, tokens: int | None, top_k: int, ids_dtype: str, biases: bool) -> None:
        self.layout, self.top_k = layout, top_k
        self.tokens: Expr = tokens if tokens is not None else T.int64()
        self.x = argument("x", (self.tokens, layout.d), "float32")
        self.ids = argument("ids", (self.tokens, top_k), ids_dtype)
        self.weights = argument("weights", (self.tokens, top_k), "float32")
        self.gate_up = weight_arguments(layout.gate_up, layout.experts, prefix="gate_up_")
        self.down = weight_arguments(layout.down, layout.experts, prefix="down_")
        self.gate_up_bias: Buffer | None = None
        self.down_bias: Buffer | None = None
        if biases:
            self.gate_up_bias = argument("gate_up_bias", (layout.experts, layout.gate_up.n), "float32")
            self.down_bias = argument("down_bias", (layout.experts, layout.down.tiles * LANES), "float32")
        self.out = argument("out", (self.tokens, layout.d), "float32")

    def runs(self, token: Expr, slot: Expr) -> Expr:
        """Whether a slot has an expert: it is skipped where its id is outside of 0 to E - 1."""
        expert = T.cast(self.ids[token, slot], "int64")  # int32 would take 2^32 for 0
        return T.And(expert >= T.int64(0), expert < T.int64(self.layout.experts))
