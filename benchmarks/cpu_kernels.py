"""CPU kernels beside what the machine can do: GB/s and GFLOP/s, with read bandwidth and multiply-add peak of the same run.

    python -m benchmarks.cpu_kernels [--threads 2] [--mcpu native] [--formats int4_g64,bf16] [--tokens 1,4,128] [--json]

Shapes are those of OLMoE-1B-7B. Weights are rotated through `--mib` MiB, so that they come from memory. Bandwidth and peak are
measured anew before each line. Times are the least of the repetitions: wall time, or CPU time with one thread, which other work on
the machine disturbs less.

`--kernels skip` decodes with some of the 8 slots skipped instead: the numbers of slots take turns, and each round gives a ratio to
its run of all slots; medians over `--rounds`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np
import tvm
from tvm.target import Target, codegen
from tvm.tirx.script import builder as T

from moec.targets.kernels.cpu import ExpertActivation, ExpertsLayout, Isa, LaneLayout, experts_func, linear_func
from moec.targets.kernels.cpu.emit import Register, argument, prim_func, splat, store, vector
from moec.targets.kernels.cpu.experts_layout import COUNTS
from moec.targets.kernels.cpu.isa import DOTS

LINEAR, HEAD = (2048, 2048), (50304, 2048)  # N, K
EXPERTS, TOP_K, D, F = 64, 8, 2048, 1024
READ_WORDS = 1 << 26  # 256 MiB


@dataclass(frozen=True)
class Result:
    """One kernel; fractions are of the bandwidth and of the peak measured just before it."""

    kernel: str
    format: str
    tokens: int
    us: float
    gb_s: float
    bandwidth_fraction: float
    gflop_s: float
    peak_fraction: float


@dataclass(frozen=True)
class Skips:
    """The decode step of a layer's experts: the slots that run, the median time, and the median ratio to the time of all slots."""

    format: str
    slots: int
    us: float
    share_of_all: float


