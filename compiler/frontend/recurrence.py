"""Recurrences over tokens, which transformers writes as loops over chunks, traced as one operator.

A loop whose number of turns depends on the number of tokens is no graph. Functions of the names below, where a model's module has
one, are replaced while tracing, after they have been run on random numbers and found to compute what the replacement computes.
"""

from __future__ import annotations

import contextlib
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


REPLACED: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": _gated_delta_rule,
    "chunk_kimi_delta_attention": _gated_delta_rule,
}
"""Name of a function in a model's module -> what computes the same without a loop."""


def _agree(original: Callable[..., Any], replacement: Callable[..., Any], per_channel: bool) -> bool:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    shape = (2, 70, 4)  # beyond one chunk
    decay = -F.softplus(random(*shape, 8) if per_channel else random(*shape))
    arguments = (random(*shape, 8), random(*shape, 8), random(*shape, 6))
    for flag in (False, True):
        named = {"g": decay, "beta": torch.sigmoid(random(*shape)), "use_qk_l2norm_in_kernel": flag}
        with torch.no_grad():
            expected, found = original(*arguments, **named)[0], replacement(*arguments, **named)[0]
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
            for name, replacement in REPLACED.items():
                if (original := getattr(module, name, None)) is None or original is replacement:
                    continue
                if not _agree(original, replacement, per_channel="kimi" in name):
                    raise MoecError(f"{module.__name__}.{name} is not the recurrence that its name says")
                before.append((module, name, original))
                setattr(module, name, replacement)
        yield
    finally:
        for module, name, original in before:
            setattr(module, name, original)
