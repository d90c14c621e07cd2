"""SRP and SCH against their definitions, written as plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.compiler.calibration.locality import layer_locality, load_entropy


def slow_srp(ids: torch.Tensor, experts: int, m: int) -> tuple[float, float]:
    """The best F1 over thresholds, segment by segment; ids [W, T, K]."""
    uses = [
        int((window[at : at + m] == e).any(-1).sum()) for window in ids for at in range(window.shape[0] - m + 1) for e in range(experts)
    ]
    best = (-1.0, 0.0)
    for alpha in range(1, m + 1):
        tp = sum(f for f in uses if f >= alpha)
        fp = sum(m - f for f in uses if f >= alpha)
        fn = sum(f for f in uses if f < alpha)
        score = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
        if score > best[0] + 1e-12:
            best = (score, sum(f >= alpha for f in uses) / len(uses) * experts / ids.shape[2])
    return best


def slow_sch(ids: torch.Tensor, m: int, size: int) -> float:
    """Misses are loaded one by one; what is used least in the next m tokens goes, and among equals the last."""
    hits = total = 0
    for window in ids.tolist():
        cache: set[int] = set()
        for t, token in enumerate(window):
            hits += sum(e in cache for e in token)
            total += len(token)
            soon = {e: sum(e in later for later in window[t + 1 : t + 1 + m]) for e in {*cache, *token}}
            others = sorted(cache - set(token), key=lambda e: (-soon[e], e))
            cache = {*token, *others[: max(0, size - len(token))]}
    return hits / total


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(1, 2), st.integers(4, 12), st.integers(1, 4), st.integers(0, 999))
def test_against_plain_loops(experts: int, k: int, window: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(3 * window, experts, generator=generator).topk(k, 1).indices.to(torch.int16)
    found = layer_locality(ids, experts, window, m, caches=(1, 2))
    windows = ids.view(3, window, k)
    srp, active = slow_srp(windows, experts, m)
    assert found.srp == pytest.approx(srp)
    assert found.srp_experts == pytest.approx(active)
    for rho, rate in found.sch.items():
        if rho * k >= experts:  # everything stays: the first uses miss
            assert rate == pytest.approx(1 - sum(len(w.unique()) for w in windows) / ids.numel())
        elif rho == 1:  # no choice: only the last token's experts are there
            assert rate == pytest.approx(slow_sch(windows, m, k))
        else:
            assert rate == pytest.approx(slow_sch(windows, m, rho * k), abs=0.25)  # equals may go in another order


def test_extremes() -> None:
    same = torch.tensor([[0, 1]] * 64, dtype=torch.int16)
    found = layer_locality(same, 8, 32)
    assert found.srp == 1
    assert found.srp_experts == 1
    assert found.sch[1] == pytest.approx(1 - 2 / 32 / 2)  # two windows, whose first token misses
    skipped = torch.full((32, 2), -1, dtype=torch.int16)
    skipped[:, 0] = 3
    assert layer_locality(skipped, 8, 32).srp == 1
    assert load_entropy(torch.tensor([0.5, 0.5, 0.0, 0.0])) == pytest.approx(0.5)
