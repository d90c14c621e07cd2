"""Set the least important weights of experts to zero: Wanda with the routing weight inside (MoE-Pruner, https://arxiv.org/abs/2410.12013).

    S_ij = |W_ij| sqrt(mean over the expert's tokens of g^2 x_j^2)

Weights of one output row are compared with each other: the lowest share of them, or two of every four neighbours (2:4). Values stay in
their format; no kernel skips zeros yet, so that this costs quality and saves no bytes by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.factors import require_no_factors
from moec.compiler.layers import need_layers, require_values
from moec.compiler.model import Model
from moec.compiler.weights import Edit, WeightSource


@dataclass(frozen=True)
class SparsifyExperts:
    """Zeros among the weights of experts.

    Args:
        sparsity: the share of zeros in each row, or a pattern `n:m` (n of m neighbours stay, such as `2:4`); None leaves the model alone.
        weighted: tokens count by the square of their routing weight (False: Wanda as for dense layers).
    """

    sparsity: float | str | None = None
    weighted: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, str):
            match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", self.sparsity)
            if match is None or int(match[1]) > int(match[2]):
                raise MoecError(f"sparsify_experts: sparsity {self.sparsity!r}: expected a share such as 0.5, or n:m such as 2:4")
        elif self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise MoecError(f"sparsify_experts: sparsity {self.sparsity}: expected a share of at least 0 and below 1")

    def run(self, model: Model, context: Context) -> Model:
        if self.sparsity is None:
            return model
        require_no_factors(model.graph, "sparsify_experts")
        edits: dict[str, Edit] = {}
        for layer in need_layers(model.graph, "sparsify_experts"):
            require_values(model, [layer.up, layer.down], "sparsify_experts")
            found = context.statistics(model, "sparsify_experts").layer(layer.name)
            squares = (
                (found.weighted_input_square, found.weighted_hidden_square) if self.weighted else (found.input_square, found.hidden_square)
            )
            for name, square in zip((layer.up, layer.down), squares, strict=True):
                edits[name] = self._edit(model.weights, name, square.sqrt().float(), layer.count)
        return model.edited(model.graph, edits)

    def _edit(self, base: WeightSource, name: str, norm: Tensor, count: int) -> Edit:
        def one(expert: int) -> Tensor:
            weight = base.load(name, expert)
            return weight.masked_fill(~self.mask(weight.float().abs() * norm[expert]), 0.0)

        return lambda expert: torch.stack([one(e) for e in range(count)]) if expert is None else one(expert)

    def mask(self, score: Tensor) -> Tensor:
        """Which weights stay: bool [N, K], by scores [N, K]."""
        if isinstance(self.sparsity, str):
            n, m = map(int, self.sparsity.split(":"))
            padded = torch.nn.functional.pad(score, (0, -score.shape[1] % m), value=-1.0).unflatten(1, (-1, m))  # [N, K / m, m]
            kept = torch.zeros_like(padded, dtype=torch.bool).scatter_(2, padded.topk(n, 2).indices, value=True)
            return kept.flatten(1)[:, : score.shape[1]]
        assert self.sparsity is not None
        stay = score.shape[1] - int(self.sparsity * score.shape[1])
        return torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(stay, 1).indices, value=True)


PASS = SparsifyExperts
