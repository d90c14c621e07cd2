"""Rounding with error feedback (GPTQ, https://arxiv.org/abs/2210.17323), and descent from where it ends.

Both lower tr((W - Q) H (W - Q)^T), the squared error of a linear layer's outputs over inputs of second moment H. Arrays are transposed,
[K, N]: an input channel of all N rows is contiguous.

With H = R R^T, R upper triangular, and E = W - Q of the channels that are rounded already, the others would best take their error up by
becoming W_g + E R_<g,g R_gg^-1 for a group g of channels: products with R give GPTQ's corrected weights, and neither the inverse of H
nor updates of later groups are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.grid import fit, half, round_to_nearest, snap
from moec.compiler.packed import Quantized
from moec.compiler.replay import replayed
from moec.runtime.formats.int import IntFormat


@dataclass(frozen=True)
class Rounded:
    """Codes with their zero points taken off [K, N], and scales and zero points [groups, N]; float."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def values(self, size: int) -> Tensor:
        """What the codes stand for: [K, N], for groups of `size` channels."""
        return self.codes * self.scale.repeat_interleave(size, 0)[: len(self.codes)]

    @classmethod
    def of(cls, packed: Quantized, fmt: IntFormat, device: torch.device | str = "cpu") -> Rounded:
        """The same weight in this form."""
        arrays = (packed.codes, packed.scale, packed.zero)
        codes, scale, zero = (torch.from_numpy(a).T.to(device, torch.float32).contiguous() for a in arrays)
        return cls(codes - zero.repeat_interleave(fmt.group_size(len(codes)), 0)[: len(codes)], scale, zero)

    def quantized(self, size: int) -> Quantized:
        """The same weight as codes [N, K], for groups of `size` channels."""
        codes = self.codes + self.zero.repeat_interleave(size, 0)[: len(self.codes)]
        kinds = ((codes, torch.uint8), (self.scale, torch.float16), (self.zero, torch.uint8))
        return Quantized(*(x.T.contiguous().to(kind).cpu().numpy() for x, kind in kinds))


def with_feedback(weight: Tensor, fmt: IntFormat, moment: Tensor | None, work: Callable[[Tensor, Tensor], Sequence[Rounded]]) -> Quantized:
    """Of every row of a weight [N, K] the best of what `work` finds and of rounding to nearest, by the moment [K, K].

    Args:
        moment: without it, or where no input was ever seen, weights are rounded to nearest.
        work: is given the weight as [K, N] float32 and the moment.
    """
    plain = round_to_nearest(weight, fmt)
    if moment is None or not bool(moment.diagonal().any()):
        return plain
    w = weight.to(moment.device, torch.float32).T.contiguous()
    size = fmt.group_size(len(w))
    return best_of(w, moment, [*work(w, moment), Rounded.of(plain, fmt, w.device)], size).quantized(size)


def factor(moment: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """The damped moment H and the upper triangular R of H = R R^T, both [K, K] float64.

    Args:
        moment: [K, K], positive semi-definite up to rounding.
        damp: what is added to the diagonal, as a share of its mean; doubled until H can be factored.
    """
    h = moment.double()
    mean = float(h.diagonal().mean())
    while True:
        damped = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (damp * mean if mean > 0 else 1.0)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            return damped, lower.flip(0, 1)
        damp = max(2 * damp, 1e-6)


def round_with_feedback(
    w: Tensor, h: Tensor, r: Tensor, fmt: IntFormat, order: Sequence[int], grid: tuple[Tensor, Tensor] | None = None, block: int = 128
) -> Rounded:
    """GPTQ: round the channels one after the other, the later ones taking up the error of the earlier ones.

    Args:
        w: [K, N].
        h, r: from `factor`, in the order of the channels.
        fmt: bits, group size, symmetry.
        order: the groups, in the order in which they are rounded; r must be of the channels in this order.
        grid: scales and zero points [groups, N]; without it they are fitted to the corrected weights as a group is reached.
        block: channels that are corrected together where groups are larger.
    """
    k, n = w.shape
    size = fmt.group_size(k)
    codes, error = torch.empty_like(w), torch.empty_like(w)  # the error in the order of rounding
    scale, zero = w.new_empty(fmt.groups(k), n), w.new_empty(fmt.groups(k), n)
    importance, r32, done = h.diagonal().to(w.dtype), r.to(w.dtype), 0
    for group in order:
        first, last = group * size, min(group * size + size, k)
        for start in range(first, last, block):
            stop = min(start + block, last)
            end = done + stop - start
            if start == first:
                if grid is None:
                    wanted = _corrected(w[first:last], error[:done], r, r32, done)
                    scale[group], zero[group] = (x[:, 0] for x in fit(wanted.T.contiguous(), fmt, importance[None, first:last]))
                else:
                    scale[group], zero[group] = grid[0][group], grid[1][group]
            part = _corrected(w[start:stop], error[:done], r, r32, done)
            s, z = scale[group], zero[group]
            codes[start:stop] = _rounded((part, _inverse(r[done:end, done:end], w.dtype), s, z), fmt)
            error[done:end] = w[start:stop] - codes[start:stop] * s
            done = end
    return Rounded(codes, scale, zero)


@replayed
def _rounded(tensors: tuple[Tensor, ...], fmt: IntFormat) -> Tensor:
    """Codes [G, N] of channels that are rounded one after the other.

    Args:
        tensors: the channels [G, N] as they take up the error of earlier ones, R^-1 of them [G, G], and their scale and zero point [N].
    """
    wanted, inverse, scale, zero = tensors
    left, found = wanted.clone(), torch.empty_like(wanted)
    for i, (value, share) in enumerate(zip(left.unbind(), (inverse / inverse.diagonal()[:, None]).unbind(), strict=True)):
        code = snap(torch.div(value, scale, out=found[i]), zero, fmt)
        left[i + 1 :].addr_(share[i + 1 :], torch.addcmul(value, code, scale, value=-1), alpha=-1)
    return found


def _corrected(w: Tensor, error: Tensor, r: Tensor, r32: Tensor, done: int) -> Tensor:
    """Channels [G, N] that come next, as they best take up the error of those before them."""
    if not done:
        return w.clone()
    end = done + len(w)
    owed = r32[:done, done:end].T @ error
    corrected: Tensor = _inverse(r[done:end, done:end], w.dtype).T.matmul(owed).add_(w)
    return corrected


def _inverse(r: Tensor, dtype: torch.dtype) -> Tensor:
    inverse: Tensor = torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=r.dtype, device=r.device), upper=True)
    return inverse.to(dtype)


