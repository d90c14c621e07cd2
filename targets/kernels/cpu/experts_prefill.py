"""The experts of many tokens: each block of tokens is sorted by expert, so that weights are unpacked once for all of an expert's tokens.

Loops over tiles of rows are outside those over experts: every thread owns rows of all experts, and skewed routing leaves the
threads balanced. An assignment is a pair (token, slot), numbered token * k + slot; its position is its place in the sorted order,
where skipped slots have none.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cpu.emit import Buffer, Expr, Register, splat, store, store_rows, vector, when, workspace
from moec.targets.kernels.cpu.experts_layout import ExpertsOperands
from moec.targets.kernels.cpu.experts_projection import Projection
from moec.targets.kernels.cpu.isa import Isa
from moec.targets.kernels.cpu.layout import LANES, ceil_div
from moec.targets.kernels.cpu.register_tile import token_tiles

BLOCK_TOKENS = 512  # bounds the temporary memory; by then the work is bound by arithmetic, not by reading weights


def emit_prefill(op: ExpertsOperands, activation: ExpertActivation, isa: Isa) -> None:
    """Emit the body for T > 1 or a symbolic T."""
    layout, k = op.layout, op.top_k
    block = T.min(op.tokens, BLOCK_TOKENS)
    sorting = _Sorting(layout.experts, block * k)
    hidden = workspace((block * k, layout.f_tiles * LANES), "float32")
    output = workspace((block * k, layout.down.tiles * LANES), "float32")
    gate_up = Projection(op, "gate_up", isa, block, block * k)
    down = Projection(op, "down", isa, block * k, block * k)
    with T.serial(ceil_div(op.tokens, BLOCK_TOKENS)) as i:
        first = T.Bind(i * BLOCK_TOKENS)
        tokens = T.Bind(T.min(op.tokens - first, BLOCK_TOKENS))
        sorting.fill(op, first, tokens)
        op.count(tokens, sorting.count())
        gate_up.fill(op.x, first=first, rows=tokens)
        _inner(isa, sorting, gate_up, lambda position: sorting.order[position] // k)
        _hidden(op, activation, isa, sorting, gate_up, hidden)
        down.fill(hidden, rows=sorting.count())
        _inner(isa, sorting, down, lambda position: position)
        _down(op, isa, sorting, down, output)
        _combine(op, isa, first, tokens, output)


class _Sorting:
    """Assignments sorted by expert: those of expert e are order[start[e]] to order[start[e + 1] - 1]."""

    def __init__(self, experts: int, assignments: Expr) -> None:
        self.experts = experts
        self.start = workspace((experts + 1,), "int32")
        self.next = workspace((experts,), "int32")
        self.order = workspace((assignments,), "int32")

    def fill(self, op: ExpertsOperands, first: Expr, tokens: Expr) -> None:
        """A counting sort of ids[first : first + tokens]; skipped slots are left out."""
        k = op.top_k
        with T.serial(self.experts + 1) as e:
            store(self.start, T.int32(0), e)
        with T.serial(tokens) as t, T.serial(k) as slot, when(op.runs(first + t, slot)):
            e = T.Bind(T.cast(op.ids[first + t, slot], "int32"))
            store(self.start, self.start[e + 1] + 1, e + 1)
        with T.serial(self.experts) as e:
            store(self.next, self.start[e], e)
            store(self.start, self.start[e + 1] + self.start[e], e + 1)
        with T.serial(tokens) as t, T.serial(k) as slot, when(op.runs(first + t, slot)):
            e = T.Bind(T.cast(op.ids[first + t, slot], "int32"))
            position = T.Bind(self.next[e])
            store(self.order, T.cast(t * k + slot, "int32"), position)
            store(self.next, position + 1, e)

    def count(self) -> Expr:
        """Assignments of the block."""
        return T.Bind(self.start[self.experts])

    def over_experts(self, pieces: int, body: Callable[[Expr, Expr, Expr, Expr], None]) -> None:
        """Run body(piece, expert, first position, assignments) in parallel, `piece` outermost, for experts that have any."""
        with T.parallel(pieces * self.experts) as task:
            piece, expert = T.Bind(task // self.experts), T.Bind(task % self.experts)
            start = T.Bind(self.start[expert])
            count = T.Bind(self.start[expert + 1] - start)
            with when(count > 0):
                body(piece, T.Bind(T.cast(expert, "int64")), start, count)


def _inner(isa: Isa, sorting: _Sorting, projection: Projection, row: Callable[[Expr], Expr]) -> None:
    """The products of the right factor, where there is one; `row(position)` is that of the input."""
    if not projection.inner_tiles:
        return

    def piece(tile: Expr, expert: Expr, start: Expr, count: Expr) -> None:
        def tokens(first: Expr, size: int) -> None:
            positions = [T.Bind(start + first + i) for i in range(size)]
            projection.emit_inner(expert, tile, [T.Bind(row(position)) for position in positions], positions)

        token_tiles(count, isa.tokens, tokens)

    sorting.over_experts(projection.inner_tiles, piece)
    projection.fill_inner(sorting.count())


def _hidden(op: ExpertsOperands, activation: ExpertActivation, isa: Isa, sorting: _Sorting, gate_up: Projection, hidden: Buffer) -> None:
    """hidden[position] = f(gate_up @ x[token])."""
    layout, lanes = op.layout, isa.lanes

    def piece(tile: Expr, expert: Expr, start: Expr, count: Expr) -> None:
        indices = [T.Bind(tile * layout.parts + part) for part in range(layout.parts)]

        def tokens(first: Expr, size: int) -> None:
            position = T.Bind(start + first)
            rows = [T.Bind(sorting.order[position + i] // op.top_k) for i in range(size)]
            values: dict[tuple[int, int, int], Expr] = {}

            def keep(which: int, lane: int, token: int, value: Expr) -> None:
                if op.gate_up_bias is not None:
                    value = value + vector(op.gate_up_bias, expert, indices[which] * LANES + lane, lanes=lanes)
                values[which, lane, token] = T.Bind(value)

            gate_up.emit([(expert, index) for index in indices], rows, [position + i for i in range(size)], keep)
            for token in range(size):
                for lane in range(0, LANES, lanes):
                    parts = [values[part, lane, token] for part in range(layout.parts)]
                    result = activation.gated(parts[0], parts[1], lanes) if layout.gated else activation.plain(parts[0], lanes)
                    store(hidden, result, position + token, tile * LANES + lane, lanes=lanes)

        token_tiles(count, isa.tokens, tokens)

    sorting.over_experts(layout.f_tiles, piece)


def _down(op: ExpertsOperands, isa: Isa, sorting: _Sorting, down: Projection, output: Buffer) -> None:
    """output[assignment] = down @ hidden[position]."""
    layout, lanes = op.layout, isa.lanes
    tiles = layout.down.tiles

    def piece(index: Expr, expert: Expr, start: Expr, count: Expr) -> None:
        indices = [T.Bind(T.min(index * isa.row_tiles + r, tiles - 1)) for r in range(isa.row_tiles)]

        def tokens(first: Expr, size: int) -> None:
            position = T.Bind(start + first)
            assignments = [T.Bind(sorting.order[position + i]) for i in range(size)]

            def write(which: int, lane: int, token: int, value: Expr) -> None:
                row = indices[which] * LANES + lane
                if op.down_bias is not None:
                    value = value + vector(op.down_bias, expert, row, lanes=lanes)
                store(output, value, assignments[token], row, lanes=lanes)

            positions = [position + i for i in range(size)]
            down.emit([(expert, i) for i in indices], positions, positions, write)

        token_tiles(count, isa.tokens, tokens)

    sorting.over_experts(ceil_div(tiles, isa.row_tiles), piece)


def _combine(op: ExpertsOperands, isa: Isa, first: Expr, tokens: Expr, output: Buffer) -> None:
    """out[token] = the sum of its assignments' outputs, weighted."""
    layout, lanes, k = op.layout, isa.lanes, op.top_k
    with T.parallel(tokens) as t, T.serial(layout.down.tiles * (LANES // lanes)) as i:
        row, total = T.Bind(i * lanes), Register("float32", lanes)
        total.clear()
        for slot in range(k):
            with when(op.runs(first + t, slot)):
                weight = splat(op.weights[first + t, slot], "float32", lanes)
                total.set(total.get() + weight * vector(output, t * k + slot, row, lanes=lanes))
        store_rows(op.out, total.get(), first + t, row, rows=layout.d, lanes=lanes)
