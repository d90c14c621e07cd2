"""Which activation an experts module applies between its projections, found by trying: propose and verify.

The module's own function is run on random numbers in float64 and compared with every candidate of
`moec.compiler.ops.expert_activation`. Equal on all of them means equal; none equal is an error that names the module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.ops import ACTIVATIONS, expert_activation


@dataclass(frozen=True)
class Activation:
    """Arguments of `expert_activation`."""

    activation: str
    limit: float = 0.0


def _limits(module: Any) -> Iterator[float]:
    """No limit, and every positive number that the module or its configuration holds under a name that says limit or clamp."""
    yield 0.0
    for owner in (module, getattr(module, "config", None)):
        for name, value in (vars(owner) if owner is not None else {}).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 and ("limit" in name or "clamp" in name):
                yield float(value)


def recognise(apply: Callable[[Tensor], Tensor], gated: bool, interleaved: bool, module: Any) -> Activation:
    """The activation that computes the same as `apply`.

    Args:
        apply: [S, 2F] -> [S, F] when gated, else [S, F] -> [S, F].
        gated: whether a gate half multiplies an up half.
        interleaved: gate and up alternate along the last axis.
        module: where limits are looked for, and whose class an error names.

    Raises:
        MoecError: no candidate computes the same.
    """
    generator = torch.Generator().manual_seed(0)
    limits = sorted(set(_limits(module)))
    x = torch.randn(64, 16, dtype=torch.float64, generator=generator)
    x = torch.cat((x, x * 2 * max(limits))) if any(limits) else x  # values beyond every limit, so that a clamp shows
    laid_out = torch.stack(x.chunk(2, -1), -1).flatten(-2) if interleaved else x
    with torch.no_grad():
        expected = apply(laid_out)
    for rtol, atol in ((1e-9, 1e-12), (1e-5, 1e-6)):  # the second for modules that compute this in float32 whatever they are given
        for name in (*ACTIVATIONS, "swiglu_oai"):
            for limit in limits:
                if not gated and (limit or name == "swiglu_oai"):
                    continue
                found = expert_activation(x, activation=name, gated=gated, limit=limit)
                if found.shape == expected.shape and torch.allclose(found, expected.double(), rtol=rtol, atol=atol):
                    return Activation(name, limit)
    raise MoecError(
        f"{type(module).__name__}: the activation of its experts is none of {', '.join((*ACTIVATIONS, 'swiglu_oai'))}"
        " (with or without a limit); add it to moec.compiler.ops.ACTIVATIONS"
    )
