"""Files of measured records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moec.runtime.errors import MoecError
from moec.targets import known_targets
from moec.targets.measured import SHIPPED, Measurement, Record, own_folder, read_record, read_records, write_record

OPTIONS = st.dictionaries(st.sampled_from("abcd"), st.integers(0, 512)).map(lambda d: tuple(sorted(d.items())))
MEASUREMENTS = st.builds(
    Measurement, st.sampled_from(["up", "down"]), st.integers(1, 4096), OPTIONS,
    st.integers(1, 10**6).map(lambda n: n / 1000), st.sampled_from([None, 0.0028, 3e-06]),
)  # fmt: skip
RECORD = Record("box", "experts", {"experts": 4, "gate_up": ["a", "b"]}, "A GPU", "0.27", {"decode": "1"}, {"read_gb_s": 2960.0})


@settings(deadline=None)
@given(st.lists(MEASUREMENTS, max_size=5))
def test_what_is_written_is_read(found: list[Measurement]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        record = RECORD.add(*found)
        write_record(Path(folder, "x.json"), record)
        assert read_record(Path(folder, "x.json")) == record
        assert [path.name for path in Path(folder).iterdir()] == ["x.json"]


def test_a_new_timing_replaces_the_old_one() -> None:
    first, second = Measurement("up", 1, (("a", 1),), 5.0), Measurement("up", 2, (("a", 1),), 6.0)
    again = replace(first, us=4.0)
    assert RECORD.add(first, second).add(again).measurements == (again, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "moec targets measure"),
        ({"target": 3}, "target: expected a string"),
        (
            {"measurements": [{"kernel": "up", "tokens": 1, "options": {"a": "b"}, "us": 1.0}]},
            r"options: a: expected an integer",
        ),
        ({"measurements": [{"kernel": "up", "tokens": 1, "options": {}}]}, "us: missing"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(json.loads(RECORD.add(Measurement("up", 1, (), 1.0)).to_json()) | change))
    with pytest.raises(MoecError, match=message):
        read_record(path)


def test_own_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEC_MEASURED", str(tmp_path))
    assert own_folder() == tmp_path
    write_record(tmp_path / "box/x.json", RECORD)
    assert read_records("box") == [RECORD]


def test_records_that_ship_are_of_targets_and_in_their_folders() -> None:
    folders = [path for path in SHIPPED.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert {path.name for path in folders} <= set(known_targets())
    for folder in folders:
        for path in folder.iterdir():
            record = read_record(path)
            assert record.target == folder.name
            assert path.name.startswith(record.operator)
            assert record.to_json() == path.read_text(), "written by hand"
