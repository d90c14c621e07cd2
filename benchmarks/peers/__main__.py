"""Measure peers side by side.

    python -m benchmarks.peers MODEL [--peers NAME,...] [-p 128] [-n 64] [-t 2] [-r 3] [--rounds 2] [--json]

Peers take turns, `--rounds` times, so that a slow spell of the machine hits all of them. `others` is the share of
the machine's processor time that went to other programs during the measurement: with more than a few per cent, a
multi-threaded engine waits for its slowest thread and the number says little.
"""

import argparse
import importlib
import json
import os
import pkgutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import benchmarks.peers
from benchmarks.peers import PeerUnavailableError

NAMES = [m.name for m in pkgutil.iter_modules(benchmarks.peers.__path__) if m.name != "__main__"]


def machine_busy_s() -> float:
    """Processor seconds that the machine spent on anything since it started."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, Path("/proc/stat").read_text().split()[1:10])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_busy_s() -> float:
    return sum(os.times()[:4])  # with finished children


def measure(peer: str, options: argparse.Namespace) -> dict[str, Any]:
    """One turn of one peer, as a JSON object."""
    begin, machine, own = time.perf_counter(), machine_busy_s(), own_busy_s()
    module = importlib.import_module(f"benchmarks.peers.{peer}")
    runs = module.measure(options.model, options.prompt, options.new, options.threads, options.repetitions)
    elapsed = time.perf_counter() - begin
    others = max(0.0, machine_busy_s() - machine - (own_busy_s() - own)) / elapsed / (os.cpu_count() or 1)
    record: dict[str, Any] = {"peer": peer, "others": others}
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        values = [getattr(run, name) for run in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        record[name] = {"mean": statistics.mean(values), "stdev": spread, "runs": values}
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--peers", default=",".join(NAMES), help=f"comma list of {', '.join(NAMES)}")
    parser.add_argument("-p", "--prompt", type=int, default=128, metavar="TOKENS")
    parser.add_argument("-n", "--new", type=int, default=64, metavar="TOKENS")
    parser.add_argument("-t", "--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("-r", "--repetitions", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    peers = options.peers.split(",")
    if unknown := [peer for peer in peers if peer not in NAMES]:
        parser.error(f"unknown peer {unknown[0]!r}; choose from {', '.join(NAMES)}")
    if not (options.model / "config.json").is_file() and options.model.suffix != ".gguf":
        parser.error(f"{options.model} is no checkpoint folder (no config.json in it)")
    records: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        for peer in peers:
            try:
                records.append(measure(peer, options))
            except PeerUnavailableError as reason:
                print(f"skipped: {reason}", file=sys.stderr)
    if options.json:
        print(json.dumps({"model": options.model.name, "threads": options.threads, "records": records}))
        return 0
    print(f"| peer | prefill {options.prompt}, tokens/s | decode {options.new}, tokens/s | others |\n|---|---|---|---|")
    for record in records:
        prefill, decode = record["prefill_tokens_per_s"], record["decode_tokens_per_s"]
        speeds = " | ".join(f"{speed['mean']:.1f} ± {speed['stdev']:.1f}" for speed in (prefill, decode))
        print(f"| {record['peer']} | {speeds} | {record['others']:.0%} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
