"""Half-quadratic quantisation: scales and zero points that outliers pull less, from the weight alone.

Minimises the sum of |w - q|^norm (norm < 1) by half-quadratic splitting (https://mobiusml.github.io/hqq_blog/): an outlier's error e is
shrunk off, e <- sign(r) max(0, |r| - |r|^(norm - 1) / beta) of the residue r, and the grid is then fitted by least squares to what is left,
w - e, with a growing beta. Residues are measured in steps of the grid, so that beta means the same for every weight. Zero points stay
codes, as the formats have them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.grid import fit, half, has_zero, nearest
from moec.compiler.packed import Quantized
from moec.compiler.quantizers import Needs
from moec.runtime.formats.int import IntFormat

NEEDS: Needs = "none"


def quantize(
    weight: Tensor, fmt: IntFormat, moment: Tensor | None = None, *,  # noqa: ARG001  # every quantiser has it
    norm: float = 0.7, beta: float = 10.0, growth: float = 1.01, iterations: int = 20,
) -> Quantized:  # fmt: skip
    """Codes, scales and zero points of a weight.

    Args:
        weight: [N, K], any float type, finite.
        fmt: bits, group size and symmetry.
        moment: not read.
        norm: the exponent, above 0 and up to 1.
        beta, growth: weight of the splitting, multiplied by `growth` after each iteration.
        iterations: at most.

    Raises:
        MoecError: an option has no sense.
    """
    if not 0 < norm <= 1 or beta <= 0 or growth < 1 or iterations < 0:
        raise MoecError(
            f"hqq: expected 0 < norm <= 1, beta > 0, growth >= 1 and iterations >= 0, got {norm}, {beta}, {growth}, {iterations}"
        )
    n, k = weight.shape
    size, groups = fmt.group_size(k), fmt.groups(k)
    pad = groups * size - k
    w = torch.nn.functional.pad(weight.float(), (0, pad)).view(-1, size)  # [R, G]
    real = torch.ones_like(w)  # what a short last group is filled up with is left out, unless the format has zero and so costs nothing
    if pad and not has_zero(fmt):
        real.view(n, -1)[:, k:] = 0
    scale, zero = fit(w, fmt, real)
    best, best_error = (scale, zero), _error(w, scale, zero, fmt, norm, real)
    for _ in range(iterations):
        codes = nearest(w, scale, zero, fmt)
        residue = w / scale - codes
        outlier = residue.sign() * (residue.abs() - residue.abs().clamp_min(1e-8).pow(norm - 1) / beta).clamp_min(0)
        target = w - outlier * scale
        scale = half((target * codes * real).sum(1, keepdim=True) / (codes.square() * real).sum(1, keepdim=True).clamp_min(1))
        if not fmt.symmetric:
            zero = (zero + (codes - target / scale).mean(1, keepdim=True)).round().clamp(0, fmt.top)
        error = _error(w, scale, zero, fmt, norm, real)
        better = error < best_error
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
        best_error = torch.where(better, error, best_error)
        beta *= growth
    scale, zero = best
    codes = (nearest(w, scale, zero, fmt) + zero).to(torch.uint8).view(n, -1)[:, :k]
    return Quantized(
        codes.contiguous().cpu().numpy(), scale.half().view(n, groups).cpu().numpy(), zero.to(torch.uint8).view(n, groups).cpu().numpy()
    )


def _error(w: Tensor, scale: Tensor, zero: Tensor, fmt: IntFormat, norm: float, real: Tensor) -> Tensor:
    """The sum of |w - q|^norm of each group: [R, 1]; `real` [R, G] is 1 at the weights that count, else 0."""
    return ((w - nearest(w, scale, zero, fmt) * scale).abs().pow(norm) * real).sum(1, keepdim=True)
