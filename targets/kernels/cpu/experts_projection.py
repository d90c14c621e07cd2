"""One of the two projections of experts: a matrix, low-rank factors, or the sum of both.

    y = W x + left (right x)

`right x` is computed for every position first (a place in the order in which a kernel works through experts and tokens), since all rows
of y need the whole of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.activations import Activations
from moec.targets.kernels.cpu.emit import Buffer, Expr, store, workspace
from moec.targets.kernels.cpu.experts_layout import ExpertsOperands
from moec.targets.kernels.cpu.isa import Isa
from moec.targets.kernels.cpu.layout import LANES
from moec.targets.kernels.cpu.register_tile import Epilogue, RegisterTile


class Projection:
    """The kernels of `gate_up` or `down`.

    Args:
        name: which of the two.
        rows: of the input.
        positions: the most that there are.
    """

    def __init__(self, op: ExpertsOperands, name: str, isa: Isa, rows: Expr, positions: Expr) -> None:
        matrices = op.layout.matrices()
        self._whole: RegisterTile | None = None
        self._left: RegisterTile | None = None
        self._right: RegisterTile | None = None
        if matrices[name].format != "zero":
            self._whole = RegisterTile(matrices[name], isa, op.matrices[name], Activations(matrices[name], isa, rows))
        if f"{name}_left" in matrices:
            left, right = matrices[f"{name}_left"], matrices[f"{name}_right"]
            self._inner = workspace((positions, right.tiles * LANES), "float32")
            self._left = RegisterTile(left, isa, op.matrices[f"{name}_left"], Activations(left, isa, positions))
            self._right = RegisterTile(right, isa, op.matrices[f"{name}_right"], Activations(right, isa, rows))

    @property
    def inner_tiles(self) -> int:
        """Tiles of the right factor; 0 where there is none."""
        return self._right.layout.tiles if self._right else 0

    @property
    def inner_bytes(self) -> int:
        """Bytes of an expert's right factor."""
        return self._right.layout.nbytes() if self._right else 0

    def fill(self, x: Buffer, *, first: Expr = 0, rows: Expr | None = None, parallel: bool = True) -> None:
        """Take rows of x float32 [.., at least K], from row `first` on, as the input."""
        for kernel in (self._whole, self._right):
            if kernel is not None:
                kernel.activations.fill(x, first=first, rows=rows, parallel=parallel)

    def emit_inner(self, expert: Expr, tile: Expr, rows: Sequence[Expr], positions: Sequence[Expr]) -> None:
        """Multiply a tile of an expert's right factor with rows of the input, for the given positions."""
        assert self._right is not None
        lanes = self._right.isa.lanes

        def keep(_: int, lane: int, token: int, value: Expr) -> None:
            store(self._inner, value, positions[token], tile * LANES + lane, lanes=lanes)

        self._right.emit([(expert, tile)], rows, keep)

    def fill_inner(self, positions: Expr, *, parallel: bool = True) -> None:
        """Take what `emit_inner` has made of all positions as the input of the left factor."""
        assert self._left is not None
        self._left.activations.fill(self._inner, rows=positions, parallel=parallel)

    def emit(self, tiles: Sequence[tuple[Expr, ...]], rows: Sequence[Expr], positions: Sequence[Expr], epilogue: Epilogue) -> None:
        """Multiply tiles with rows of the input, whose positions are given; see `RegisterTile.emit`."""
        if self._left is None:
            assert self._whole is not None
            self._whole.emit(tiles, rows, epilogue)
            return
        values: dict[tuple[int, int, int], Expr] = {}

        def keep(which: int, lane: int, token: int, value: Expr) -> None:
            values[which, lane, token] = T.Bind(value)

        def add(which: int, lane: int, token: int, value: Expr) -> None:
            epilogue(which, lane, token, value + values[which, lane, token] if values else value)

        if self._whole is not None:
            self._whole.emit(tiles, rows, keep)
        self._left.emit(tiles, positions, add)
