"""What a product wants to know of the activations that it multiplies with."""

from __future__ import annotations

from typing import Any

from moec.targets.kernels.cuda.emit import Expr


class Staged:
    """Activations in stages of shared memory, as a product reads them."""

    shape: Any

    def step(self, block: Expr, blocks: Any) -> Expr:
        """Wait for a block of columns, of so many: its stage."""
        raise NotImplementedError

    def part(self, block: Expr, blocks: Any, step: int) -> Expr | None:
        """The stage from a step of 16 columns of a block on, where that is another one than before: wait for it."""

    def passed(self, block: Expr, step: int) -> None:
        """All products of a warp before a step of a block are done."""

    def finish(self, blocks: Any) -> None:
        """All blocks were used."""

    def operand(self, stage: Expr, step: int, index: int) -> Expr:
        """The descriptor of 16 columns of a stage, of a term."""
        raise NotImplementedError
