"""Images (`image`) of which blocks of threads have stages of 64 columns: the same memory has twice as many of them on their way."""

from __future__ import annotations

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Expr, const, store, when
from moec.targets.kernels.cuda.image import Images, expect, wait
from moec.targets.kernels.cuda.matrix import descriptor

HALF = 4  # steps of 16 columns in half of a block


class HalfImages(Images):
    """The ring of stages of a block of threads: two of a block of columns."""

    def begin(self, blocks: int) -> None:
        for half in range(min(self.shape.stages - 2, 2 * blocks)):
            self.fetch(const(half, "int32"))

    def fetch(self, half: Expr) -> None:
        """Copy 64 columns into their stage, once that is free."""
        shape, (stage, turn) = self.shape, self.stage_of(half)
        with when(self._thread == 0):
            wait(self.barrier(stage, 1), (turn + 1) % 2)
            full = T.Bind(self.barrier(stage, 0))
            expect(full, self._rows[0] * 128)
            target = self._base + T.cast(stage * shape.stage_bytes, "uint32")
            self.share(target, half // 2, half % 2 * (shape.tokens * 64), full, shape.cluster)

    def step(self, block: Expr, blocks: int) -> Expr:
        return self._arrive(block * 2, blocks)

    def part(self, block: Expr, blocks: int, step: int) -> Expr | None:
        return self._arrive(block * 2 + 1, blocks) if step == HALF else None

    def _arrive(self, half: Expr, blocks: int) -> Expr:
        ahead = self.shape.stages - 2
        with when(half + ahead < 2 * blocks):
            self.fetch(half + ahead)
        stage, turn = self.stage_of(half)
        wait(self.barrier(stage, 0), turn % 2)
        return stage

    def passed(self, block: Expr, step: int) -> None:
        if step == 0:
            with when(block > 0):
                self.release(block * 2 - 1)
        elif step == HALF:
            self.release(block * 2)

    def finish(self, blocks: int) -> None:
        self.release(const(2 * blocks - 1, "int32"))
        store(self._done, self._done[0] + 2 * blocks, 0)

    def operand(self, stage: Expr, step: int, index: int) -> Expr:
        assert index == 0
        return descriptor(self._base + T.cast(stage * self.shape.stage_bytes + step % HALF * 32, "uint32"))
