"""Which rank each projection of each expert gets, as a problem of the kind that `assign_bits` solves: shares of bytes are its formats."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moec.compiler.allocation import Problem, Unit, member_shape
from moec.compiler.low_rank import Norm, factorize
from moec.compiler.model import Model
from moec.compiler.plan import param_bytes
from moec.runtime.formats import get_format


def rank_of(n: int, k: int, share: float, multiple: int) -> int | None:
    """The rank of factors that have a share of the numbers of a matrix [n, k]; None for the whole matrix.

    >>> rank_of(384, 192, 0.5, 8), rank_of(384, 192, 1, 8)
    (64, None)
    """
    return None if share >= 1 else min(n, k, max(multiple, int(share * n * k / (n + k)) // multiple * multiple))


@dataclass(frozen=True)
class RankProblem(Problem):
    """A problem whose options are shares, largest first.

    Args:
        multiple: ranks are multiples of it.
    """

    multiple: int = 16
    _threads: threading.local = field(default_factory=threading.local, repr=False, compare=False)

    @property
    def shares(self) -> tuple[float, ...]:
        """The options as numbers."""
        return tuple(map(float, self.formats))

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each unit with each share: [U, O]."""
        return np.array([[sum(self._bytes(u, m, share) for m in u.members) for share in self.shares] for u in self.units], np.int64)

    def _bytes(self, unit: Unit, member: str, share: float) -> int:
        n, k = member_shape(self.model, unit, member)
        rank, fmt = rank_of(n, k, share, self.multiple), get_format(plain_format(self.model, member))
        return fmt.nbytes((n, k)) if rank is None else fmt.nbytes((n, rank)) + fmt.nbytes((rank, k))

    def changed(self, weight: Tensor, option: str, moment: Callable[[], Tensor] | None) -> Tensor:
        """What a weight [N, K] becomes with a share; each thread keeps the factors of the last two weights that it asked for."""
        n, k = weight.shape
        rank = rank_of(n, k, float(option), self.multiple)
        if rank is None:
            return weight
        kept: dict[int, tuple[Tensor, Tensor, Tensor]] = self._threads.__dict__.setdefault("factors", {})
        if (found := kept.get(id(weight))) is None:  # the best factors of a smaller rank are the first of those of a larger one
            while len(kept) >= 2:
                del kept[next(iter(kept))]
            most = max(rank_of(n, k, share, self.multiple) or 0 for share in self.shares)
            found = kept[id(weight)] = (weight, *factorize(weight, Norm.of(moment and moment(), k), most))
        return found[1][:, :rank] @ found[2][:rank]


def plain_format(model: Model, name: str) -> str:
    """The format of a projection that is not quantised."""
    fmt = model.graph.params[name].format
    return fmt if isinstance(fmt, str) else fmt[0]


def whole_bytes(model: Model, names: Sequence[str]) -> int:
    """Bytes of parameters as they are."""
    return sum(param_bytes(model.graph.params[name]) for name in names)
