"""Round to nearest, each group with the scale that minimises its squared error.

The scale is searched on a grid of clipping ratios around the one that covers the group, of either sign (the codes reach one step
further below zero than above, and the sign puts the largest weight on that side), and is then fitted to the codes it gave by
least squares. Asymmetric formats search the range's two ends together.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from moec.compiler.packed import Quantized
from moec.compiler.quantizers import Needs
from moec.runtime.formats.int import IntFormat
from moec.runtime.host import physical_cores

NEEDS: Needs = "none"

_CHUNK = 1 << 16
"""Weights searched at once: the working set stays in a core's cache."""


def _ratios(bits: int) -> list[float]:
    # Few codes reward clipping: the best ratio of a normal distribution is near 0.6 at 2 bits and near 1 at 8.
    lowest = {1: 0.3, 2: 0.45, 3: 0.6, 4: 0.7}.get(bits, 0.9)
    ratios: list[float] = torch.linspace(lowest, 1.0, 8 if bits <= 4 else 4).tolist()
    return ratios


@lru_cache(maxsize=1)
def _workers() -> ThreadPoolExecutor:
    # A chunk is too small to share among threads: each core takes chunks of its own.
    return ThreadPoolExecutor(physical_cores(), initializer=torch.set_num_threads, initargs=(1,))


def quantize(weight: Tensor, fmt: IntFormat, moment: Tensor | None = None) -> Quantized:  # noqa: ARG001  # every quantiser has it
    """Codes, scales and zero points of a weight.

    Args:
        weight: [N, K], any float type, finite.
        fmt: bits, group size and symmetry.
        moment: not read.
    """
    n, k = weight.shape
    size, groups = fmt.group_size(k), fmt.groups(k)
    codes = torch.empty(n, k, dtype=torch.uint8)
    scale = torch.empty(n, groups, dtype=torch.float16)
    zero = torch.full((n, groups), fmt.levels // 2, dtype=torch.uint8)
    rows = max(1, _CHUNK // k)
    search = _symmetric if fmt.symmetric else _asymmetric

    def chunk(start: int) -> None:
        part = weight[start : start + rows].float()
        # A short last group is filled up with zeros, which every scale represents exactly.
        part = torch.nn.functional.pad(part, (0, groups * size - k))
        q, s, z = search(part.reshape(-1, size), fmt)
        stop = start + part.shape[0]
        codes[start:stop] = q.view(part.shape[0], -1)[:, :k]
        scale[start:stop] = s.view(-1, groups)
        zero[start:stop] = z.view(-1, groups)

    for _ in _workers().map(chunk, range(0, n, rows)):
        pass
    return Quantized(codes.numpy(), scale.numpy().astype(np.float16), zero.numpy())


def _half(scale: Tensor) -> Tensor:
    """Scales [R, 1] as float16 holds them: never zero, never infinite."""
    tiny = 2.0**-24  # the smallest float16
    magnitude = scale.abs().clamp(tiny, 65504.0).half().float().clamp_min(tiny)
    return torch.where(scale < 0, -magnitude, magnitude)


def _symmetric(groups: Tensor, fmt: IntFormat) -> tuple[Tensor, Tensor, Tensor]:
    low, high = -(fmt.levels // 2), fmt.levels // 2 - 1
    at = groups.abs().argmax(1, keepdim=True)
    peak = groups.gather(1, at)  # the largest weight, with its sign
    best, best_scale = torch.full((len(groups), 1), -1.0), torch.ones(len(groups), 1)
    inverse, q = 1 / torch.where(peak == 0, 1.0, peak), torch.empty_like(groups)
    for end, ratios in ((low, _ratios(fmt.bits)), (high, _ratios(fmt.bits)[1::2])):
        for ratio in ratios if end else ():
            torch.mul(groups, inverse * (end / ratio), out=q)
            q.round_().clamp_(low, high)
            # The scale that fits these codes best is <w, q> / <q, q>, and it leaves the error |w|^2 - <w, q>^2 / <q, q>.
            product, length = torch.linalg.vecdot(groups, q)[:, None], torch.linalg.vecdot(q, q)[:, None].clamp_min_(1)
            merit = product.square() / length
            better = merit > best
            best = torch.where(better, merit, best)
            best_scale = torch.where(better, product / length, best_scale)
    best_scale = _half(torch.where(best_scale == 0, 1.0, best_scale))
    q = (groups / best_scale).round_().clamp_(low, high).sub_(low)
    return q.to(torch.uint8), best_scale.half(), torch.full_like(best_scale, -low).to(torch.uint8)


def _asymmetric(groups: Tensor, fmt: IntFormat) -> tuple[Tensor, Tensor, Tensor]:
    top = fmt.levels - 1
    # The range holds zero, so that the zero point is one of the codes.
    low, high = groups.amin(1, keepdim=True).clamp_max(0), groups.amax(1, keepdim=True).clamp_min(0)
    best = torch.full((len(groups), 1), torch.inf)
    best_scale, best_zero = torch.ones_like(best), torch.zeros_like(best)
    for ratio in _ratios(fmt.bits):
        scale = _half((high - low) * (ratio / top))
        for zero in ((-low * ratio / scale).floor().clamp(0, top), (-low * ratio / scale).ceil().clamp(0, top)):
            q = (groups / scale).round_().add_(zero).clamp_(0, top)
            error = (q.sub_(zero).mul_(scale).sub_(groups)).square_().sum(1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    q = (groups / best_scale).round_().add_(best_zero).clamp_(0, top)
    return q.to(torch.uint8), best_scale.half(), best_zero.to(torch.uint8)
