"""The table of families as Markdown, and its place in a page: between the two comments `BEGIN` and `END`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moec.compiler.errors import MoecError

BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
NOTE = 120
"""The longest note, in characters."""

TITLES = {"tvm": "TVM", "onnx": "ONNX"}

Row = Mapping[str, Any]


def concise(message: str, limit: int = NOTE) -> str:
    """A message as one short line: without the graph's name and text, and without advice to who works on the compiler."""
    line = " ".join(message.split())
    line = re.sub(r"^(MoecError: )?(graph \w+: )?", "", line)
    line = re.split(r"[:,]? (?:first in: |in )?%\w| \(unhinted|; add it to |\. Add a row|!? For more information", line)[0].rstrip(" .:,;")
    line = line.replace("|", "/")
    return line if len(line) <= limit else line[: limit - 1].rsplit(" ", 1)[0].rstrip(" ,;:") + "…"


def note(row: Row, backends: Sequence[str]) -> str:
    """Why a row is not `yes` throughout, in one line of at most `NOTE` characters."""
    if row.get("state") and any(row.get(b, "yes") != "yes" for b in backends):
        failed = [f"{row['state']}: a state that the backends do not keep yet"]  # whatever their messages met first
    else:
        failed = [row[b] for b in backends if row.get(b, "yes") != "yes"]
    if row.get("step"):
        failed.append(row["stopped"])
    if row.get("note"):
        failed.insert(0, row["note"])
    elif row.get("traced") and not row["ok"]:
        failed.insert(0, f"differs by {row['error']:.0e}" if row.get("error") is not None else "the difference is not a number")
    if row.get("experts") == 0:
        failed.insert(0, "its layers have no experts")
    return concise("; ".join(dict.fromkeys(map(concise, failed))))


def table(rows: Sequence[Row], backends: Sequence[str]) -> str:
    """The table, by family."""
    lines = [
        f"| family | traced | largest difference | {' | '.join(f'{TITLES.get(b, b)} tokens' for b in backends)} | note |",
        f"|---|---|---|{'---|' * len(backends)}---|",
    ]
    lines += (line(row, backends) for row in sorted(rows, key=lambda r: str(r["family"])))
    return "\n".join(lines)


def line(row: Row, backends: Sequence[str]) -> str:
    """One row of the table."""
    error = row.get("error")
    cells = ["yes" if row.get("traced") else "no", "no" if error is None else f"{error:.0e}" if error else "0"]
    cells += ["yes" if row.get(b) == "yes" else "no" for b in backends]
    return f"| {row['family']} | {' | '.join(cells)} | {note(row, backends)} |"


def closing(rows: Sequence[Row], discovered: int, backends: Sequence[str]) -> str:
    """The counts, as a sentence."""
    tried = f"All {discovered} families" if len(rows) == discovered else f"{len(rows)} of the {discovered} families"
    through = "".join(f", {sum(r.get(b) == 'yes' for r in rows)} through {TITLES.get(b, b)}" for b in backends)
    equal = sum(bool(r.get("ok")) for r in rows)
    return f"{tried} that are discovered were tried: {equal} equal{through}. A family that stops at a backend stops at one clear error."


def block(rows: Sequence[Row], discovered: int, backends: Sequence[str]) -> str:
    """What stands between the comments."""
    return f"\n<details><summary>The table</summary>\n\n{table(rows, backends)}\n\n</details>\n\n{closing(rows, discovered, backends)}\n"


def replaced(page: str, text: str, where: str = "the page") -> str:
    """The page with `text` between its two comments.

    Raises:
        MoecError: the comments are not there once each, in this order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise MoecError(f"{where}: expected one line {BEGIN} and below it one line {END}; the table of families goes between them")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"
