"""The comparison with published bit-widths, on factors whose best bit-widths are found by trying everything."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from benchmarks import mc_moe_oracle


def best_bits(frequency: np.ndarray, weight: np.ndarray, loss: np.ndarray, budget: int) -> tuple[int, ...]:
    """The bit-widths of one layer by the formula, among those with a 2 and a 3."""
    phi, w = frequency / frequency.sum(), weight / weight.sum()
    allowed = [b for b in product((1, 2, 3), repeat=len(phi)) if sum(b) <= budget and {2, 3} <= set(b)]
    return min(allowed, key=lambda bits: sum(p * v**1.5 * loss[e][b - 1] for e, (p, v, b) in enumerate(zip(phi, w, bits, strict=True))))


def test_agrees_with_enumeration_and_says_where_it_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    factors: dict[str, dict[str, object]] = {"act_frequency": {}, "act_weight": {}, "quant_loss": {}, "published_bits_9bit": {}}
    for layer in map(str, range(4)):
        frequency, weight = rng.uniform(1, 3, (2, 5))
        loss = rng.lognormal(0, 1, (5, 1)) * np.array([8.0, 2.0, 0.5]) * rng.uniform(0.8, 1.2, (5, 3))
        bits = best_bits(frequency, weight, loss, 9)
        factors["act_frequency"][layer], factors["act_weight"][layer] = frequency.tolist(), weight.tolist()
        factors["quant_loss"][layer] = {str(e): {str(b + 1): loss[e, b] for b in range(3)} for e in range(5)}
        factors["published_bits_9bit"][layer] = {str(e): b for e, b in enumerate(bits if layer != "3" else bits[::-1])}
    path = tmp_path / "factors.json"
    path.write_text(json.dumps(factors))
    monkeypatch.setattr(sys, "argv", ["mc_moe_oracle", str(path)])
    mc_moe_oracle.main()
    assert capsys.readouterr().out == "9 bits a layer: 3 of 4 layers the same, 0 ties, 1 other\n"
