"""Which function of a library a call takes, and what it is filled up with."""

from __future__ import annotations

import numpy as np
import pytest

from moec.runtime.tvm_functions import Functions, latest

SECTION = {
    "forward": {"tokens": None, "rows": None, "most": None},
    "decode": {"tokens": 1, "rows": 1, "most": 1},
    "forward48": {"tokens": None, "rows": None, "most": 48},
    "decode4": {"tokens": 4, "rows": 4, "most": 4},
}


@pytest.mark.parametrize(
    ("tokens", "rows", "exact", "name"),
    [
        (1, 1, False, "decode"), (2, 1, False, "decode4"), (4, 4, True, "decode4"), (4, 1, True, "forward48"), (3, 3, True, "forward48"),
        (5, 5, False, "forward48"), (48, 1, False, "forward48"), (49, 49, False, "forward"),
    ],
)  # fmt: skip
def test_the_smallest_that_takes_a_call(tokens: int, rows: int, exact: bool, name: str) -> None:
    assert Functions(SECTION).choose(tokens, rows, exact).name == name


def test_libraries_without_ranges() -> None:
    old = Functions({"decode": {"tokens": 1, "rows": 1}, "forward": {"tokens": None, "rows": None}})
    assert [old.choose(t, 1).name for t in (1, 2, 600)] == ["decode", "forward", "forward"]


def test_the_last_token_fills_a_call_up() -> None:
    arrays = {
        "ids": np.array([7, 8, 9]), "positions": np.array([5, 0, 1]), "rows": np.array([0, 2]),
        "blocks": np.array([[3, 0, 1, 5], [1, 1, 2, 0]]),
    }  # fmt: skip
    filled = Functions(SECTION).choose(3, 2).fill(arrays)
    assert filled["ids"].tolist() == [7, 8, 9, 9]
    assert filled["positions"].tolist() == [5, 0, 1, 1]
    assert filled["rows"].tolist() == [0, 2, 2, 2]
    assert filled["blocks"].tolist() == [[3, 0, 1, 5], [1, 1, 2, 0], [1, 3, 1, 1]]
    assert arrays["ids"].tolist() == [7, 8, 9]


def test_what_was_used_longest_ago_is_forgotten() -> None:
    kept = dict[str, int]()
    made = iter(range(10))
    for key in "abcabd":
        latest(kept, key, lambda: next(made), most=3)
    assert kept == {"a": 0, "b": 1, "d": 3}
