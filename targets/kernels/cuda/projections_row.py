"""The rows that `projections` multiplies, one a token: each warp reads, adds, normalises and stages its own columns, for itself alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda import fixed_point
from moec.targets.kernels.cuda.emit import WARP, Buffer, Expr, Shared, at, local, store, sync, when
from moec.targets.kernels.cuda.intrinsics import store_word, term
from moec.targets.kernels.cuda.layout import BLOCK, COLUMN_WORDS, FragmentLayout, ceil_div
from moec.targets.kernels.cuda.loads import load_pair
from moec.targets.kernels.cuda.stream import in_order
from moec.targets.kernels.cuda.warp import sync_warp, warp_sum, warp_sums

if TYPE_CHECKING:
    from moec.targets.kernels.cuda.projections import ProjectionsSpec

BF16_TERMS = 2
MOST_READ = 64  # numbers of tokens that a lane asks for at once


def staged_words(layout: FragmentLayout) -> int:
    """Words of a staged block of columns."""
    return BF16_TERMS * COLUMN_WORDS if layout.integer is None else fixed_point.WORDS


class Row:
    """A warp's columns in registers, two pairs of neighbours of each block of 128 in each lane, and staged in shared memory.

    Of several tokens as many are read together as registers allow.

    Args:
        x, residual, weight, bias, total, normal: the kernel's parameters.
        places: where each token's row is in these; of one that is not `there` nothing is written.
        terms: uint16 [terms, T, K], the normalised rows in bfloat16, where they are a result too.

    Attributes:
        factor: what a thread's products of the staged rows are to be multiplied with, after `finish`; None for 1.
    """

    def __init__(
        self, spec: ProjectionsSpec, x: Any, residual: Any, weight: Any, bias: Any, total: Any, normal: Any,
        places: Sequence[Expr] = (), there: Sequence[Expr] = (), terms: Any = None,
    ) -> None:  # fmt: skip
        self.spec, self.norm = spec, spec.norm
        self._places, self._there, self._terms = places or range(spec.tokens), there, terms
        self._x, self._residual, self._weight, self._bias, self._total, self._normal = x, residual, weight, bias, total, normal
        self._share = ceil_div(spec.blocks, spec.splits)
        self.token_words = max(staged_words(matrix.layout) for matrix in spec.matrices)
        self._together = spec.tokens
        while self._together > 1 and self._together * 4 * self._share * (1 if residual is None else 2) > MOST_READ:
            self._together //= 2

    @staticmethod
    def words(spec: ProjectionsSpec) -> int:
        """Words of a block's memory."""
        share = ceil_div(spec.blocks, spec.splits)
        staged = spec.warps * share * max(staged_words(matrix.layout) for matrix in spec.matrices)
        return spec.tokens * (staged + 2 * WARP)

    def take(self, memory: Shared) -> None:
        """Take memory of the block."""
        self._staged = memory.take((self.spec.warps * self._share * self.spec.tokens * self.token_words,), "uint32")
        self._parts = [memory.take((WARP * self.spec.tokens,), "float32") for _ in range(2)]

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

    def _save(self, buffer: Buffer, part: Expr, token: int, value: Callable[[int], Expr], last: bool = False) -> None:
        """Write a row, by the first warps of one block: tokens are dealt to the blocks. The `last` one is normalised, and has terms too."""
        with when(self._writes(part, token)):
            self._put(buffer, token, value, last)

    def _put(self, buffer: Buffer, token: int, value: Callable[[int], Expr], last: bool) -> None:
        def write(i: int, column: Expr) -> None:
            for j in range(2):
                store(buffer, value(2 * i + j), self._places[token], column + j)
            for index in range(int(self._terms.shape[0])) if last and self._terms is not None else ():
                pair = term(value(2 * i), value(2 * i + 1), index)
                store_word(at(self._terms, index, self._places[token], column), pair)

        self._each(write)

    def _writes(self, part: Expr, token: int) -> Expr:
        writes = T.And(part == token % self.spec.grid, self._warp < self.spec.splits)
        return T.And(writes, self._there[token]) if self._there else writes

    def stage(self, part: Expr) -> None:
        """Read, normalise and stage the rows; with a mean or a bias threads wait for all others."""
        for first in range(0, self.spec.tokens, self._together):
            tokens = range(first, first + self._together)
            self._values = {token: self._load(self._x, self._places[token]) for token in tokens}
            if self._residual is not None:
                added = {token: self._load(self._residual, self._places[token]) for token in tokens}
                for token, values in self._values.items():
                    for i in range(4 * self._share):
                        store(values, values[i] + added[token][i], i)
                    self._save(self._total, part, token, values.__getitem__)
            if self.norm is not None:
                self._normalise(self.norm.center, self.norm.size)
            for token, values in self._values.items():
                self._stage(token, values)
                if self._normal is not None and self.spec.tokens > 1:  # what is left to do is done at the end
                    self._save(self._normal, part, token, values.__getitem__, self._biases is not None)
        sync_warp()

    def _normalise(self, center: bool, size: int) -> None:
        """Leave out only the division by the length, which comes later, unless there is a bias."""
        norm = self.norm
        assert norm is not None
        if center:
            self._add_up(lambda value: value, 0)
            sync()
            for token, values in self._values.items():
                mean = T.Bind(self._whole(0, token) * T.float32(1 / size))

                def subtract(i: int, _: Expr, values: Buffer = values, mean: Expr = mean) -> None:
                    for j in (2 * i, 2 * i + 1):
                        store(values, values[j] - mean, j)

                self._each(subtract)
        self._add_up(lambda value: value * value, 1)
        if self._weights is not None:
            for values in self._values.values():
                for i in range(4 * self._share):
                    weight = self._weights[i] + T.float32(norm.offset) if norm.offset else self._weights[i]
                    store(values, values[i] * weight, i)
        if self._biases is not None:
            sync()
            for token, values in self._values.items():
                inverse = self._inverse(token)
                for i in range(4 * self._share):
                    store(values, values[i] * inverse + self._biases[i], i)

    def _add_up(self, value: Callable[[Expr], Expr], which: int) -> None:
        """Leave the sums over a warp's numbers in shared memory."""
        count, first, tokens = len(self._values), min(self._values), self.spec.tokens
        own = [sum((value(x[i]) for i in range(1, 4 * self._share)), value(x[0])) for x in self._values.values()]
        if count == 1:
            found, at_once = warp_sum(own[0]), WARP
        else:
            several, at_once = local(count, "float32"), WARP // count
            for i, one in enumerate(own):
                store(several, one, i)
            found = warp_sums(at(several, 0), count, self._lane)
        with when(self._lane % at_once == 0 if count > 1 else self._lane == 0):
            token = first + self._lane // at_once if count > 1 else first
            store(self._parts[which], found, self._warp * tokens + token)

    def _whole(self, which: int, token: Expr) -> Expr:
        """The sum over all columns."""
        parts, tokens = self._parts[which], self.spec.tokens
        return sum((parts[warp * tokens + token] for warp in range(1, self.spec.splits)), parts[token])

    def _inverse(self, token: Expr) -> Expr:
        """1 / the length of a row."""
        assert self.norm is not None
        return T.Bind(T.rsqrt(self._whole(1, token) * T.float32(1 / self.norm.size) + T.float32(self.norm.eps)))

    def place(self, block: Expr) -> Expr:
        """Where the warp's block number `block` is staged, a token after the other, each of `token_words`."""
        return (self._warp * self._share + block) * (self.spec.tokens * self.token_words)

    @property
    def staged(self) -> Buffer:
        """The staged blocks."""
        return self._staged

    def _stage(self, token: int, values: Buffer) -> None:
        for block in range(self._share):
            place = T.Bind(self.place(block) + token * self.token_words)
            if self._layout.integer is not None:
                fixed_point.stage(at(self._staged, place), at(values, 4 * block), self._lane)
                continue
            for i in range(2):
                pair = i * WARP + self._lane
                to = T.Bind(in_order(pair, T.Bind(pair % 16)))
                for index in range(BF16_TERMS):
                    both = term(values[4 * block + 2 * i], values[4 * block + 2 * i + 1], index)
                    store(self._staged, both, place + index * COLUMN_WORDS + to)

    def finish(self, thread: Expr) -> None:
        """After a barrier: `factor` of the token whose results a thread has, number `thread` modulo T."""
        self.factor = self.factor_of(0 if self.spec.tokens == 1 else T.Bind(thread % self.spec.tokens))

    def factor_of(self, token: Expr) -> Expr | None:
        """After a barrier: what products of a token's row are to be multiplied with."""
        return self._inverse(token) if self.norm is not None and self._biases is None else None

    def write(self, part: Expr) -> None:
        """Write the normalised rows, where they are a result."""
        if self._normal is None:
            return
        if self.spec.tokens == 1:
            values, factor = self._values[0], self.factor
            self._save(self._normal, part, 0, lambda i: values[i] if factor is None else values[i] * factor, True)
        elif self._biases is None:
            for token in range(self.spec.tokens):
                with when(self._writes(part, token)):
                    self._divide(token)

    def _divide(self, token: int) -> None:
        """Divide what this thread has written of a row by the row's length."""
        inverse, values = self._inverse(token), self._load(self._normal, self._places[token])
        self._put(self._normal, token, lambda i: values[i] * inverse, True)
