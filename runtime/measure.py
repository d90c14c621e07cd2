"""Measurements of a loaded model and of the memory that feeds it.

A decoded token reads the weights that it needs once, so tokens a second times bytes a token over the memory's read bandwidth tells
how near decoding is to what the machine can do: its roofline.
"""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moec.runtime.counters import experts_per_token, skipped_bytes_per_token
from moec.runtime.session import Session

_BANDWIDTH_BYTES = 1 << 28
"""More than caches hold, and little enough to allocate anywhere."""

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Sample:
    """A mean and the standard deviation of single runs."""

    mean: float
    sd: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Sample:
        """The statistics of some values."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)

    def __str__(self) -> str:
        digits = 0 if self.mean >= 1000 else 1 if self.mean >= 10 else 2
        return f"{self.mean:.{digits}f} ± {self.sd:.{digits}f}"


@dataclass(frozen=True)
class Speed:
    """What running a model cost. Tokens a second count all sequences of the batch.

    Attributes:
        experts_per_token: experts that ran for a decoded token in a layer, on average; None where the backend does not count.
        skipped_bytes_per_token: weight bytes of those that were chosen for a decoded token and skipped.
    """

    prefill_tokens_per_s: Sample
    decode_tokens_per_s: Sample
    time_to_first_token_ms: Sample
    experts_per_token: float | None
    skipped_bytes_per_token: float


def measure_speed(session: Session, prompt: int, new: int, batch: int, repetitions: int, seed: int = 0) -> Speed:
    """Run random prompts through a model, without tokenising or sampling, after a run to warm up.

    Args:
        session: the model.
        prompt: tokens of each prompt.
        new: tokens to decode after it.
        batch: sequences at once.
        repetitions: how many runs count.
        seed: for the tokens.
    """
    draw = np.random.default_rng(seed)
    executor = session.executor
    prefill, decode, first, ran, skipped = [], [], [], list[float](), list[float]()
    for repetition in range(repetitions + 1):
        handles = [executor.add() for _ in range(batch)]
        prompts = [(handle, draw.integers(0, executor.vocab_size, prompt)) for handle in handles]
        steps = [[(handle, draw.integers(0, executor.vocab_size, 1)) for handle in handles] for _ in range(new)]
        try:
            start = time.perf_counter()
            executor.forward(prompts)
            middle = time.perf_counter()
            executor.counts(reset=True)
            for step in steps:
                executor.forward(step)
            end = time.perf_counter()
        finally:
            for handle in handles:
                executor.remove(handle)
        if repetition:
            prefill.append(batch * prompt / (middle - start))
            first.append(1e3 * (middle - start))
            decode.append(batch * new / (end - middle))
            counts = executor.counts() or []
            ran += [mean] if (mean := experts_per_token(counts)) is not None else []
            skipped.append(skipped_bytes_per_token(counts))
    experts = statistics.fmean(ran) if ran else None
    return Speed(Sample.of(prefill), Sample.of(decode), Sample.of(first), experts, statistics.fmean(skipped))


def read_bandwidth(threads: int, seconds: float = 0.5) -> float:
    """Bytes a second that this machine reads from memory with so many threads: the median of as many runs as fit, at least three."""
    buffer = np.ones(_BANDWIDTH_BYTES // 8, np.int64)
    parts = np.array_split(buffer, threads)
    rates: list[float] = []
    end = time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while len(rates) < 4 or time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(np.maximum.reduce, parts))
            rates.append(buffer.nbytes / (time.perf_counter() - start))
    return statistics.median(rates[1:])  # the first starts the threads


def reset_peak_memory() -> None:
    """Start to count peak memory from what is used now (Linux; elsewhere the peak is the process's)."""
    gc.collect()
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return


def peak_memory_bytes() -> int:
    """The most memory that this process has held, its part of mapped weight files included."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
