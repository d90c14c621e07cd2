"""A Mixture-of-Experts model that is no Transformer: a forecaster that routes each window of a time series to its experts.

    python -m examples.time_series_moe

It marks its experts with `moec.moe_experts`, is traced with any number of series and windows, and the graph's result is compared
with the module's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import moec


class Forecaster(nn.Module):
    """Windows of a series [B, T, W] -> the next values of each [B, T, N].

    Args:
        window: W, values that are seen.
        horizon: N, values that are predicted.
        size, hidden: D and F.
        experts, top_k: E and K.
    """

    def __init__(self, window: int = 24, horizon: int = 6, size: int = 32, hidden: int = 48, experts: int = 8, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.read = nn.Linear(window, size)
        self.norm = nn.LayerNorm(size)
        self.route = nn.Linear(size, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, size) * size**-0.5)
        self.up_bias = nn.Parameter(torch.randn(experts, hidden) * 0.1)
        self.down = nn.Parameter(torch.randn(experts, size, hidden) * hidden**-0.5)
        self.down_bias = nn.Parameter(torch.randn(experts, size) * 0.1)
        self.write = nn.Linear(size, horizon)

    def forward(self, series: Tensor) -> Tensor:
        level = series.mean(-1, keepdim=True)
        x = self.read(series - level)  # [B, T, D]
        h = self.norm(x)
        scores = torch.sigmoid(self.route(h))  # [B, T, E]
        weights, ids = scores.topk(self.top_k, -1)  # [B, T, K]
        weights = weights / weights.sum(-1, keepdim=True)
        x = x + moec.moe_experts(h, ids, weights, self.up, self.down, self.up_bias, self.down_bias, activation="gelu", gated=False)
        result: Tensor = self.write(x) + level
        return result


def main() -> None:
    from moec.compiler.frontend.module import trace
    from moec.compiler.interpreter import Interpreter
    from moec.compiler.text import print_graph

    torch.manual_seed(0)
    model = Forecaster().eval()
    graph, weights = trace(model, {"series": torch.randn(3, 7, 24)}, {"series": {0: "B", 1: "T"}})
    print(print_graph(graph))
    series = torch.randn(2, 50, 24)
    (found,) = Interpreter(graph, weights)(series=series)
    with torch.no_grad():
        print("largest difference to the module:", float((found - model(series)).abs().max()))


if __name__ == "__main__":
    main()
