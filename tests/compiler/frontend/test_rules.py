"""Rules keep meaning: small random modules give the same numbers before and after they become graphs in normal form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moec.compiler.core_aten import unknown_ops
from moec.compiler.frontend.module import trace
from moec.compiler.interpreter import Interpreter


class Steps(nn.Module):
    """Random reshapes, transposes, cuts and arithmetic between two projections."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.choice = torch.randint(0, 8, (12,), generator=generator).tolist()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.scale = nn.Parameter(torch.randn(16, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)  # [B, T, 16]
        batch, tokens, _ = x.shape
        for step in self.choice:
            match step:
                case 0:
                    x = (x.view(batch, tokens, 4, 4).transpose(1, 2) * 2).transpose(1, 2).reshape(batch, tokens, 16)
                case 1:
                    x = x.reshape(-1, 16).square().mean(-1, keepdim=True).add(1e-5).rsqrt().view(batch, tokens, 1) * x * self.scale
                case 2:
                    low, high = x.chunk(2, -1)
                    x = torch.cat((-high, low), -1)
                case 3:
                    x = torch.stack((x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
                case 4:
                    x = x.unsqueeze(1).expand(batch, 3, tokens, 16).sum(1) / 3
                case 5:
                    x = torch.where(x > 0, x, x * 0.1).masked_fill(x.abs() < 1e-3, 0.0)
                case 6:
                    x = x.flatten(0, 1).softmax(-1).unflatten(0, (batch, tokens)) + x
                case 7:
                    pairs = torch.view_as_complex(x.reshape(batch, tokens, 8, 2).contiguous())
                    turn = torch.polar(torch.ones_like(pairs.real), pairs.real)
                    x = torch.view_as_real(pairs * turn).flatten(-2)
        result: Tensor = self.last(x)
        return result


@pytest.mark.parametrize("seed", range(12))
def test_random_modules_keep_their_meaning(seed: int) -> None:
    torch.manual_seed(seed)
    model = Steps(seed).eval()
    graph, weights = trace(model, {"x": torch.randn(3, 7, 16)}, {"x": {0: "B", 1: "T"}})
    assert not list(unknown_ops(graph))
    for shape in ((1, 1, 16), (2, 9, 16)):
        x = torch.randn(*shape)
        (found,) = Interpreter(graph, weights)(x=x)
        with torch.no_grad():
            assert torch.allclose(found, model(x), atol=1e-4)


class Route(nn.Module):
    """A router written in one of several ways."""

    def __init__(self, choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.choose = choose
        self.logits = nn.Linear(16, 8, bias=False)
        self.bias = nn.Parameter(torch.randn(8) * 0.1)
        self.up, self.down = nn.Parameter(torch.randn(8, 24, 16)), nn.Parameter(torch.randn(8, 16, 12))

    def forward(self, x: Tensor) -> Tensor:
        import moec

        weights, ids = self.choose(self.logits(x), self.bias)
        return moec.moe_experts(x, ids, weights, self.up, self.down)


def _plain(logits: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    return logits.softmax(-1).topk(2, -1)


def _after(logits: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    best, ids = logits.topk(2, -1)
    return best.softmax(-1) * 2.5, ids


def _biased(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    ids = (scores + bias).topk(2, -1).indices
    weights = scores.gather(-1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20), ids


def _none(logits: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(-1).topk(2, -1)
    return weights.sqrt(), ids  # no router has weights like these


@pytest.mark.parametrize(
    ("choose", "attrs"),
    [
        (_plain, {"top_k": 2, "score": "softmax", "normalize": False}),
        (_after, {"top_k": 2, "score": "softmax", "normalize": True, "scale": 2.5}),  # softmax of the chosen logits, times 2.5
        (_biased, {"top_k": 2, "score": "sigmoid", "normalize": True}),
        (_none, None),
    ],
)
def test_routers_are_found_by_what_they_compute(
    choose: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], attrs: dict[str, object] | None
) -> None:
    torch.manual_seed(0)
    model = Route(choose).eval()
    graph, weights = trace(model, {"x": torch.randn(3, 7, 16)}, {"x": {0: "B", 1: "T"}})
    found = [dict(n.attrs) for n in graph.nodes if n.op == "router"]
    assert found == ([attrs] if attrs else [])
    assert Counter(n.op for n in graph.nodes)["experts"] == 1
    x = torch.randn(2, 11, 16)
    (result,) = Interpreter(graph, weights)(x=x)
    with torch.no_grad():
        assert torch.allclose(result, model(x), atol=1e-4)
