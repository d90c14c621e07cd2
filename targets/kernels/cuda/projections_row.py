"""The row that `projections` multiplies: each warp reads, adds, normalises and stages the columns that it multiplies, for itself alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda import fixed_point
from moec.targets.kernels.cuda.emit import WARP, Buffer, Expr, Shared, at, local, store, sync, when
from moec.targets.kernels.cuda.intrinsics import term
from moec.targets.kernels.cuda.layout import BLOCK, COLUMN_WORDS, FragmentLayout, ceil_div
from moec.targets.kernels.cuda.loads import load_pair
from moec.targets.kernels.cuda.stream import in_order
from moec.targets.kernels.cuda.warp import warp_sum

if TYPE_CHECKING:
    from moec.targets.kernels.cuda.projections import ProjectionsSpec

BF16_TERMS = 2


def staged_words(layout: FragmentLayout) -> int:
    """Words of a staged block of columns."""
    return BF16_TERMS * COLUMN_WORDS if layout.integer is None else fixed_point.WORDS


class StagedRow(Protocol):
    """What products need of a row, or of rows of several tokens."""

    def begin(self, layout: FragmentLayout, thread: Expr, start: Expr, stop: Expr) -> None:
        """Ask for what no kernel writes."""
        ...

    def place(self, block: Expr) -> Expr:
        """Where the warp's block number `block` is staged."""
        ...

    @property
    def staged(self) -> Buffer:
        """The staged blocks."""
        ...


