"""The experts of a single token: nothing but the weights of its experts is read, one contiguous stream at a time.

The slots that run are listed first, and all work is over that list: time falls with each slot that is skipped, on any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cpu.emit import Buffer, Expr, splat, store, store_rows, vector, when, workspace
from moec.targets.kernels.cpu.experts_layout import ExpertsOperands
from moec.targets.kernels.cpu.experts_projection import Projection
from moec.targets.kernels.cpu.isa import Isa
from moec.targets.kernels.cpu.layout import LANES, ceil_div
from moec.targets.kernels.cpu.loops import over_tiles

RUN = 4  # tiles of down that a thread takes of an expert at a time: longer streams, fewer pieces of work


def emit_decode(op: ExpertsOperands, activation: ExpertActivation, isa: Isa) -> None:
    """Emit the body for T = 1."""
    layout = op.layout
    slots = _Slots(op)
    op.count(1, slots.count)
    hidden = workspace((op.top_k, layout.f_tiles * LANES), "float32")
    gate_up = Projection(op, "gate_up", isa, 1, op.top_k)
    gate_up.fill(op.x, parallel=False)
    _inner(op, gate_up, slots, lambda _: 0)
    with over_tiles(1, op.top_k * layout.gate_up.nbytes(), slots.count * layout.f_tiles) as task:
        position, tile = T.Bind(task // layout.f_tiles), T.Bind(task % layout.f_tiles)
        _hidden_tile(op, activation, isa, gate_up, hidden, slots, position, tile)
    down = Projection(op, "down", isa, op.top_k, op.top_k)
    down.fill(hidden, rows=slots.count, parallel=False)
    _inner(op, down, slots, lambda position: position)
    _down(op, isa, down, slots)


class _Slots:
    """The `count` slots that run, in order: entry i of `slots` is the i-th of them."""

    def __init__(self, op: ExpertsOperands) -> None:
        self._op = op
        self._slots, found = workspace((op.top_k,), "int64"), workspace((1,), "int64")
        store(found, T.int64(0), 0)
        with T.serial(op.top_k) as slot, when(op.runs(0, slot)):
            store(self._slots, T.cast(slot, "int64"), found[0])
            store(found, found[0] + 1, 0)
        self.count: Expr = T.Bind(found[0])

    def expert(self, position: Expr) -> Expr:
        """The expert of the slot at a position."""
        return T.Bind(T.cast(self._op.ids[0, self._slots[position]], "int64"))

    def weight(self, position: Expr) -> Expr:
        """The routing weight of the slot at a position."""
        return T.Bind(self._op.weights[0, self._slots[position]])


def _inner(op: ExpertsOperands, projection: Projection, slots: _Slots, row: Callable[[Expr], Expr]) -> None:
    """The products of the right factor, where there is one; `row(position)` is that of the input."""
    if not (tiles := projection.inner_tiles):
        return
    with over_tiles(1, op.top_k * projection.inner_bytes, slots.count * tiles) as task:
        position, tile = T.Bind(task // tiles), T.Bind(task % tiles)
        projection.emit_inner(slots.expert(position), tile, [row(position)], [position])
    projection.fill_inner(slots.count, parallel=False)


def _hidden_tile(
    op: ExpertsOperands,
    activation: ExpertActivation,
    isa: Isa,
    gate_up: Projection,
    hidden: Buffer,
    slots: _Slots,
    position: Expr,
    tile: Expr,
) -> None:
    """16 hidden values of one expert: the gate tile, then the up tile, then the activation function."""
    layout, lanes = op.layout, isa.lanes
    expert = slots.expert(position)
    indices = [T.Bind(tile * layout.parts + part) for part in range(layout.parts)]
    values: dict[tuple[int, int], Expr] = {}

    def keep(which: int, lane: int, _: int, value: Expr) -> None:
        if op.gate_up_bias is not None:
            value = value + vector(op.gate_up_bias, expert, indices[which] * LANES + lane, lanes=lanes)
        values[which, lane] = T.Bind(value)

    gate_up.emit([(expert, index) for index in indices], [0], [position], keep)
    for lane in range(0, LANES, lanes):
        parts = [values[part, lane] for part in range(layout.parts)]
        result = activation.gated(parts[0], parts[1], lanes) if layout.gated else activation.plain(parts[0], lanes)
        store(hidden, result, position, tile * LANES + lane, lanes=lanes)


def _down(op: ExpertsOperands, isa: Isa, down: Projection, slots: _Slots) -> None:
    """out = the weighted sum over the experts of down @ hidden, a run of tiles at a time."""
    layout, lanes = op.layout, isa.lanes
    tiles = layout.down.tiles
    sums = workspace((tiles * LANES,), "float32")
    with over_tiles(1, op.top_k * layout.down.nbytes(), ceil_div(tiles, RUN)) as run:
        first, count = T.Bind(run * RUN), T.Bind(T.min(RUN, tiles - run * RUN))
        with T.serial(count * (LANES // lanes)) as i:
            store(sums, splat(0.0, "float32", lanes), first * LANES + i * lanes, lanes=lanes)
        with T.serial(slots.count) as position:
            expert, weight = slots.expert(position), slots.weight(position)
            with T.serial(count) as i:
                tile = T.Bind(first + i)

                def add(_: int, lane: int, __: int, value: Expr) -> None:
                    row = tile * LANES + lane
                    if op.down_bias is not None:
                        value = value + vector(op.down_bias, expert, row, lanes=lanes)
                    total = vector(sums, row, lanes=lanes) + value * splat(weight, "float32", lanes)
                    store(sums, total, row, lanes=lanes)

                down.emit([(expert, tile)], [position], [position], add)
        with T.serial(count * (LANES // lanes)) as i:
            row = T.Bind(first * LANES + i * lanes)
            store_rows(op.out, vector(sums, row, lanes=lanes), 0, row, rows=layout.d, lanes=lanes)
