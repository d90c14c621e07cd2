"""`routing_step` for several tokens: a block of threads has 16 of the experts and a token, or up to four tokens.

The blocks of a token write their logits and meet at the token's own semaphore, and the warp that comes last chooses, as for one token. So
nothing waits for other tokens, and where each has blocks of its own its results are those that it has alone, bit for bit. Weights are read
once for the tokens of a block, out of the L2 cache but for the first time: their two terms of bfloat16 are the columns of one product.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.arrival import SEMAPHORES, last_warp
from moec.targets.kernels.cuda.emit import WARP, Buffer, Expr, Shared, argument, const, kernel, local, store, sync, when
from moec.targets.kernels.cuda.intrinsics import grid_launch, grid_wait
from moec.targets.kernels.cuda.layout import COLUMN_WORDS, ROWS, FragmentLayout, ceil_div
from moec.targets.kernels.cuda.projections_matrix import Matrices
from moec.targets.kernels.cuda.projections_product import Bfloat16, Products
from moec.targets.kernels.cuda.projections_row import BF16_TERMS, Row, StagedRow
from moec.targets.kernels.cuda.router import Router
from moec.targets.kernels.cuda.routing_step import RoutingSpec, choose
from moec.targets.kernels.cuda.warp import sync_warp


class _Rows:
    """The rows of a block's tokens, staged one after the other: a warp has the same columns of each."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, self.stride = rows, rows[0].size

    def take(self, memory: Shared) -> None:
        """Take memory of the block."""
        self.staged = memory.take((len(self.rows) * self.stride,), "uint32")
        for i, row in enumerate(self.rows):
            row.take_part(memory, self.staged, i * self.stride)

    def begin(self, layout: FragmentLayout, thread: Expr, start: Expr, stop: Expr) -> None:
        """Ask for what no kernel writes."""
        self.rows[0].begin(layout, thread, start, stop)
        for row in self.rows[1:]:
            row.follow(self.rows[0])

    def place(self, block: Expr) -> Expr:
        """Where the block number `block` of the warp's first row is staged."""
        return self.rows[0].place(block)

    def stage(self, part: Expr, blocks: int) -> None:
        """Read, normalise and stage all rows; of so many blocks each saves the sums of some tokens."""
        for row in self.rows:  # all loads in front of all stores, which would hold them up
            row.read()
        for i, row in enumerate(self.rows):
            row.add(part - i % blocks)
        for row in self.rows:
            row.normalise()
        for row in self.rows:
            row.stage()
        sync_warp()

    def factor(self, own: Expr) -> Expr | None:
        """After a barrier: what products of the staged row number `own` are to be multiplied with."""
        if len(self.rows) == 1:
            self.rows[0].finish()
            return self.rows[0].factor
        found, divided = local(1, "float32"), False
        for i, row in enumerate(self.rows):
            with when(own == i):
                row.finish()
                if row.factor is not None:
                    divided = True
                    store(found, row.factor, 0)
        return found[0] if divided else None

    def write(self, part: Expr, blocks: int) -> None:
        """Write the normalised rows, each by one of the blocks."""
        for i, row in enumerate(self.rows):
            with when(part == i % blocks):
                row.finish()
                row.write(const(0, "int32"))


