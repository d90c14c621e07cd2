"""The scales and zero points of groups of weights: the search that every quantiser of integer formats shares.

A group's values lie on the grid (code - zero) * scale. The search tries clipping ratios of the range that covers the group, rounds, fits
the scale to the codes by least squares, and keeps what leaves the smallest squared error, each weight's counted with its importance.
Symmetric formats have one zero point for all groups, but either sign of the scale: the codes reach one step further below zero than
above, and the sign puts the largest weight on that side.

Binary and ternary groups need no search. With importances h the best scale of {-s, s} is sum h |w| / sum h. That of {-s, 0, s} belongs to
a set of weights that are not zero, the m largest for some m, as a weight rounds to zero below s / 2 whatever it counts: with A and B the
sums of h |w| and of h over the set, s = A / B, and the set is the one with the largest A^2 / B (https://arxiv.org/abs/1605.04711, exactly).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moec.compiler.packed import Quantized
from moec.runtime.formats.int import IntFormat
from moec.runtime.host import physical_cores

_CHUNK = 1 << 16
"""Weights searched at once: the working set stays in a core's cache."""

_TINY, _HUGE = 2.0**-24, 65504.0
"""The smallest and the largest float16."""


@lru_cache(maxsize=1)
def workers() -> ThreadPoolExecutor:
    """Threads for pieces of work too small to share among threads: each core takes pieces of its own."""
    return ThreadPoolExecutor(physical_cores(), initializer=torch.set_num_threads, initargs=(1,))


def half(scale: Tensor) -> Tensor:
    """Scales as float16 holds them: never zero, never infinite."""
    magnitude = scale.abs().clamp(_TINY, _HUGE).half().to(scale.dtype).clamp_min(_TINY)
    return torch.where(scale < 0, -magnitude, magnitude)


