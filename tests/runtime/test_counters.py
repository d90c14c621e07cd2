"""The counters of experts: their figures in closed form, and through a session."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.runtime.counters import ExpertCount, ExpertCounters, by_layer, experts_per_token, skipped_bytes_per_token
from moec.runtime.errors import MoecError
from moec.runtime.executor import Step
from moec.runtime.measure import measure_speed
from tests.runtime.fakes import fake_session, random_table

LAYERS = [
    {"name": "layers.0.up", "experts_per_token": 4, "expert_bytes": 100},
    {"name": "layers.1.up", "experts_per_token": 2, "expert_bytes": 10},
]


def test_figures_by_hand() -> None:
    counters = ExpertCounters(LAYERS, np.array([[10, 25, 0], [5, 10, 0]]))
    found = counters.read()
    assert found == [ExpertCount("layers.0.up", 10, 25, 40, 100), ExpertCount("layers.1.up", 5, 10, 10, 10)]
    assert experts_per_token(found) == pytest.approx((2.5 + 2.0) / 2)
    assert skipped_bytes_per_token(found) == pytest.approx(1.5 * 100)
    counters.reset()
    assert [(c.tokens, c.experts, c.slots) for c in counters.read()] == [(0, 0, 0)] * 2
    assert experts_per_token(counters.read()) is None
    assert skipped_bytes_per_token(counters.read()) == 0


def test_a_session_reads_and_resets(tmp_path: Path) -> None:
    session, executor = fake_session(tmp_path / "a.moec", random_table())
    assert session.expert_counts() is None
    executor.counters = ExpertCounters(LAYERS[:1], np.array([[3, 7]]))
    assert session.expert_counts(reset=True) == [ExpertCount("layers.0.up", 3, 7, 12, 100)]
    assert session.expert_counts() == [ExpertCount("layers.0.up", 0, 0, 0, 100)]
    session.close()
    with pytest.raises(MoecError, match="closed"):
        session.expert_counts()


def test_speed_counts_decoded_tokens_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, executor = fake_session(tmp_path / "a.moec", random_table(vocab=4096))
    assert measure_speed(session, prompt=5, new=2, batch=1, repetitions=1).experts_per_token is None
    numbers, forward = np.zeros((1, 2), np.int64), executor.forward
    executor.counters = ExpertCounters(LAYERS[:1], numbers)

    def counting(steps: Sequence[Step], all_logits: bool = False) -> NDArray[np.float32]:
        tokens = sum(len(ids) for _, ids in steps)
        numbers[0] += (tokens, tokens * (4 if tokens > len(steps) else 3))  # all four in prefill, three in decoding
        return forward(steps, all_logits)

    monkeypatch.setattr(executor, "forward", counting)
    speed = measure_speed(session, prompt=5, new=6, batch=2, repetitions=2)
    assert (speed.experts_per_token, speed.skipped_bytes_per_token) == (3.0, 100.0)


def test_parts_of_a_layer_add_up() -> None:
    parts = [
        ExpertCount("layers.0.up.part0", 10, 25, 40, 100),
        ExpertCount("layers.0.up.part1", 10, 5, 40, 400),
        ExpertCount("layers.1.up", 10, 40, 40, 200),
    ]
    assert by_layer(parts) == [ExpertCount("layers.0.up", 10, 30, 40, 150), ExpertCount("layers.1.up", 10, 40, 40, 200)]
    assert experts_per_token(parts) == 3.5
    assert skipped_bytes_per_token(parts) == 150.0