def descend(w: Tensor, h: Tensor, fmt: IntFormat, start: Rounded, sweeps: int, scales: bool = True) -> Rounded:
    """Coordinate descent: each group's scale, then each of its channels' codes, set to what is best while all others stay.

    The objective never rises. Codes move as in QuantEase (https://arxiv.org/abs/2309.01885).

    Args:
        w: [K, N].
        h: [K, K].
        start: where to begin.
        sweeps: passes over all channels at most; it stops earlier where nothing moves.
        scales: whether scales move too.
    """
    k = len(w)
    size, h = fmt.group_size(k), h.to(w.dtype)
    codes, scale, zero = start.codes.clone(), start.scale.clone(), start.zero
    error = w - start.values(size)
    for _ in range(sweeps):
        moved = False
        for group, first in enumerate(range(0, k, size)):
            last = min(first + size, k)
            q, s, inside = codes[first:last], scale[group], h[first:last, first:last]
            before = error[first:last].clone()
            pull = h[first:last] @ error  # [G, N]: minus half of the gradient with respect to the group's values
            if scales:
                response = inside @ q
                step = half(s + (q * pull).sum(0) / (q * response).sum(0).clamp_min(1e-30))
                gain = (step - s) * (2 * (q * pull).sum(0) - (step - s) * (q * response).sum(0))
                step = torch.where(gain > 0, step, s) - s
                pull -= response * step
                s = scale[group] = s + step
            q.copy_(_moved((q, pull, inside, s, zero[group]), fmt))
            error[first:last] = w[first:last] - q * s
            moved = moved or not torch.equal(before, error[first:last])
        if not moved:
            break
    return Rounded(codes, scale, zero)


@replayed
def _moved(tensors: tuple[Tensor, ...], fmt: IntFormat) -> Tensor:
    """Codes [G, N], each set to what is best while all others stay, one after the other.

    Args:
        tensors: codes [G, N], the pull on them [G, N], H of their channels [G, G], their scale and zero point [N].
    """
    codes, pull, inside, scale, zero = tensors
    pull, found, steps = pull.clone(), torch.empty_like(codes), 1 / (inside.diagonal()[:, None] * scale)
    for i, (code, wish, step, column) in enumerate(zip(codes.unbind(), pull.unbind(), steps.unbind(), inside.unbind(), strict=True)):
        best = snap(torch.addcmul(code, wish, step, out=found[i]), zero, fmt)
        pull[i + 1 :].addr_(column[i + 1 :], (best - code).mul_(scale), alpha=-1)  # those before are made anew in the next sweep
    return found


def best_of(w: Tensor, moment: Tensor, found: Sequence[Rounded], size: int) -> Rounded:
    """Of every row what leaves the smallest error."""
    exact = moment.double()
    which = torch.stack([objective(w, one.values(size), exact) for one in found]).argmin(0)  # [N]
    codes, scale, zero = (torch.stack([getattr(one, part) for one in found]) for part in ("codes", "scale", "zero"))
    rows = torch.arange(w.shape[1], device=w.device)
    return Rounded(*(part[which, :, rows].T.contiguous() for part in (codes, scale, zero)))


def objective(w: Tensor, q: Tensor, h: Tensor) -> Tensor:
    """(w - q)^T H (w - q) of every row: [N] for w, q [K, N], in H's type."""
    error = (w - q).to(h.dtype)
    return (error * (h @ error)).sum(0)