class Machine:
    """Compiles for a target and times with a number of threads."""

    def __init__(self, mcpu: str, threads: int) -> None:
        self.target = Target({"kind": "llvm", "mcpu": mcpu})
        self.isa, self.threads = Isa.of(self.target), threads
        tvm.get_global_func("runtime.config_threadpool")(1, threads)
        self._buffer = tensor((READ_WORDS // 64, 64), "int32", 1)
        self._read, self._integer, self._float = (
            self.compile(f) for f in (self.read_func(), self.peak(integer=True), self.peak(integer=False))
        )

    def compile(self, func: Any) -> Callable[..., None]:
        """The function as a callable."""
        module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        found: Callable[..., None] = tvm.compile(module, target=self.target)["main"]
        return found

    def seconds(self, run: Callable[[], None], repetitions: int) -> float:
        """The least time of a call."""
        run()
        times = []
        for _ in range(repetitions):
            start = self.clock()
            run()
            times.append(self.clock() - start)
        return min(times)

    def clock(self) -> float:
        """Seconds, of which differences count."""
        return time.process_time() if self.threads == 1 else time.perf_counter()

    def bandwidth(self) -> float:
        """GB/s of reading memory on all threads."""
        out = tensor((self.threads, self.isa.lanes), "int32", 0)
        return 4 * READ_WORDS / self.seconds(lambda: self._read(self._buffer, out), 5) / 1e9

    def peak_gflop_s(self, *, integer: bool) -> float:
        """GFLOP/s of multiply-adds on registers, on all threads: the integer dot product or float32."""
        out = tensor((self.threads, self.isa.lanes), "int32" if integer else "float32", 0)
        run = self._integer if integer else self._float
        per_lane = 2 if integer else 1
        flops = 2 * per_lane * self.isa.lanes * self.threads * 12 * 500_000
        return flops / self.seconds(lambda: run(out), 3) / 1e9

    def read_func(self) -> Any:
        """Sums a buffer, a contiguous part on each thread."""
        lanes, rows = self.isa.lanes, READ_WORDS // 64

        def build() -> None:
            x, out = argument("x", (rows, 64), "int32"), argument("out", (self.threads, lanes), "int32")
            with T.parallel(self.threads) as thread:
                sums = [Register("int32", lanes) for _ in range(64 // lanes)]
                for register in sums:
                    register.clear()
                part = rows // self.threads
                with T.serial(part) as i:
                    for j, register in enumerate(sums):
                        register.set(register.get() + vector(x, thread * part + i, j * lanes, lanes=lanes))
                total = sums[0].get()
                for register in sums[1:]:
                    total = total + register.get()
                store(out, total, thread, 0, lanes=lanes)

        return prim_func(build)

    def peak(self, *, integer: bool) -> Any:
        """Independent multiply-adds on 12 registers."""
        lanes, dtype = self.isa.lanes, "int32" if integer else "float32"
        multiply_add = DOTS[self.isa.dot] if integer else lambda c, a, b, n: T.call_llvm_pure_intrin(f"float32x{n}", "llvm.fma", a, b, c)

        def build() -> None:
            out = argument("out", (self.threads, lanes), dtype)
            with T.parallel(self.threads) as thread:
                sums = [Register(dtype, lanes) for _ in range(12)]
                for register in sums:
                    register.clear()
                a = T.Bind(vector(out, thread, 0, lanes=lanes) + splat(1, dtype, lanes))
                with T.serial(500_000):
                    for register in sums:
                        register.set(multiply_add(register.get(), a, a, lanes))
                total = sums[0].get()
                for register in sums[1:]:
                    total = total + register.get()
                store(out, total, thread, 0, lanes=lanes)

        return prim_func(build)


def tensor(shape: tuple[int, ...], dtype: str, value: float | None) -> Any:
    """A constant tensor, or random bits."""
    if value is None:
        size = prod(shape) * np.dtype(dtype).itemsize
        return tvm.runtime.tensor(np.random.default_rng(0).integers(0, 256, size, np.uint8).view(dtype).reshape(shape))
    return tvm.runtime.tensor(np.full(shape, value, dtype))


def weight_sets(arrays: dict[str, tuple[tuple[int, ...], str]], nbytes: int, mib: int) -> list[list[Any]]:
    """Copies of a weight that fill `mib` MiB."""

    def fill(name: str, dtype: str) -> float | None:
        if dtype == "uint16":
            return 0x3C00
        return 0.01 if name.endswith(("scale", "values")) else None

    one = [tensor(shape, dtype, fill(name, dtype)) for name, (shape, dtype) in arrays.items()]
    copies = max(1, (mib << 20) // nbytes)
    return [one, *([tvm.runtime.tensor(a.numpy()) for a in one] for _ in range(copies - 1))]


def measure(machine: Machine, kernel: str, format: str, tokens: int, mib: int, repetitions: int) -> Result:
    """Time one kernel."""
    rng = np.random.default_rng(1)
    if kernel == "experts":
        layout = ExpertsLayout(EXPERTS, D, F, format, format)
        run = machine.compile(experts_func(layout, ExpertActivation(), machine.isa, tokens=1 if tokens == 1 else None, top_k=TOP_K))
        sets = weight_sets(layout.arrays(), layout.nbytes(), mib)
        choices = [np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)]) for _ in range(16)]
        touched = float(np.mean([np.unique(ids).size for ids in choices])) / EXPERTS * layout.nbytes()
        flops = 2 * tokens * TOP_K * 3 * D * F
        leads = [[tvm.runtime.tensor(ids), tensor((tokens, TOP_K), "float32", 0.125)] for ids in choices]
        k, n = D, D
    else:
        n, k = LINEAR if kernel == "linear" else HEAD
        plain = LaneLayout(n, k, format)
        run = machine.compile(linear_func(plain, tokens if tokens <= 8 else None, bias=False, isa=machine.isa))
        sets = weight_sets(plain.arrays(), plain.nbytes(), mib)
        touched, flops, leads = float(plain.nbytes()), 2 * tokens * n * k, [[]]
    x = tvm.runtime.tensor(rng.standard_normal((tokens, k), np.float32))
    out = tensor((tokens, n), "float32", 0)
    calls = max(len(sets), len(leads))
    arguments = [(x, *leads[i % len(leads)], *sets[i % len(sets)], out) for i in range(calls)]

    def run_all() -> None:
        for call in arguments:
            run(*call)

    bandwidth, peak = machine.bandwidth(), machine.peak_gflop_s(integer=LaneLayout(n, k, format).integer is not None)
    seconds = machine.seconds(run_all, repetitions) / calls
    gb_s, gflop_s = touched / seconds / 1e9, flops / seconds / 1e9
    return Result(kernel, format, tokens, seconds * 1e6, gb_s, gb_s / bandwidth, gflop_s, gflop_s / peak)


def measure_skips(machine: Machine, format: str, skips: list[int], mib: int, rounds: int) -> list[Skips]:
    """Time the decode step of a layer's experts with the last slots of every token skipped."""
    rng = np.random.default_rng(1)
    layout = ExpertsLayout(EXPERTS, D, F, format, format)
    run = machine.compile(experts_func(layout, ExpertActivation(), machine.isa, tokens=1, top_k=TOP_K, counted=True))
    sets = weight_sets(layout.arrays(), layout.nbytes(), mib)
    x, weights = tvm.runtime.tensor(rng.standard_normal((1, D), np.float32)), tensor((1, TOP_K), "float32", 0.125)
    counts, out = tensor((COUNTS,), "int64", 0), tensor((1, D), "float32", 0)
    choices = np.stack([rng.permutation(EXPERTS)[None, :TOP_K] for _ in range(32)])
    times: dict[int, list[float]] = {skipped: [] for skipped in (0, *skips)}
    for turn in range(rounds + 1):
        for skipped, found in times.items():
            ids = choices.copy()
            ids[:, :, TOP_K - skipped :] = EXPERTS
            calls = [(x, tvm.runtime.tensor(each), weights, *sets[i % len(sets)], counts, out) for i, each in enumerate(ids)]
            start = machine.clock()
            for call in calls:
                run(*call)
            if turn:  # the first warms up
                found.append((machine.clock() - start) / len(calls))
    shares = {skipped: [mine / whole for mine, whole in zip(found, times[0], strict=True)] for skipped, found in times.items()}
    return [Skips(format, TOP_K - n, 1e6 * statistics.median(times[n]), statistics.median(shares[n])) for n in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--mcpu", default="native")
    parser.add_argument("--kernels", default="linear,head,experts")
    parser.add_argument("--formats", default="int4_g64,int4_g64_asym,int3_g64,int2_g64,int8_g64,bf16,f32")
    parser.add_argument("--tokens", default="1,4,128")
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--skipped", default="2,4,6,8")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    mcpu = codegen.llvm_get_system_cpu() if options.mcpu == "native" else options.mcpu
    machine = Machine(mcpu, options.threads)
    if not options.json:
        print(
            f"{mcpu}, {machine.isa.name}, {options.threads} threads, read {machine.bandwidth():.1f} GB/s, "
            f"peak {machine.peak_gflop_s(integer=True):.0f} GFLOP/s integer, {machine.peak_gflop_s(integer=False):.0f} float32\n"
        )
        if options.kernels == "skip":
            print("| format | slots that run | us | of all |\n|---|---|---|---|")
        else:
            print("| kernel | format | tokens | us | GB/s (of read) | GFLOP/s (of peak) |\n|---|---|---|---|---|---|")
    if options.kernels == "skip":
        for weight_format in options.formats.split(","):
            for s in measure_skips(machine, weight_format, [int(n) for n in options.skipped.split(",")], options.mib, options.rounds):
                line = f"| {s.format} | {s.slots} | {s.us:.0f} | {s.share_of_all:.2f} |"
                print(json.dumps(asdict(s)) if options.json else line, flush=True)
        return
    for kernel in options.kernels.split(","):
        for weight_format in options.formats.split(","):
            for tokens in map(int, options.tokens.split(",")):
                r = measure(machine, kernel, weight_format, tokens, options.mib, options.repetitions)
                if options.json:
                    print(json.dumps(asdict(r)), flush=True)
                else:
                    print(
                        f"| {r.kernel} | {r.format} | {r.tokens} | {r.us:.0f} | {r.gb_s:.1f} ({r.bandwidth_fraction:.0%}) "
                        f"| {r.gflop_s:.0f} ({r.peak_fraction:.0%}) |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
