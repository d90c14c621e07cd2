"""Low-rank factors of a matrix that change its outputs least, and the same for what quantisation takes from it.

    || A ||^2 = tr(A H A^T)            H [K, K]: the second moment of what A [N, K] is multiplied with

With A H^(1/2) = U S V^T, U_r U_r^T A is the best approximation of rank r and its squared error the sum of the other s_i^2 (Eckart and Young
in that norm; the inverse of H is not needed). Without H the norm is Frobenius's.

LoRC (https://arxiv.org/abs/2303.08302) adds such factors of the error W - Q to quantised weights Q; that H weighs the error is due to
https://arxiv.org/abs/2410.21271.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.compiler.error_feedback import factor
from moec.compiler.errors import MoecError
from moec.compiler.packed import CodedFormat, Quantized
from moec.compiler.plugins import with_options
from moec.compiler.quantizers import get_quantizer
from moec.runtime.formats import get_format
from moec.runtime.formats.int import IntFormat

RIDGE = 1e-6
"""A share of the mean of H's diagonal that is added to it, doubled until rounding leaves H positive definite: directions that no input had
come last, not in any order."""


@dataclass(frozen=True)
class Norm:
    """How errors of a matrix are measured: H, and an upper triangular root with H = root root^T; both [K, K] float64."""

    h: Tensor
    root: Tensor

    @classmethod
    def of(cls, moment: Tensor | None, size: int) -> Norm:
        """The norm that a second moment makes.

        Args:
            moment: [K, K], or its diagonal [K], or None for Frobenius's norm.
            size: K.
        """
        if moment is None or not bool(moment.any()):
            eye = torch.eye(size, dtype=torch.float64, device=None if moment is None else moment.device)
            return cls(eye, eye)
        return cls(*factor(moment if moment.ndim == 2 else moment.diag(), RIDGE))

    def rows(self, error: Tensor) -> Tensor:
        """e H e^T of every row e of an error [N, K]: float64 [N]."""
        wide = error.double()
        return ((wide @ self.h.to(error.device)) * wide).sum(1)


def factorize(matrix: Tensor, norm: Norm, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest factors: left [N, r] with orthonormal columns, right [r, K], float32; those of a smaller rank are their first columns.

    Args:
        matrix: [N, K].
        rank: r; columns beyond min(N, K) are zero.
    """
    a = matrix.double()
    weighted = a @ norm.root.to(a.device)
    n, k = a.shape
    if n <= k:
        left = torch.linalg.eigh(weighted @ weighted.T).eigenvectors.flip(1)[:, :rank]
    else:
        values, right = torch.linalg.eigh(weighted.T @ weighted)
        # Directions that are nothing but rounding have no left vector.
        inverse = torch.where(values > values[-1].clamp_min(0) * 1e-14, values.clamp_min(1e-300).rsqrt(), 0.0)
        left = (weighted @ (right * inverse)).flip(1)[:, :rank]
    left = torch.nn.functional.pad(left, (0, rank - left.shape[1]))
    return left.float(), (left.T @ a).float()


@dataclass(frozen=True)
class Correction:
    """Low-rank factors of the quantisation error of experts.

    Args:
        rank: of each projection (8), or a share of the bytes of the quantised projections that factors may take (0.1).
        format: integer format of both factors.
        weighted: errors are measured by the inputs' second moments, which takes calibration text; else by Frobenius's norm.
        rounds: how often the weights are quantised again without what the factors carry, and these fitted anew; kept where it helps.
    """

    rank: float = 8
    format: str = "int8_channel"
    weighted: bool = True
    rounds: int = 0

    def __post_init__(self) -> None:
        if not isinstance(get_format(self.format), IntFormat):
            raise MoecError(f"low_rank: format {self.format}: factors of a quantisation error need an integer format, such as int8_channel")
        if not (0 < self.rank < 1 or (self.rank >= 1 and self.rank == int(self.rank))):
            raise MoecError(f"low_rank: rank {self.rank}: expected a rank, such as 8, or a share of the bytes between 0 and 1")
        if self.rounds < 0:
            raise MoecError(f"low_rank: rounds {self.rounds}: expected a number of rounds from 0")

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> Correction | None:
        """From a recipe's mapping; None where there is none.

        Raises:
            MoecError: an option that there is not, or one without sense.
        """

        def make(*, rank: float = 8, format: str = "int8_channel", weighted: bool = True, rounds: int = 0) -> Correction:
            return cls(rank, format, weighted, rounds)

        return None if options is None else with_options(make, options, "low_rank of quantize")()

    def nbytes(self, n: int, k: int, rank: int) -> int:
        """Bytes of the factors of a matrix [n, k]."""
        fmt = get_format(self.format)
        return fmt.nbytes((n, rank)) + fmt.nbytes((rank, k))

    def rank_of(self, n: int, k: int, size: float) -> int:
        """The rank of a matrix [n, k] that takes `size` bytes without its factors; at least 1."""
        if self.rank >= 1:
            return min(int(self.rank), n, k)
        low, high = 1, min(n, k)
        while low < high:  # the largest that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.nbytes(n, k, middle) <= self.rank * size else (low, middle - 1)
        return low

    def corrected(
        self, weight: Tensor, fmt: CodedFormat, quantize: Callable[[Tensor], Quantized], moment: Tensor | None, rank: int
    ) -> tuple[Quantized, Quantized, Quantized]:
        """The codes of a weight [N, K] and of its factors [N, r] and [r, K].

        Args:
            quantize: gives the codes of a weight in the format `fmt`.
            moment: [K, K] or [K]; None where nothing is known of the inputs.
        """
        norm = Norm.of(moment if self.weighted else None, weight.shape[1])
        best, least = None, torch.inf
        target = weight
        for _ in range(1 + self.rounds):
            made = quantize(target)
            error = weight - made.values(fmt)
            left, right = self.factors(error, norm, rank)
            carried = self._values(left, right)
            damage = float(norm.rows(error - carried).sum())
            if best is None or damage < least:
                best, least = (made, left, right), damage
            target = weight - carried
        assert best is not None
        return best

    def factors(self, error: Tensor, norm: Norm, rank: int) -> tuple[Quantized, Quantized]:
        """The codes of the factors of an error [N, K]. No row's error is larger with them than without.

        The right factor is rounded first, and the left one fitted to what it has become.
        """
        fmt, nearest = get_format(self.format), get_quantizer("rtn").quantize
        assert isinstance(fmt, IntFormat)
        right = nearest(factorize(error, norm, rank)[1], fmt)
        h, r = norm.h.to(error.device), right.values(fmt).to(error.device).double()
        fitted = error.double() @ h @ r.T @ torch.linalg.pinv(r @ h @ r.T, hermitian=True)
        left = nearest(fitted.float(), fmt)
        worse = norm.rows(error - self._values(left, right)) >= norm.rows(error)
        if bool(worse.any()):
            left = nearest(fitted.float().masked_fill(worse[:, None], 0.0), fmt)
        return left, right

    def _values(self, left: Quantized, right: Quantized) -> Tensor:
        fmt = get_format(self.format)
        assert isinstance(fmt, IntFormat)
        return left.values(fmt) @ right.values(fmt)