class _Columns(Bfloat16):
    """Products with several rows, whose terms are columns of B: lane t of four has the sums of row t."""

    def __init__(self, layout: FragmentLayout, rows: _Rows, lane: Expr) -> None:
        super().__init__(layout, rows, lane)
        column = T.Bind(T.min(lane // 4, len(rows.rows) * BF16_TERMS - 1))
        self._from = T.Bind(column // BF16_TERMS * rows.stride + column % BF16_TERMS * COLUMN_WORDS + lane % 4 * 4)


class _Matrix(Matrices):
    """The router's weights, and their products with several rows: float32 [splits, tokens * outputs]."""

    def __init__(self, spec: RoutingSpec, arrays: dict[str, Buffer], bias: Buffer | None, logits: Buffer) -> None:
        super().__init__(spec.product, [0], [arrays], [bias], [logits])
        self._tokens, self._logits, self._bias = spec.together, logits, bias

    def _products_with(self, row: StagedRow) -> Products:
        if self._tokens == 1:
            return super()._products_with(row)
        assert isinstance(row, _Rows)
        return _Columns(self._layout, row, self._lane)

    def _keeps(self) -> tuple[Expr, Expr]:
        return (self._lane % 4 < self._tokens, self._lane % 4 * self.spec.outputs) if self._tokens > 1 else super()._keeps()

    def _first_biases(self) -> Buffer | None:
        """The bias of the expert whose logits a lane adds up."""
        if self._bias is None:
            return None
        found = local(1, "float32")
        store(found, T.float32(0), 0)
        with when(self._adds):
            store(found, self._bias[self._expert], 0)
        return found

    @property
    def _expert(self) -> Expr:
        return self._first_tile * ROWS + self._lane

    @property
    def _adds(self) -> Expr:
        return T.And(self._lane < self.spec.outputs, self._expert < self._limit)

    def finish_token(self, partial: Buffer, own: Expr, token: Expr, factor: Expr | None) -> None:
        """Add up, by a warp, what all warps have of the block's token number `own`, and write it."""
        with when(self._adds):
            here = own * self.spec.outputs + self._lane
            total = sum((partial[split, here] for split in range(1, self.spec.splits)), partial[0, here])
            total = total if factor is None else total * factor
            store(self._logits, total if self._offsets is None else total + self._offsets[0], token, self._expert)


class _RoutingTokens:
    def __init__(self, spec: RoutingSpec) -> None:
        self.spec, self.router = spec, Router(spec.router)
        product = spec.product
        self.words = spec.together * Row.words(product) + ceil_div(product.splits * product.outputs * spec.together, 4) * 4

    def arguments(self) -> Expr:
        """Declare the parameters -> T."""
        spec, product, norm = self.spec, self.spec.product, self.spec.product.norm
        count = spec.tokens if spec.tokens is not None else T.int64()
        wide, slots, (gate,) = (count, product.k), (count, spec.router.top_k), product.matrices
        self.choice_bias = argument("router_bias", (spec.router.experts,), "float32") if spec.router.bias else None
        self.semaphores = argument("semaphores", (SEMAPHORES,), "int32")
        x = argument("x", wide, "float32")
        residual = argument("residual", wide, "float32") if norm and norm.residual else None
        weight = argument("weight", (product.k,), "float32") if norm and norm.weight else None
        bias = argument("bias", (product.k,), "float32") if norm and norm.bias else None
        arrays = {name: argument(f"{name}0", shape, dtype) for name, (shape, dtype) in gate.layout.arrays().items()}
        gate_bias = argument("bias0", (spec.router.experts,), "float32") if gate.bias else None
        total = argument("total", wide, "float32") if norm and norm.residual else None
        normal = argument("normal", wide, "float32") if product.written else None
        self.logits = argument("logits", (count, spec.router.experts), "float32")
        self.outs = argument("weights", slots, "float32"), argument("ids", slots, "int64")
        self.row_arguments, self.matrix = (x, residual, weight, bias, total, normal), _Matrix(spec, arrays, gate_bias, self.logits)
        return count

    def grid(self, count: Expr) -> list[Expr]:
        """Blocks of threads by experts and by tokens."""
        n = self.spec.together
        return [self.spec.blocks, ceil_div(count, n) if isinstance(count, int) else T.cast((count + n - 1) // n, "int32")]

    def body(self, count: Expr, memory: Shared, part: Expr, turn: Expr, thread: Expr) -> None:
        """Compute all results."""
        spec, product, matrix, n = self.spec, self.spec.product, self.matrix, self.spec.together
        first, end = T.Bind(turn * n), count if isinstance(count, int) else T.Bind(T.cast(count, "int32"))
        # Past the end it is the last token again, whose rows are written twice, with the same numbers.
        tokens = [first] if n == 1 else [T.Bind(T.min(first + i, end - 1)) for i in range(n)]
        rows = _Rows([Row(product, *self.row_arguments, token) for token in tokens])
        rows.take(memory)
        partial = memory.take((product.splits, n * product.outputs), "float32")
        matrix.begin(part, thread, rows)
        grid_wait()
        grid_launch()
        rows.stage(part, spec.blocks)
        matrix.multiply(rows, partial)
        sync()
        with when(thread < n * WARP):
            own, lane = T.Bind(thread // WARP), T.Bind(thread % WARP)
            token = T.Bind(first + own)
            with when(token < end):
                matrix.finish_token(partial, own, token, rows.factor(own))
                last = last_warp(self.semaphores, token, spec.blocks)
                with when(last != 0):
                    choose(spec, self.router, self.logits, self.choice_bias, self.outs, token, lane)
        if product.written:
            rows.write(part, spec.blocks)


def routing_tokens_func(spec: RoutingSpec) -> tirx.PrimFunc:
    """PrimFunc ([router bias [E]], semaphores, x f32 [T, D], ..., [sum], [row], logits [T, E], weights [T, K], ids int64 [T, K]).

    The parameters are those of `routing_step_func`.
    """
    step = _RoutingTokens(spec)
    return kernel("routing_tokens", spec.product.threads, step.arguments, step.grid, step.body, words=step.words)
