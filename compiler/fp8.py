"""Weights as 8-bit floating point: scales from the largest weight of a row or block, and a search of scales that fit better.

A floating-point grid is about as fine everywhere, so that clipping gains nothing: the largest weight is always reached. But between two
powers of two it matters where on the grid the weights lie, and that a scale moves. Weights that are numbers of E4M3 times a scale already,
as those of a checkpoint in fp8, keep their values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moec.compiler.grid import positive
from moec.compiler.packed import Quantized
from moec.runtime.formats.fp8 import LARGEST, Fp8Format

STEPS = 8
"""Scales that the search tries, within a factor of two."""

SAMPLE = 32
"""Weights of a block that are looked at first."""

LARGEST_CODES = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
"""Numbers of E4M3 that the largest weight may be, up to powers of two."""

_LEAST = 2.0**-126
"""The least scale: a normal float32, whose inverse is one too."""


def round_to_fp8(weight: Tensor, fmt: Fp8Format) -> Quantized:
    """Codes and scales of a weight [N, K], any float type, finite: the largest weight of each row or block is the largest code.

    Where all of a row's or block's weights are numbers of E4M3 for another scale, they get that.
    """
    w = weight.float()
    return _quantized(w, _spread(_kept(w, _peaks(w, fmt), fmt), fmt, *w.shape), fmt)


def search_fp8(weight: Tensor, fmt: Fp8Format, importance: Tensor | None = None) -> Quantized:
    """Codes and scales of a weight [N, K], each row or block with the scale of `STEPS` that leaves the smallest squared error.

    Args:
        importance: [K], what the squared error of each input channel counts; None counts all alike.
    """
    w = weight.float()
    counts = torch.ones_like(w[:1]) if importance is None else positive(importance.to(w.device)).float()[None]
    base = _scales(_peaks(w, fmt))
    best, least = base, torch.full_like(base, torch.inf)
    for step in range(STEPS):
        scale = base * 2.0 ** (step / STEPS)
        spread = _spread(scale, fmt, *w.shape)
        wide = spread.repeat_interleave(fmt.group_size(w.shape[1]), 1)[:, : w.shape[1]]
        error = _sums((e4m3(w / wide).float() * wide - w).square() * counts, fmt)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return _quantized(w, _spread(best, fmt, *w.shape), fmt)


def e4m3(x: Tensor) -> Tensor:
    """Numbers rounded to the nearest that E4M3 has, ties to even, as float8; what is larger than all becomes the largest."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _quantized(w: Tensor, scale: Tensor, fmt: Fp8Format) -> Quantized:
    """The codes of w [N, K] for scales [N, groups]."""
    k = w.shape[1]
    codes = e4m3(w / scale.repeat_interleave(fmt.group_size(k), 1)[:, :k]).view(torch.uint8).cpu().numpy()
    zero = torch.zeros(scale.shape, dtype=torch.uint8, device="cpu").numpy()
    return Quantized(codes, scale.cpu().numpy(), zero)


def _scales(peaks: Tensor) -> Tensor:
    return torch.where(peaks > 0, peaks / LARGEST, 1.0).clamp_min(_LEAST)


def _kept(w: Tensor, peaks: Tensor, fmt: Fp8Format) -> Tensor:
    """Scales from the peaks, or of a block whose weights are all on the grid of one that makes its peak another code, that one."""
    scales, blocks = _scales(peaks), _blocks(w, fmt)
    few = blocks[:, :1, :, :SAMPLE]  # most weights are on no grid, which a few of them show
    missing = _missed(few, scales) > 0
    unsure = (~missing).any(1).nonzero()[:, 0]
    if len(unsure):
        missing[unsure] = _missed(blocks[unsure], scales[unsure]) > 0
    for largest in LARGEST_CODES if bool(missing.any()) else ():
        for step in (0.0, -torch.inf, torch.inf):  # the quotient may be rounded to a neighbour
            tried = (peaks / largest).clamp_min(_LEAST)
            tried = tried if step == 0 else tried.nextafter(torch.full_like(tried, step))
            rows = (missing & (_missed(few, tried) == 0)).any(1).nonzero()[:, 0]
            if len(rows):
                better = missing[rows] & (_missed(blocks[rows], tried[rows]) == 0)
                scales[rows] = torch.where(better, tried[rows], scales[rows])
                missing[rows] &= ~better
    return scales


def _missed(blocks: Tensor, scales: Tensor) -> Tensor:
    """How many weights of blocks [R, rows, groups, columns] are not kept by scales [R, groups]: [R, groups]."""
    wide = scales[:, None, :, None]
    return (e4m3(blocks / wide).float() * wide != blocks).sum((1, 3))


def _blocks(x: Tensor, fmt: Fp8Format) -> Tensor:
    """[N, K] -> [blocks of rows, rows, groups, columns], zeros added."""
    rows, columns = fmt.block or 1, fmt.group_size(x.shape[1])
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % columns, 0, -x.shape[0] % rows))
    return padded.view(-1, rows, padded.shape[1] // columns, columns)


def _peaks(w: Tensor, fmt: Fp8Format) -> Tensor:
    """The largest magnitude for each scale: [scale rows, groups]."""
    return _blocks(w.abs(), fmt).amax((1, 3))


def _sums(x: Tensor, fmt: Fp8Format) -> Tensor:
    return _blocks(x, fmt).sum((1, 3))


def _spread(scale: Tensor, fmt: Fp8Format, n: int, k: int) -> Tensor:
    """Scales [scale rows, groups] -> [N, groups]."""
    assert scale.shape == (fmt.scale_rows(n), fmt.groups(k))
    return scale.repeat_interleave(fmt.block or 1, 0)[:n].contiguous()
