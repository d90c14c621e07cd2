"""Random numbers of a seed: drawn on the CPU, so that they are the same wherever models run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """A source of random numbers, given on torch's default device."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Numbers from 0 to 1."""
        return torch.rand(*shape, generator=self._generator, device="cpu").to(torch.get_default_device())

    def normal(self, *shape: int) -> Tensor:
        """Numbers of mean 0 and variance 1."""
        return torch.randn(*shape, generator=self._generator, device="cpu").to(torch.get_default_device())

    def below(self, most: int, count: int) -> Tensor:
        """Whole numbers from 0 to most - 1."""
        return torch.randint(most, (count,), generator=self._generator, device="cpu").to(torch.get_default_device())
