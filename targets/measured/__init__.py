"""Measured records: how long the kernels of an operator took on a target, with which options. A file holds one operator of one shape.

    targets/measured/<target>/<name>.json           the records that ship
    $MOEC_MEASURED, or ~/.local/share/moec/measured  one's own, of the same form; they come first

A record says which GPU, which TVM and which version of the kernels' sources it was measured with. Every measurement stays, not only the
best one: a sweep that was interrupted goes on where it stopped, and what one shape has taught orders the candidates of the next.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moec.runtime.errors import MoecError
from moec.runtime.strict_json import Fields, loads

__all__ = ["SHIPPED", "Measurement", "Record", "own_folder", "read_record", "read_records", "write_record"]

SHIPPED = Path(__file__).parent
VERSION = 1

Options = tuple[tuple[str, int], ...]
"""Names and values, sorted by name; a switch is 0 or 1."""


@dataclass(frozen=True)
class Measurement:
    """One timing.

    Args:
        kernel: what ran: one kernel, or the kernels of a whole operator.
        tokens: T.
        options: of the kernel.
        us: median microseconds.
        error: relative to float64, where it was checked.
    """

    kernel: str
    tokens: int
    options: Options
    us: float
    error: float | None = None


@dataclass(frozen=True)
class Record:
    """All timings of an operator of one shape on a target.

    Args:
        target: the name of the target.
        operator: such as `experts`.
        layer: what the operator works on, as JSON values.
        device: the GPU as its driver names it.
        tvm: the version of TVM that compiled the kernels.
        kernels: a fingerprint of the sources of each family of kernels.
        ceilings: what the device reached in the same run, such as `read_gb_s`.
        measurements: in the order in which they were made.
    """

    target: str
    operator: str
    layer: Mapping[str, Any]
    device: str
    tvm: str
    kernels: Mapping[str, str]
    ceilings: Mapping[str, float]
    measurements: tuple[Measurement, ...] = ()

    def add(self, *found: Measurement) -> Record:
        """The record with more measurements; one of the same kernel, tokens and options is replaced."""
        kept = {(m.kernel, m.tokens, m.options): m for m in (*self.measurements, *found)}
        return replace(self, measurements=tuple(kept.values()))

    def to_json(self) -> str:
        """The record as text, a measurement a line."""
        head = {
            "version": VERSION, "target": self.target, "operator": self.operator, "layer": dict(self.layer), "device": self.device,
            "tvm": self.tvm, "kernels": dict(self.kernels), "ceilings": dict(self.ceilings),
        }  # fmt: skip
        lines = [
            json.dumps({"kernel": m.kernel, "tokens": m.tokens, "options": dict(m.options), "us": round(m.us, 3)}
                       | ({} if m.error is None else {"error": float(f"{m.error:.2g}")}))
            for m in self.measurements
        ]  # fmt: skip
        body = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
        return "{\n" + body + '  "measurements": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n"


def own_folder() -> Path:
    """Where the records of this machine's user are."""
    asked = os.environ.get("MOEC_MEASURED")
    return Path(asked) if asked else Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "moec/measured"


def read_records(target: str, folders: Sequence[Path] | None = None) -> list[Record]:
    """The records of a target, those of the first folder first.

    Args:
        folders: each with a folder a target; the user's own and those that ship unless given.

    Raises:
        MoecError: a file is no record.
    """
    folders = (own_folder(), SHIPPED) if folders is None else folders
    return [read_record(path) for folder in folders for path in sorted((folder / target).glob("*.json"))]


def read_record(path: Path) -> Record:
    """The record in a file.

    Raises:
        MoecError: it cannot be read, or is no record.
    """
    where = f"measured record {path}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MoecError(f"{where}: cannot be read ({error})") from error
    fields = Fields(loads(content, where), where)
    if (version := fields.get("version", int)) != VERSION:
        fields.fail("version", f"{version} is not {VERSION}; measure again with `moec targets measure`")
    measurements = []
    for i, value in enumerate(fields.get("measurements", list)):
        m = Fields(value, f"{where}: measurements[{i}]")
        options = tuple(sorted((name, _count(m, name, n)) for name, n in m.get("options", dict).items()))
        off = float(m.get("error", float)) if "error" in m.values else None
        measurements.append(Measurement(m.text("kernel"), m.get("tokens", int), options, float(m.get("us", float)), off))
    return Record(
        fields.text("target"), fields.text("operator"), fields.get("layer", dict), fields.text("device"), fields.text("tvm"),
        {str(k): str(v) for k, v in fields.get("kernels", dict).items()},
        {str(k): float(v) for k, v in fields.get("ceilings", dict).items()}, tuple(measurements),
    )  # fmt: skip


def write_record(path: Path, record: Record) -> None:
    """Write a record, beside first and renamed then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(record.to_json())
    beside.replace(path)


def _count(fields: Fields, name: str, value: object) -> int:
    if not isinstance(value, int):
        fields.fail("options", f"{name}: expected an integer, got {value!r}")
    return int(value)
