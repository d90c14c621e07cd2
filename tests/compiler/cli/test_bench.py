"""`moec bench` and what it measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moec.compiler.cli import bench
from moec.compiler.cli.main import main
from moec.runtime import Session
from moec.runtime.counters import ExpertCount
from moec.runtime.measure import Sample, measure_speed, peak_memory_bytes, read_bandwidth
from tests.runtime.fakes import fake_session, random_table

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session that `bench` loads whatever path it is given."""
    opened, _ = fake_session(tmp_path / "tiny.moec", random_table(vocab=4096), max_sequences=64)

    def load(path: str, **options: Any) -> Session:
        del options
        assert path == "tiny.moec"
        return opened

    monkeypatch.setattr(bench, "load", load)
    return opened


FIELDS = (
    "prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_ms", "load_ms", "peak_memory_bytes", "weight_bytes",
    "bytes_per_token", "experts_per_token", "roofline_fraction",
)  # fmt: skip


@pytest.fixture
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "read_bandwidth", lambda _threads: 1e10)


@pytest.mark.usefixtures("quick_bandwidth")
def test_bench_prints_its_figures_as_json(session: Session, capsys: Capture) -> None:
    assert main(["bench", "tiny.moec", "-p", "8", "-n", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [name for name in FIELDS if name not in result] == []
    bytes_per_token = 1000  # says the manifest
    assert result["roofline_fraction"] == pytest.approx(result["decode_tokens_per_s"] * bytes_per_token / 1e10)
    assert result["weight_bytes"] == session.artifact.manifest.weight_bytes
    assert len(result["results"]) == 1


@pytest.mark.usefixtures("quick_bandwidth", "session")
def test_bench_prints_one_markdown_table_of_all_combinations(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "close", lambda _self: None)
    assert main(["bench", "tiny.moec", "-p", "4,8", "-n", "2", "-b", "1,3", "-t", "1,2", "-r", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    assert [row[:4] for row in rows[2:]] == [[t, p, "2", b] for t in "12" for p in "48" for b in "13"]
    assert all("±" in cell for row in rows[2:] for cell in row[4:7])
    assert [bool(row[-1]) for row in rows[2:]] == [True, False] * 4  # one sequence only
    assert "10.0 GB/s (1 threads)" in lines[-1]


@pytest.mark.usefixtures("quick_bandwidth")
def test_bench_counts_experts(session: Session, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    counted = [ExpertCount("up", tokens=10, experts=25, slots=40, expert_bytes=200)]
    monkeypatch.setattr(session.executor, "counts", lambda **_options: counted)
    assert main(["bench", "tiny.moec", "-p", "8", "-n", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["experts_per_token"] == 2.5
    read = 1000 - 1.5 * 200  # what the manifest says, less what was skipped
    assert result["roofline_fraction"] == pytest.approx(result["decode_tokens_per_s"] * read / 1e10)


def test_bench_refuses_what_does_not_fit(session: Session, capsys: Capture) -> None:
    assert main(["bench", "tiny.moec", "-p", "60", "-n", "10"]) == 2
    assert "-p 60 -n 10: more than the context of 64 tokens" in capsys.readouterr().err


def test_speed_counts_the_tokens_that_ran(tmp_path: Path) -> None:
    opened, executor = fake_session(tmp_path / "a.moec", random_table(vocab=4096))
    speed = measure_speed(opened, prompt=5, new=7, batch=3, repetitions=1)
    assert executor.batches == [3] * 8 * 2  # a prefill and seven steps, one run to warm up and one that counts
    assert executor.sequences == {}
    assert speed.prefill_tokens_per_s.mean == pytest.approx(3 * 5 * 1e3 / speed.time_to_first_token_ms.mean)


def test_machine_figures_are_plausible() -> None:
    assert 1e8 < read_bandwidth(1, seconds=0) < 1e13
    assert 1e6 < peak_memory_bytes() < 1e13


def test_samples_print_mean_and_deviation() -> None:
    assert str(Sample.of([1.0, 2.0, 3.0])) == "2.00 ± 1.00"
    assert str(Sample.of([1234.5])) == "1234 ± 0"
