"""Which columns of B are the terms of which token, where `projections` multiplies a tile of rows with T tokens.

A fragment of B has 8 columns, of which lane 4 g + t loads column g and has the sums of columns 2 t and 2 t + 1. A token has 8 / T columns
of each fragment, one for each of its terms, and there are as many fragments as its terms need (those of a byte, of which there are three):

    T    columns of a token    fragments    sums of a lane
    1    8                     1            terms 0 and 1 of the token, or term 2, in the lanes t = 0 and 1
    2    4                     1            the same of token t / 2
    4    2                     2            all terms of token t
    8    1                     3            all terms of the tokens 2 t and 2 t + 1

The operand A, which is what takes instructions to make, is the same for all fragments.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.emit import Expr
from moec.targets.kernels.cuda.layout import ceil_div

WIDTH = 8  # columns of a fragment
TOKENS = (1, 2, 4, 8)
"""How many tokens there can be."""


@dataclass(frozen=True)
class Columns:
    """The columns of T tokens, each in so many terms."""

    tokens: int
    terms: int

    @property
    def each(self) -> int:
        """Columns of a token in each fragment."""
        return WIDTH // self.tokens

    @property
    def fragments(self) -> int:
        """Fragments of B."""
        return ceil_div(self.terms, self.each)

    @property
    def own(self) -> int:
        """Tokens of which a lane has sums."""
        return 2 if self.each == 1 else 1

    @property
    def split(self) -> bool:
        """Whether the sums of a token's terms are in two neighbouring lanes."""
        return self.terms > 2 and self.each > 2

    def loaded(self, fragment: int, column: Expr) -> tuple[Expr, Expr]:
        """The token and the term of a column of B; one without a term has the last one, which counts for nothing."""
        if self.tokens == 1:
            return 0, T.min(column, self.terms - 1)
        last = self.terms - 1 - fragment * self.each  # of the columns of a token
        inside = column % self.each if self.each > 1 and last > 0 else 0
        return column // self.each, fragment * self.each + (T.min(inside, last) if 0 < last < self.each - 1 else inside)

    def token(self, t: Expr, which: int) -> Expr:
        """The token of a lane's sum."""
        return 0 if self.tokens == 1 else t * 2 // self.each + which

    def whole(self, t: Expr) -> Expr | None:
        """Whether a lane's sum is a token's, once those of neighbours are added; None where every lane's is."""
        return t % (self.each // 2) == 0 if self.each > 2 else None

    def place(self, which: int, term: int) -> tuple[int, int]:
        """The fragment, and which of a lane's two columns, that has a term of a lane's token; where a lane has them all."""
        assert not self.split
        return (term, which) if self.each == 1 else (term // 2, term % 2)
