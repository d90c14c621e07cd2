"""Keys and values of a warp's positions on the way into shared memory, some of them before the kernel before this one has ended.

Of the cache a token reads what earlier calls have written: keys and values of its own call are appended by this kernel, and come from
its arguments. So what is there can be read at once, as can the page table.
"""

from __future__ import annotations

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.attention_parts import PAGE, from_cache
from moec.targets.kernels.cuda.copies import copy16, copy_commit, shared_address
from moec.targets.kernels.cuda.emit import WARP, Buffer, Expr, at, local, store, when
from moec.targets.kernels.cuda.layout import ceil_div
from moec.targets.kernels.cuda.step_rows import Rows
from moec.targets.kernels.cuda.step_spec import row_words, whole


class Fetch(Rows):
    """The state of a warp: its chunks of positions, and its stages in shared memory."""

    v_pool: Buffer
    start: Expr
    memory: Buffer

    def _stages(self) -> None:
        """How a stage lies: the keys of its positions, then their values."""
        a, c = self.spec.attention, self.options.positions
        self.k_words, self.v_words = row_words(a.d, self.dtype), row_words(a.dv, self.dtype)
        self.region = self.options.region(self.spec, self.dtype)
        self.stage = ceil_div(c * (self.k_words + self.v_words), 4) * 4

    def _fetch(self, chunk: Expr, stage: Expr) -> None:
        """Begin to copy the keys and values of the positions of a chunk, whose page is known; those that do not count are zeros."""
        a, c = self.spec.attention, self.options.positions
        page, base = T.Bind(self.page[0]), T.Bind(self.warp * self.region + stage * self.stage)
        for pool, size, words, begin in ((self.k_pool, a.d, self.k_words, 0), (self.v_pool, a.dv, self.v_words, c * self.k_words)):
            raw = whole(size, self.dtype)
            pieces = words // 4 if raw else size
            for n in range(ceil_div(c * pieces, WARP)):
                index = T.Bind(n * WARP + self.lane)
                row, piece = T.Bind(index // pieces), T.Bind(index % pieces)
                position = T.Bind(chunk * c + row)
                counts = T.Bind(T.And(position >= self.start, position < self.cached))
                element = piece * (size // pieces)
                target = base + begin + row * words + piece * (4 if raw else 1)
                with when(index < c * pieces):
                    if raw:
                        source = at(pool, page, self.kv_head, position % PAGE, element)
                        copy16(shared_address(at(self.memory, target)), source, T.Select(counts, T.int32(16), T.int32(0)), ahead=False)
                    else:
                        value = from_cache(pool[page, self.kv_head, position % PAGE, element], self.dtype)
                        store(self.memory, T.if_then_else(counts, value, T.float32(0)), target)

    def _chunks(self, begin: Expr, end: Expr) -> None:
        """Note which chunks of positions the warp has, and begin to copy the first of them."""
        self.first = T.Bind(begin + self.warp)
        warps = self.options.warps
        self.count = T.Bind((T.max(end - self.first, 0) + warps - 1) // warps)
        self.page = local(1, "int32")
        store(self.page, 0, 0)
        for i in range(self.options.stages):
            with when(i < self.count):
                self._look(i)
                self._fetch(self.first + i * warps, i)
            copy_commit()
        self._look(self.options.stages)

    def _look(self, i: Expr) -> None:
        """Read the page of a chunk."""
        with when(i < self.count):
            chunk = self.first + i * self.options.warps
            store(self.page, self.page_table[self.slot, chunk * self.options.positions // PAGE], 0)
