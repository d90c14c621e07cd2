"""What observers of a run share: a node's inputs in all batches as one table of tokens, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Inputs = Sequence[Sequence[Tensor | None]]
"""For every batch a node's inputs, as `moec.compiler.interpreter.Observer` is shown them."""


def rows(value: Tensor | None) -> Tensor:
    """A value [..., D] of one batch as [n, D]."""
    assert value is not None
    return value.reshape(-1, value.shape[-1])


def joined(inputs: Inputs, position: int) -> Tensor:
    """An input of all batches, one after the other: [N, ...]."""
    return torch.cat([rows(batch[position]) for batch in inputs])


def parted(result: Tensor, inputs: Inputs) -> list[tuple[Tensor, ...]]:
    """A result [N, D] for all tokens as each batch's, in the shape of its first input."""
    shapes = [batch[0].shape for batch in inputs if batch[0] is not None]
    parts = result.split([shape[:-1].numel() for shape in shapes])
    return [(part.view(shape),) for part, shape in zip(parts, shapes, strict=True)]
