"""Which model families work: a tiny random model of each, through the interpreter and both backends.

    python -m benchmarks.families [NAMES...] [--backends tvm,onnx] [-n 16] [--json FILE [--fresh]] [--limit SECONDS] [--readme README.md]

`largest difference`: of logits, the graph's interpreter against transformers' eager model in float32, at most 1e-4. A backend passes
when its float32 artifact gives the interpreter's greedy tokens, up to a place where the interpreter's two best logits are within 1e-4.
Each family runs in a process of its own with a time limit. With `--json` what was found is kept, and families that are there are
not run again (`--fresh` runs them all). `--readme` writes the table between the two comments of that page.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.families_readme import block, closing, line, replaced
from moec.compiler.errors import MoecError

LIMIT = 600.0
"""Seconds that one family may take."""

VERSIONS = ("transformers", "torch", "apache-tvm", "onnxruntime")


def isolated(command: Sequence[str], limit: float) -> str:
    """Run a command in a process group of its own; how it was stopped, or nothing if it ended well.

    The whole group is killed at the limit: compilers that the command started, too.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode == 0:
            return ""
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
    return f"ended with {process.returncode}: {lines[-1] if lines else 'no message'}"


def try_family(name: str, backends: Sequence[str], new_tokens: int, limit: float) -> dict[str, Any]:
    """The row of one family, from a process of its own."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.family_row", name, str(out), "--backends", ",".join(backends), "-n", str(new_tokens)]
        stopped = isolated(command, limit)
        row: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"family": name, "step": "start"}
    if row["step"]:
        where = {"start": "", "interpreter": " before the logits were compared"}.get(row["step"], f" in the {row['step']} backend")
        row["stopped"] = (stopped or "ended early") + where
    return row | {"seconds": round(time.perf_counter() - started, 1)}


def kept(path: Path | None, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of an earlier run with the same settings, by family."""
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_text())
    return {row["family"]: row for row in found["rows"]} if found.get("settings") == settings else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--backends", default="tvm,onnx")
    parser.add_argument("-n", type=int, default=16)
    parser.add_argument("--json", type=Path, help="keep the rows here, and take those that are here already")
    parser.add_argument("--fresh", action="store_true", help="run families again although the file has them")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a family")
    parser.add_argument("--readme", type=Path, help="write the table into this page")
    args = parser.parse_args()
    from moec.compiler.frontend.tiny_models import families  # transformers takes seconds: not for --help

    backends, discovered = [b for b in args.backends.split(",") if b], list(families())
    if args.readme:
        replaced(args.readme.read_text(), "", str(args.readme))  # no place for the table is known before the work, not after
    settings = {"backends": backends, "tokens": args.n, "versions": {name: version(name) for name in VERSIONS}}
    rows = kept(args.json, settings)
    for name in args.names or discovered:
        if args.fresh or name not in rows:
            rows[name] = try_family(name, backends, args.n, args.limit)
            if args.json:
                args.json.write_text(json.dumps({"settings": settings, "rows": list(rows.values())}, indent=1) + "\n")
        print(line(rows[name], backends), flush=True)
    found = [row for name, row in rows.items() if name in discovered]
    print(f"\n{closing(found, len(discovered), backends)}")
    if args.readme:
        args.readme.write_text(replaced(args.readme.read_text(), block(found, len(discovered), backends), str(args.readme)))


if __name__ == "__main__":
    try:
        main()
    except MoecError as error:
        sys.exit(f"error: {error}")
