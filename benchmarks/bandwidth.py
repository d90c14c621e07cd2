"""Memory bandwidth of this machine, the roofline that decode speeds are compared with.

    python -m benchmarks.bandwidth [--threads 1,2] [--mib 1024] [--repetitions 9] [--json]

read: dot product of a buffer with itself, bytes read. copy: buffer to buffer, bytes read plus bytes written (the cache
lines that a store fetches first are not counted). Each thread works on its own slice; buffers far exceed the caches.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Bandwidth:
    kind: str  # read or copy
    threads: int
    median_gb_s: float
    least_gb_s: float
    most_gb_s: float


def read(source: torch.Tensor, _target: torch.Tensor) -> None:
    torch.dot(source, source)


def copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)


# what runs, and how often each buffer byte crosses the memory bus
KINDS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], None], int]] = {"read": (read, 1), "copy": (copy, 2)}


def measure(kind: str, threads: int, nbytes: int, repetitions: int) -> Bandwidth:
    torch.set_num_threads(1)  # the pool below is the parallelism
    work, crossings = KINDS[kind]
    sources = torch.ones(nbytes // 4).chunk(threads)
    targets = torch.zeros(nbytes // 4).chunk(threads)  # written once, so that every page exists
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repetitions + 1):
            start = time.perf_counter()
            list(pool.map(work, sources, targets))
            rates.append(crossings * nbytes / (time.perf_counter() - start) / 1e9)
    rates = rates[1:]  # the first one warms up
    return Bandwidth(kind, threads, statistics.median(rates), min(rates), max(rates))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", default=",".join(str(t) for t in sorted({1, cores})), help="comma list")
    parser.add_argument("--mib", type=int, default=1024, help="buffer size")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    threads = [int(t) for t in options.threads.split(",")]
    results = [measure(kind, t, options.mib * 2**20, options.repetitions) for kind in KINDS for t in threads]
    if options.json:
        print(json.dumps({"bandwidths": [asdict(r) for r in results]}))
        return 0
    print("| kind | threads | GB/s (median) | least | most |\n|---|---|---|---|---|")
    for r in results:
        print(f"| {r.kind} | {r.threads} | {r.median_gb_s:.1f} | {r.least_gb_s:.1f} | {r.most_gb_s:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