class Row:
    """A warp's columns in registers, two pairs of neighbours of each block of 128 in each lane, and staged in shared memory.

    Args:
        x, residual, weight, bias, total, normal: the kernel's parameters.
        token: which row of these.

    Attributes:
        factor: what products of the staged row are to be multiplied with, after `finish`; None for 1.
    """

    def __init__(
        self, spec: ProjectionsSpec, x: Any, residual: Any, weight: Any, bias: Any, total: Any, normal: Any, token: Expr = 0
    ) -> None:  # fmt: skip
        self.spec, self.norm, self._token = spec, spec.norm, token
        self._x, self._residual, self._weight, self._bias, self._total, self._normal = x, residual, weight, bias, total, normal
        self._share = ceil_div(spec.blocks, spec.splits)
        self._words = max(staged_words(matrix.layout) for matrix in spec.matrices)

    @staticmethod
    def words(spec: ProjectionsSpec) -> int:
        """Words of a block's memory."""
        share = ceil_div(spec.blocks, spec.splits)
        return spec.warps * share * max(staged_words(matrix.layout) for matrix in spec.matrices) + 2 * WARP

    def take(self, memory: Shared) -> None:
        """Take memory of the block."""
        self.take_part(memory, memory.take((self.size,), "uint32"), 0)

    @property
    def size(self) -> int:
        """Words of all that is staged."""
        return self.spec.warps * self._share * self._words

    def take_part(self, memory: Shared, staged: Buffer, first: int) -> None:
        """Take memory of the block, of which what is staged has a place already, from `first` on."""
        self._staged, self._first = staged, first
        self._parts = [memory.take((WARP,), "float32") for _ in range(2)]

    def begin(self, layout: FragmentLayout, thread: Expr, start: Expr, stop: Expr) -> None:
        """Ask for what no kernel writes.

        Args:
            layout: a layout of the matrices' format, on which the order of columns depends.
            start, stop: the warp's blocks of columns.
        """
        self._layout, self._start, self._stop = layout, start, stop
        self._warp, self._lane = T.Bind(thread // WARP), T.Bind(thread % WARP)
        if layout.integer is None:
            self._columns = [2 * self._lane, 2 * self._lane + BLOCK // 2]
        else:
            bits = layout.integer.bits
            first = T.Bind(8 * fixed_point.pair(self._lane // 4, bits) + self._lane % 4 * 2)
            self._columns = [first, first + 8 * fixed_point.distance(bits)]
        self._weights = None if self._weight is None else self._load(self._weight)
        self._biases = None if self._bias is None else self._load(self._bias)
        self.factor: Expr | None = None

    def follow(self, other: Row) -> None:
        """Have what another token's row has asked for in `begin`."""
        self._layout, self._start, self._stop, self._columns = other._layout, other._start, other._stop, other._columns
        self._warp, self._lane, self._weights, self._biases = other._warp, other._lane, other._weights, other._biases
        self.factor = None

    def _each(self, act: Callable[[int, Expr], None]) -> None:
        """Act on a lane's pairs: (number, first column)."""
        spec = self.spec
        for block in range(self._share):
            for i, inside in enumerate(self._columns):
                column = (self._start + block) * BLOCK + inside
                wanted = column < spec.k if spec.k % BLOCK else None
                if spec.blocks % spec.splits and block + 1 == self._share:
                    own = self._start + block < self._stop
                    wanted = own if wanted is None else T.And(own, wanted)
                if wanted is None:
                    act(2 * block + i, column)
                else:
                    with when(wanted):
                        act(2 * block + i, column)

    def _load(self, buffer: Buffer, *lead: Expr) -> Buffer:
        """A lane's pairs of an array; zeros where there are none."""
        found = local(4 * self._share, "float32")
        for i in range(4 * self._share):
            store(found, T.float32(0), i)
        self._each(lambda i, column: load_pair(at(found, 2 * i), at(buffer, *lead, column), "float32"))
        return found

    def _save(self, buffer: Buffer, part: Expr, value: Callable[[int], Expr]) -> None:
        """Write the row, by the first block's first warps."""

        def write(i: int, column: Expr) -> None:
            for j in range(2):
                store(buffer, value(2 * i + j), self._token, column + j)

        with when(T.And(part == 0, self._warp < self.spec.splits)):
            self._each(write)

    def read(self) -> None:
        """Ask for the row."""
        self._values = self._load(self._x, self._token)
        self._added = None if self._residual is None else self._load(self._residual, self._token)

    def add(self, part: Expr) -> None:
        """Add what is added, and write the sum."""
        values = self._values
        if self._added is not None:
            for i in range(4 * self._share):
                store(values, values[i] + self._added[i], i)
            self._save(self._total, part, lambda i: values[i])

    def normalise(self) -> None:
        """Leave out only the division by the length, which comes later, unless there is a bias: then threads wait, as with a mean."""
        values, norm = self._values, self.norm
        if norm is None:
            return
        if norm.center:
            self._add_up(values[0], lambda i: values[i], 0)
            sync()
            mean = T.Bind(self._whole(0) * T.float32(1 / norm.size))

            def subtract(i: int, _: Expr) -> None:
                for j in (2 * i, 2 * i + 1):
                    store(values, values[j] - mean, j)

            self._each(subtract)
        self._add_up(values[0] * values[0], lambda i: values[i] * values[i], 1)
        if self._weights is not None:
            for i in range(4 * self._share):
                weight = self._weights[i] + T.float32(norm.offset) if norm.offset else self._weights[i]
                store(values, values[i] * weight, i)
        if self._biases is not None:
            sync()
            inverse = self._inverse()
            for i in range(4 * self._share):
                store(values, values[i] * inverse + self._biases[i], i)

    def _add_up(self, first: Expr, value: Callable[[int], Expr], which: int) -> None:
        """Leave the sum over a warp's numbers in shared memory."""
        found = warp_sum(sum((value(i) for i in range(1, 4 * self._share)), first))
        with when(self._lane == 0):
            store(self._parts[which], found, self._warp)

    def _whole(self, which: int) -> Expr:
        """The sum over all columns."""
        parts = self._parts[which]
        return sum((parts[warp] for warp in range(1, self.spec.splits)), parts[0])

    def _inverse(self) -> Expr:
        """1 / the length of the row."""
        assert self.norm is not None
        return T.Bind(T.rsqrt(self._whole(1) * T.float32(1 / self.norm.size) + T.float32(self.norm.eps)))

    def place(self, block: Expr) -> Expr:
        """Where the warp's block number `block` is staged."""
        return self._first + (self._warp * self._share + block) * self._words

    @property
    def staged(self) -> Buffer:
        """The staged blocks."""
        return self._staged

    def stage(self) -> None:
        """Write the row into shared memory, which the warp sees after a `sync_warp`."""
        for block in range(self._share):
            place = T.Bind(self.place(block))
            if self._layout.integer is not None:
                fixed_point.stage(at(self._staged, place), at(self._values, 4 * block), self._lane)
                continue
            for i in range(2):
                pair = i * WARP + self._lane
                to = T.Bind(in_order(pair, T.Bind(pair % 16)))
                for index in range(BF16_TERMS):
                    both = term(self._values[4 * block + 2 * i], self._values[4 * block + 2 * i + 1], index)
                    store(self._staged, both, place + index * COLUMN_WORDS + to)

    def finish(self) -> None:
        """After a barrier: `factor`."""
        if self.norm is not None and self._biases is None:
            self.factor = self._inverse()

    def write(self, part: Expr) -> None:
        """Write the normalised row, where that is a result."""
        if self._normal is not None:
            self._save(self._normal, part, lambda i: self._values[i] if self.factor is None else self._values[i] * self.factor)
