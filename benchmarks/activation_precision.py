"""What activations in bfloat16 or E4M3 cost in prompts: perplexity, and the distance to the same model computed with float32.

    python -m benchmarks.activation_precision CHECKPOINT --data TEXT... [--kind bfloat16|fp8] [--context 512] [--tokens 8192] [--json]

The interpreter runs each window of a text twice. The second time what linear layers and experts multiply is rounded, hidden values of
experts too, as the CUDA kernels of many tokens do with `--activations`; logits, of tokens or of experts, are not. Everything else is
float32 both times. With `fp8` experts multiply E4M3 activations with a scale of each token and 128 columns, whatever their weights are;
linear layers have bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.cache_precision import command
from moec.compiler.errors import MoecError
from moec.compiler.interpreter import evaluate
from moec.compiler.ir import Node
from moec.compiler.model import Model
from moec.compiler.ops import expert_activation

KINDS = ("bfloat16", "fp8")
BLOCK, LARGEST = 128, 448.0


def as_e4m3(x: Tensor) -> Tensor:
    """x [..., K] in bfloat16, then in blocks of 128 columns as E4M3 times the scale with which the largest is 448."""
    wide = torch.nn.functional.pad(x.bfloat16().to(x), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30) / LARGEST
    rounded: Tensor = (wide / scale).to(torch.float8_e4m3fn).to(x) * scale
    return rounded.flatten(-2)[..., : x.shape[-1]]


def as_bfloat16(x: Tensor) -> Tensor:
    """Rounded to bfloat16."""
    return x.bfloat16().to(x)


class RoundedActivations:
    """An observer of a model's run that computes linear layers and experts from rounded activations."""

    def __init__(self, model: Model, kind: str) -> None:
        self.model, self._of_experts = model, as_e4m3 if kind == "fp8" else as_bfloat16

    def visit(self, node: Node, inputs: Sequence[Sequence[Tensor | None]]) -> Sequence[tuple[Tensor, ...]] | None:
        """See `Observer`."""
        users = self.model.graph.users.get(node.name, ())
        if node.op == "experts":
            return [(self._experts(node, each),) for each in inputs]
        if node.op != "linear" or not users or any(user.op == "router" for user in users):
            return None
        return [self._linear(node, each) for each in inputs]

    def _load(self, name: str, like: Tensor) -> Tensor:
        return self.model.weights.load(name).to(like)

    def _linear(self, node: Node, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        x = inputs[0]
        assert x is not None
        weights = [self._load(name, x) for name in node.inputs[1:] if name]
        return evaluate(node, [as_bfloat16(x), *weights], {}, x.dtype, x.device)

    def _experts(self, node: Node, inputs: Sequence[Tensor | None]) -> Tensor:
        x, ids, routing, *_ = inputs
        assert x is not None
        assert ids is not None
        assert routing is not None
        if any(node.inputs[7:]):
            raise MoecError(f"{node.name}: experts with low-rank factors have no kernels that round activations")
        up, down = (self._load(node.inputs[i], x) for i in (3, 4))
        biases = [self._load(name, x) if name else None for name in (*node.inputs[5:7], "", "")][:2]
        flat, ids, routing = self._of_experts(x).flatten(0, -2), ids.flatten(0, -2), routing.flatten(0, -2)
        result = torch.zeros_like(flat)
        for expert in ids[(ids >= 0) & (ids < len(up))].unique().tolist():
            token, slot = torch.where(ids == expert)
            h = flat[token] @ up[expert].T + (0 if biases[0] is None else biases[0][expert])
            h = self._of_experts(expert_activation(h, **node.attrs))
            h = h @ down[expert].T + (0 if biases[1] is None else biases[1][expert])
            result.index_add_(0, token, h * routing[token, slot, None])
        return result.view_as(x)


def main() -> None:
    command(__doc__, KINDS, RoundedActivations)


if __name__ == "__main__":
    main()
