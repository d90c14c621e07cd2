"""Recurrences over tokens, which transformers writes as loops over chunks, traced as one operator.

A loop whose number of turns depends on the number of tokens is no graph. Functions of the names below, where a model's module has
one, are replaced while tracing, after they have been run on random numbers and found to compute what the replacement computes.
"""

# ruff: noqa: N803  # the arguments are called as in the functions that are replaced

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.errors import MoecError

_TOLERANCE = 1e-4


def _gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *_: Any, use_qk_l2norm_in_kernel: bool = False, **__: Any
) -> tuple[Tensor, None]:
    """query and key [B, T, HK, d], value [B, T, H, dv], g (logarithm of decay) and beta [B, T, H]."""
    if use_qk_l2norm_in_kernel:
        query, key = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    scaled = query * query.shape[-1] ** -0.5
    return torch.ops.moec.linear_attention(scaled, key, value, g, beta), None


def _mamba2(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = (0.0, math.inf), **_: Any,
) -> Tensor:  # fmt: skip
    """hidden_states [B, T, H, P], dt [B, T, H], A and D [H], B and C [B, T, HK, N] -> [B, T, H, P]. https://arxiv.org/abs/2405.21060"""
    dt = (F.softplus if dt_softplus else torch.clone)(dt if dt_bias is None else dt + dt_bias)
    if dt_limit != (0.0, math.inf) or not dt_softplus:  # what softplus gives is positive
        dt = dt.clamp(*dt_limit)
    result: Tensor = torch.ops.moec.linear_attention(C, B, hidden_states * dt.unsqueeze(-1), A * dt, None)
    return result if D is None else result + D.unsqueeze(-1) * hidden_states


def _mamba(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, **_: Any,
) -> Tensor:  # fmt: skip
    """hidden_states, dt and z [B, I, T], A [I, N], B and C [B, N, T], D [I] -> [B, I, T]. https://arxiv.org/abs/2312.00752

    Every channel is a head with a value of size one, and all heads have the same keys and queries.
    """
    dt = dt if delta_bias is None else dt + delta_bias.unsqueeze(-1)
    dt = (F.softplus(dt) if delta_softplus else dt).transpose(1, 2).unsqueeze(-1)  # [B, T, I, 1]
    x = hidden_states.transpose(1, 2).unsqueeze(-1)  # [B, T, I, 1]
    q, k = (part.transpose(1, 2).unsqueeze(2) for part in (C, B))  # [B, T, 1, N]
    result: Tensor = torch.ops.moec.linear_attention(q, k, x * dt, dt * A, None).squeeze(-1).transpose(1, 2)
    result = result if D is None else result + hidden_states * D.unsqueeze(-1)
    return result if z is None else result * F.silu(z)


Trial = tuple[tuple[Any, ...], dict[str, Any]]
_B, _T, _H = 2, 70, 4  # beyond one chunk


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _delta_trials(per_channel: bool) -> Iterator[Trial]:
    shape = (_B, _T, _H)
    decay = -F.softplus(_random(*shape, 8) if per_channel else _random(*shape))
    for flag in (False, True):
        named = {"g": decay, "beta": torch.sigmoid(_random(*shape)), "use_qk_l2norm_in_kernel": flag}
        yield (_random(*shape, 8), _random(*shape, 8) + 0.1, _random(*shape, 6)), named


def _mamba2_trials() -> Iterator[Trial]:
    shape = (_B, _T, _H)
    parts = (_random(*shape, 6), _random(*shape), -_random(_H).exp(), _random(_B, _T, 2, 8), _random(_B, _T, 2, 8) + 0.1, 16)
    yield parts, {"D": _random(_H), "dt_bias": _random(_H), "dt_softplus": True}
    yield parts, {"dt_softplus": True, "dt_limit": (0.1, 0.9)}


def _mamba_trials() -> Iterator[Trial]:
    shape = (_B, 6, _T)
    parts = (_random(*shape), _random(*shape), -_random(6, 8).exp(), _random(_B, 8, _T), _random(_B, 8, _T) + 0.1)
    yield parts, {"D": _random(6), "z": _random(*shape), "delta_bias": _random(6), "delta_softplus": True}


REPLACED: dict[str, tuple[Callable[..., Any], Callable[[], Iterator[Trial]]]] = {
    "torch_chunk_gated_delta_rule": (_gated_delta_rule, lambda: _delta_trials(False)),
    "chunk_kimi_delta_attention": (_gated_delta_rule, lambda: _delta_trials(True)),
    "mamba2_chunk_scan": (_mamba2, _mamba2_trials),
    "mamba_selective_scan": (_mamba, _mamba_trials),
}
"""Name of a function in a model's module -> what computes the same without a loop, and arguments to try both with."""


def _agree(original: Callable[..., Any], replacement: Callable[..., Any], trials: Iterator[Trial]) -> bool:
    for arguments, named in trials:
        with torch.no_grad():
            expected, found = (f(*arguments, **named) for f in (original, replacement))
        if isinstance(expected, tuple):
            expected, found = expected[0], found[0]
        if expected.shape != found.shape or (expected - found).abs().max() > _TOLERANCE * expected.abs().max():
            return False
    return True


@contextlib.contextmanager
def without_loops(model: Any) -> Iterator[None]:
    """While this lasts, the model's recurrences are operators.

    Raises:
        MoecError: a function of a known name computes something else.
    """
    before: list[tuple[Any, str, Any]] = []
    try:
        for module in {sys.modules[type(m).__module__] for m in model.modules()}:
            for name, (replacement, trials) in REPLACED.items():
                if (original := getattr(module, name, None)) is None or original is replacement:
                    continue
                if not _agree(original, replacement, trials()):
                    raise MoecError(f"{module.__name__}.{name} is not the recurrence that its name says")
                before.append((module, name, original))
                setattr(module, name, replacement)
        yield
    finally:
        for module, name, original in before:
            setattr(module, name, original)
