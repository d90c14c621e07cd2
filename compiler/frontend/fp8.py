"""Checkpoints whose weights are 8-bit floating point with a scale for each block, as DeepSeek-V3: read as the values they stand for.

X.weight: F8_E4M3 [N, K], X.weight_scale_inv: F32 [ceil(N / 128), ceil(K / 128)]   ->   X.weight: float32 [N, K]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.compiler.errors import MoecError

Block = tuple[int, int]
"""Rows and columns of a block that has a scale."""

SCALE = "_scale_inv"
"""What the name of a weight's scales ends in."""

STORED = "F8_E4M3"


def block_of(data: Mapping[str, Any], path: Path) -> Block | None:
    """The blocks of a configuration's fp8 weights; None if it is of a checkpoint that is not quantised.

    Raises:
        MoecError: it is quantised in another way.
    """
    found = data.get("quantization_config")
    if not found:
        return None
    found = found if isinstance(found, dict) else {}
    method, block = found.get("quant_method", "?"), found.get("weight_block_size")
    sizes = isinstance(block, list) and len(block) == 2 and all(isinstance(size, int) and size > 0 for size in block)
    if method == "fp8" and block is not None and sizes and found.get("fmt", "e4m3") == "e4m3":
        return block[0], block[1]
    raise MoecError(
        f"{path}: the checkpoint is already quantised ({method}); start from the one in bf16, f16 or f32, or from one in fp8 (e4m3) with a "
        "weight_block_size"
    )


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """The shape of the scales of a weight [..., N, K]."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def values(codes: Tensor, scale: Tensor, block: Block) -> Tensor:
    """Codes [..., N, K] times the scales of their blocks, in float32."""
    n, k = codes.shape[-2:]
    spread = scale.float().repeat_interleave(block[0], -2)[..., :n, :].repeat_interleave(block[1], -1)[..., :k]
    return codes.float() * spread


def rows_of(scale: Tensor, first: int, block: Block) -> Tensor:
    """Of the scales of a matrix [N, K] those of one row."""
    return scale[torch.tensor([first // block[0]])]
