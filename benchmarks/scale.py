"""A large checkpoint on a small machine: peak memory of compiling, resuming after `kill -9`, and decoding speed.

    python -m benchmarks.scale CHECKPOINT -o OUT.moec [--recipe int4] [--kill-after 60]

Compiles in a process of its own, kills it after some seconds, runs the same command again, and reads from the work folder that no finished
weight file was written twice. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path


def finished(part: Path) -> dict[str, int]:
    """Finished weight files and their modification times, in nanoseconds."""
    return {p.name: p.stat().st_mtime_ns for p in (part / "weights").glob("*.safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--backend", default="tvm")
    parser.add_argument("--kill-after", type=float, default=60, help="seconds; 0: do not kill")
    args = parser.parse_args()
    command = [
        sys.executable, "-m", "moec", "compile", str(args.checkpoint), "-o", str(args.output),
        "--recipe", args.recipe, "--backend", args.backend,
    ]  # fmt: skip
    part = args.output.with_name(args.output.name + ".part")
    record: dict[str, object] = {"checkpoint_bytes": sum(p.stat().st_size for p in args.checkpoint.glob("*.safetensors"))}
    before: dict[str, int] = {}
    if args.kill_after:
        process = subprocess.Popen(command)
        time.sleep(args.kill_after)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = finished(part)
        record["killed_after_s"], record["files_finished_when_killed"] = args.kill_after, len(before)
    started = time.monotonic()
    subprocess.run(command, check=True)
    record["compile_s"] = round(time.monotonic() - started, 1)
    record["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 2)
    after = {p.name: p.stat().st_mtime_ns for p in (args.output / "weights").glob("*.safetensors")}
    record["files_written_twice"] = sum(after[name] != stamp for name, stamp in before.items())
    record["artifact_bytes"] = sum(p.stat().st_size for p in args.output.rglob("*") if p.is_file())
    print(json.dumps(record, indent=1))
    bench = [sys.executable, "-m", "moec", "bench", str(args.output), "-p", "128", "-n", "64", "-t", str(os.cpu_count())]
    subprocess.run(bench, check=True)


if __name__ == "__main__":
    main()
