"""Codes and scales in turns, each the best for the other (decoupleQ, https://arxiv.org/abs/2404.12759).

Codes for given scales: rounding with error feedback and coordinate descent within the box of the codes. Scales for given codes: the least
squares over all groups of a row at once. The objective is that of GPTQ, tr((W - Q) H (W - Q)^T); of all rounds each row keeps its best.
Zero points are those of the first round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.error_feedback import Rounded, descend, factor, round_with_feedback, with_feedback
from moec.compiler.errors import MoecError
from moec.compiler.grid import half, positive, round_to_nearest
from moec.compiler.packed import Quantized
from moec.compiler.quantizers import Needs
from moec.runtime.formats.int import IntFormat

NEEDS: Needs = "full"


def quantize(
    weight: Tensor, fmt: IntFormat, moment: Tensor | None = None, *, damp: float = 0.01, rounds: int = 3, sweeps: int = 2
) -> Quantized:
    """Codes, scales and zero points of a weight. Each row is never worse than rounded to nearest, by the moment.

    Args:
        weight: [N, K], any float type, finite.
        fmt: bits, group size and symmetry.
        moment: [K, K]; see `with_feedback`.
        damp: as of `gptq`.
        rounds: how often codes and scales take turns.
        sweeps: passes of coordinate descent over the codes in each.

    Raises:
        MoecError: an option has no sense.
    """
    if damp < 0 or rounds < 1 or sweeps < 0:
        raise MoecError(f"decoupleq: damp={damp} and sweeps={sweeps} must be at least 0, and rounds={rounds} at least 1")

    def work(w: Tensor, moment: Tensor) -> list[Rounded]:
        size, groups = fmt.group_size(len(w)), fmt.groups(len(w))
        h, r = factor(moment, damp)
        found, current = list[Rounded](), Rounded.of(round_to_nearest(weight, fmt, positive(moment.diagonal())), fmt, w.device)
        for _ in range(rounds):
            current = Rounded(current.codes, fitted_scales(w, h, current, size), current.zero)
            current = round_with_feedback(w, h, r, fmt, range(groups), (current.scale, current.zero))
            current = descend(w, h, fmt, current, sweeps, scales=False)
            found.append(Rounded(current.codes, fitted_scales(w, h, current, size), current.zero))
        return found

    return with_feedback(weight, fmt, moment, work)


def fitted_scales(w: Tensor, h: Tensor, found: Rounded, size: int) -> Tensor:
    """The scales [groups, N] that fit the codes best, all groups of a row together: least squares in the metric H."""
    (k, n), groups = w.shape, len(found.scale)
    h = h.to(w.dtype)
    cuts = [slice(at, min(at + size, k)) for at in range(0, k, size)]
    normal, right = (torch.empty(n, groups, *more, dtype=torch.float64, device=w.device) for more in ((groups,), ()))
    for a, cut in enumerate(cuts):
        response = h[:, cut] @ found.codes[cut]  # [K, N]
        right[:, a] = (response * w).sum(0)
        for b, other in enumerate(cuts):
            normal[:, a, b] = (response[other] * found.codes[other]).sum(0)
    ridge = normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30) * 1e-6
    # The ridge pulls to the old scales: groups whose codes are all zero keep them.
    eye = torch.eye(groups, dtype=torch.float64, device=w.device)
    normal = normal + ridge[:, None, None] * eye
    right = right + ridge[:, None] * found.scale.T
    return half(torch.linalg.solve(normal, right).T.to(w.dtype)).contiguous()