def fit(groups: Tensor, fmt: IntFormat, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scale and zero point of each group.

    Args:
        groups: [R, G], finite.
        fmt: bits and symmetry.
        importance: what a squared error counts, [R, G] or [1, G], positive; None counts all alike.

    Returns:
        Scales [R, 1] as float16 holds them, and zero points [R, 1], both of the groups' type.
    """
    weighted = groups if importance is None else groups * importance
    best = groups.new_full((len(groups), 1), -1.0)
    best_scale, best_zero, q = torch.ones_like(best), torch.zeros_like(best), torch.empty_like(groups)
    for inverse, zero in _candidates(groups, fmt, importance):
        torch.mul(groups, inverse, out=q)
        snap(q, zero, fmt)
        # The scale that fits these codes best is <w, q> / <q, q>, and it leaves the error <w, w> - <w, q>^2 / <q, q>.
        product = torch.linalg.vecdot(weighted, q)[:, None]
        length = torch.linalg.vecdot(q if importance is None else q * importance, q)[:, None].clamp_min_(1e-30)
        merit = product.square() / length
        better = merit > best
        best = torch.where(better, merit, best)
        best_scale = torch.where(better, product / length, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    if has_zero(fmt):  # a group of zeros has codes zero, and any scale
        best_scale = torch.where(best_scale == 0, 1.0, best_scale)
    return half(best_scale), best_zero


def has_zero(fmt: IntFormat) -> bool:
    """Whether zero is among the values of a format for every scale."""
    return fmt.middle % fmt.step == 0


def _ratios(bits: int) -> list[float]:
    # Few codes reward clipping: the best ratio of a normal distribution is near 0.6 at 2 bits and near 1 at 8.
    lowest = {1: 0.3, 2: 0.45, 3: 0.6, 4: 0.7}.get(bits, 0.9)
    ratios: list[float] = torch.linspace(lowest, 1.0, 8 if bits <= 4 else 4).tolist()
    return ratios


_Candidate = tuple[Tensor, Tensor]
"""One over the scale, and the zero point: [R, 1]."""


def _candidates(groups: Tensor, fmt: IntFormat, importance: Tensor | None) -> Iterator[_Candidate]:
    if not has_zero(fmt):  # codes are signs
        one = torch.ones_like(groups[:, :1])
        return iter([(one, fmt.middle * one)])
    if fmt.levels == 3:
        return iter([_ternary(groups, importance)])
    return _symmetric(groups, fmt) if fmt.symmetric else _asymmetric(groups, fmt)


def _ternary(groups: Tensor, importance: Tensor | None) -> _Candidate:
    size, order = groups.abs().sort(1, descending=True)
    counts = torch.ones_like(groups) if importance is None else importance.expand_as(groups).gather(1, order)
    inside, total = (size * counts).cumsum(1), counts.cumsum(1).clamp_min(1e-30)
    best = (inside.square() / total).argmax(1, keepdim=True)
    scale = inside.gather(1, best) / total.gather(1, best)
    return 1 / torch.where(scale == 0, 1.0, scale), torch.ones_like(scale)


def _symmetric(groups: Tensor, fmt: IntFormat) -> Iterator[_Candidate]:
    low, high = -fmt.middle, fmt.top - fmt.middle
    peak = groups.gather(1, groups.abs().argmax(1, keepdim=True))  # the largest weight, with its sign
    inverse, zero = 1 / torch.where(peak == 0, 1.0, peak), torch.full_like(peak, -low)
    for end, ratios in ((low, _ratios(fmt.bits)), (high, _ratios(fmt.bits)[1::2])):
        for ratio in ratios if end else ():
            yield inverse * (end / ratio), zero


def _asymmetric(groups: Tensor, fmt: IntFormat) -> Iterator[_Candidate]:
    top = fmt.top
    # The range holds zero, so that the zero point is one of the codes.
    low, high = groups.amin(1, keepdim=True).clamp_max(0), groups.amax(1, keepdim=True).clamp_min(0)
    for ratio in _ratios(fmt.bits):
        scale = ((high - low) * (ratio / top)).clamp_min(_TINY)
        below = (-low * ratio / scale).floor().clamp(0, top)
        for zero in (below, (below + 1).clamp_max(top)):
            yield 1 / scale, zero


def nearest(groups: Tensor, scale: Tensor, zero: Tensor, fmt: IntFormat) -> Tensor:
    """The nearest codes, with the zero point taken off: (code - zero), of the groups' type."""
    return snap(groups / scale, zero, fmt)


def snap(wanted: Tensor, zero: Tensor, fmt: IntFormat) -> Tensor:
    """The nearest codes that there are, with zero points taken off as in what is wanted; in place."""
    if not has_zero(fmt):  # a sign
        return wanted.ge_(0).mul_(2).sub_(1)
    wanted.round_()
    if fmt.symmetric:
        return wanted.clamp_(-fmt.middle, fmt.top - fmt.middle)
    return wanted.clamp_(-zero, fmt.top - zero)


def round_to_nearest(weight: Tensor, fmt: IntFormat, importance: Tensor | None = None) -> Quantized:
    """Codes, scales and zero points of a weight, each weight rounded to the nearest value of its group's grid.

    Args:
        weight: [N, K], any float type, finite.
        fmt: bits, group size and symmetry.
        importance: [K], what the squared error of each input channel counts; None counts all alike.
    """
    n, k = weight.shape
    size, groups = fmt.group_size(k), fmt.groups(k)
    codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(n, groups, dtype=torch.float16, device=weight.device)
    zero = torch.empty(n, groups, dtype=torch.uint8, device=weight.device)
    rows, pad = max(1, _CHUNK // k) if weight.is_cpu else n, groups * size - k
    counts = None
    if importance is not None or (pad and not has_zero(fmt)):
        importance = torch.ones(k, device=weight.device) if importance is None else positive(importance.to(weight.device)).float()
        counts = torch.nn.functional.pad(importance, (0, pad)).view(1, groups, size)

    def chunk(start: int) -> None:
        # A short last group is filled up with zeros, which every scale represents exactly, or which do not count.
        part = torch.nn.functional.pad(weight[start : start + rows].float(), (0, pad))
        count = len(part)
        part = part.view(-1, size)
        s, z = fit(part, fmt, None if counts is None else counts.expand(count, -1, -1).reshape(-1, size))
        stop = start + count
        codes[start:stop] = (nearest(part, s, z, fmt) + z).to(torch.uint8).view(count, -1)[:, :k]
        scale[start:stop] = s.half().view(count, groups)
        zero[start:stop] = z.to(torch.uint8).view(count, groups)

    if weight.is_cpu:
        for _ in workers().map(chunk, range(0, n, rows)):
            pass
    else:
        chunk(0)
    return Quantized(codes.cpu().numpy(), scale.cpu().numpy().astype(np.float16), zero.cpu().numpy())


def positive(importance: Tensor) -> Tensor:
    """Importances [K] with those of inputs that were never seen raised to a ten-thousandth of the mean."""
    mean = importance.mean()
    return importance.clamp_min(1e-4 * mean) if mean > 0 else torch.ones_like(importance)
