"""The table of families: what it says, where it goes, and that one family cannot hold up the others."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.families import isolated, kept
from benchmarks.families_readme import BEGIN, END, NOTE, block, closing, concise, line, note, replaced, table
from moec.compiler.errors import MoecError

BOTH = ("tvm", "onnx")


def row(family: str, **known: Any) -> dict[str, Any]:
    """A row that passes, but for what is given."""
    return {"family": family, "step": "", "traced": True, "ok": True, "note": "", "error": 0.0, "state": "", "experts": 4,
            "tvm": "yes", "onnx": "yes", **known}  # fmt: skip


def test_a_row_that_passes_needs_no_note() -> None:
    assert line(row("olmoe", error=4e-6), BOTH) == "| olmoe | yes | 4e-06 | yes | yes |  |"


def test_a_family_that_is_not_equal_passes_nowhere() -> None:
    failed = {"family": "x", "step": "", "traced": True, "ok": False, "note": "", "error": 3e-4}
    assert line(failed, BOTH) == "| x | yes | 3e-04 | no | no | differs by 3e-04 |"


def test_a_state_explains_both_backends_at_once() -> None:
    both = row("x", state="linear attention", tvm="linear_attention needs recurrent state: %a", onnx="graph x: 6 nodes mix tokens: %b")
    assert note(both, BOTH) == "linear attention: a state that the backends do not keep yet"


def test_a_stopped_family_says_where() -> None:
    stopped = {"family": "x", "step": "tvm", "traced": True, "ok": True, "error": 0.0, "stopped": "stopped after 5 s in the tvm backend"}
    assert line(stopped, BOTH) == "| x | yes | 0 | no | no | stopped after 5 s in the tvm backend |"


def test_a_model_without_experts_is_no_success_in_silence() -> None:
    assert note(row("x", experts=0), BOTH) == "its layers have no experts"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("MoecError: graph x: no lowering for a, first in: %q: f32[T] = a(%b). Add a row", "no lowering for a"),
        ("one\n two | three", "one two / three"),
        ("word " * 60, "word " * 22 + "word…"),
    ],
)  # fmt: skip
def test_messages_become_one_short_line(message: str, expected: str) -> None:
    assert concise(message) == expected
    assert len(concise(message)) <= NOTE


def test_rows_are_in_alphabetical_order_and_counted() -> None:
    rows = [row("b"), row("a", tvm="other tokens"), row("c", traced=False, ok=False, note="no", tvm="", onnx="", error=None)]
    assert [text.split(" | ")[0] for text in table(rows, BOTH).splitlines()[2:]] == ["| a", "| b", "| c"]
    assert closing(rows, 3, BOTH).startswith("All 3 families that are discovered were tried: 2 equal, 1 through TVM, 2 through ONNX.")
    assert closing(rows, 9, BOTH).startswith("3 of the 9 families that are discovered were tried")


def test_the_page_keeps_everything_else() -> None:
    page = f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n"
    text = block([row("olmoe")], 1, BOTH)
    once = replaced(page, text)
    assert once.startswith("before\n") and once.endswith("\nafter\n")
    assert "old" not in once and "| olmoe | yes |" in once
    assert replaced(once, text) == once


@pytest.mark.parametrize("page", ["no place", f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_the_place_is_refused(page: str) -> None:
    with pytest.raises(MoecError, match="page.md: expected one line <!-- families: begin -->"):
        replaced(page, "text", "page.md")


def test_the_readme_has_the_place() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    replaced(readme.read_text(), "")


def test_a_hanging_process_and_its_children_are_stopped(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(alive)!r}).touch()"
    hang = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert isolated([sys.executable, "-c", hang], 0.5) == "stopped after 0.5 s"
    time.sleep(2.5)
    assert not alive.exists()


def test_a_crash_is_a_reason() -> None:
    assert isolated([sys.executable, "-c", "raise SystemExit('out of luck')"], 20) == "ended with 1: out of luck"
    assert isolated([sys.executable, "-c", "import os; os.abort()"], 20).startswith("ended with -6")
    assert isolated([sys.executable, "-c", ""], 20) == ""


def test_kept_rows_are_those_of_the_same_settings(tmp_path: Path) -> None:
    path, settings = tmp_path / "rows.json", {"backends": ["tvm"], "tokens": 16}
    assert kept(path, settings) == {}
    path.write_text(json.dumps({"settings": settings, "rows": [row("a")]}))
    assert kept(path, settings) == {"a": row("a")}
    assert kept(path, {**settings, "tokens": 8}) == {}
