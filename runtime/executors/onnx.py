"""Runs the artifact of the ONNX backend with ONNX Runtime.

The cache of a layer is one array [slots, HK, capacity, d] for all sequences, a slot each. GroupQueryAttention reads and extends it in
place: the same memory is bound as past and as present. Steps of one token of neighbouring slots run as one batch, longer steps
one after the other, in parts. Artifacts of standard operators have a cache a sequence instead, which each step copies. Artifacts for a GPU
say so in `provider`; their caches are in its memory (see `runtime.onnx_gpu`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.artifact import Artifact
from moec.runtime.counters import ExpertCounters
from moec.runtime.errors import MoecError
from moec.runtime.executor import Executor, Step, repeated
from moec.runtime.onnx_cache import Cache, CopiedCache, SharedCache
from moec.runtime.onnx_gpu import CPU, check_provider, check_started, device_cache, open_session
from moec.runtime.sampler import Best

if TYPE_CHECKING:
    import onnxruntime as ort

PART = 512
"""A longer prompt is fed in parts of so many tokens: attention holds the logits of all keys for each token that it is fed."""


def _session(artifact: Artifact, file: str, threads: int | None) -> ort.InferenceSession:
    """A session of one of the artifact's models."""
    import onnxruntime as ort

    needed, found = str(artifact.executor["onnxruntime"]), str(ort.__version__)
    if [int(part) for part in found.split(".")[:2]] < [int(part) for part in needed.split(".")]:
        raise MoecError(
            f"{artifact.folder}: needs onnxruntime >= {needed}, found {found}, whose operators are missing, slow or wrong: "
            f"pip install 'onnxruntime>={needed}'"
        )
    if (provider := str(artifact.executor.get("provider", CPU))) != CPU:
        check_provider(provider, str(artifact.folder), needed)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    try:
        session = open_session(artifact.path(file), options, provider)
    except Exception as error:  # onnxruntime's exceptions have no public base class
        raise MoecError(f"{artifact.folder}: onnxruntime {found} cannot load the model: {str(error).splitlines()[0]}") from error
    check_started(session, provider, str(artifact.folder))
    return session


def _cache(artifact: Artifact, threads: int | None, slots: int) -> Cache:
    """The caches of an artifact, with the session that extends them."""
    section, vocabulary, context = artifact.executor, artifact.manifest.vocab_size, artifact.manifest.context_length
    # A model that both run comes first: without a GPU the other cannot even be loaded, for reasons that would mislead.
    grow = _session(artifact, str(section["grow"]), threads) if "grow" in section else None
    session = _session(artifact, str(section["model"]), threads)
    if section["portable"]:
        return CopiedCache(session, section["cache"])
    if grow is not None:
        return device_cache(session, grow, section, vocabulary, context, slots)
    return SharedCache(session, section["cache"], vocabulary, context, slots)


class OnnxExecutor:
    """A model in ONNX Runtime. See `Executor`."""

    counters: ExpertCounters | None = None  # ONNX Runtime's operators do not count
    portion = 1

    def __init__(self, artifact: Artifact, threads: int | None, max_sequences: int) -> None:
        self.vocab_size, self.context_length = artifact.manifest.vocab_size, artifact.manifest.context_length
        self.max_sequences = max_sequences
        self._cache = _cache(artifact, threads, max_sequences)
        self._slots: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0

    def add(self) -> int:
        """Start an empty sequence in the lowest free slot."""
        if len(self._slots) >= self.max_sequences:
            raise MoecError(f"{self.max_sequences} sequences are open already: remove one, or load with a larger max_sequences")
        taken = set(self._slots.values())
        slot = next(s for s in range(self.max_sequences) if s not in taken)
        handle, self._next = self._next, self._next + 1
        self._cache.truncate(slot, 0)
        self._slots[handle], self._lengths[handle] = slot, 0
        return handle

    def remove(self, sequence: int) -> None:
        """Give a slot back."""
        self._cache.truncate(self._slots.pop(sequence), 0)
        del self._lengths[sequence]

    def length(self, sequence: int) -> int:
        """Tokens that the sequence holds."""
        return self._lengths[sequence]

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens."""
        if not 0 <= length <= self._lengths[sequence]:
            raise ValueError(f"cannot truncate a sequence of {self._lengths[sequence]} tokens to {length}")
        self._cache.truncate(self._slots[sequence], length)
        self._lengths[sequence] = length

    def forward(self, steps: Sequence[Step], all_logits: bool = False) -> NDArray[np.float32]:
        """Append tokens to sequences and return logits."""
        self._check(steps)
        for handle, tokens in steps:
            self._cache.reserve(self._slots[handle], self._lengths[handle] + len(tokens))
        if len(steps) == 1 and len(steps[0][1]) == 1:
            return self._step(*steps[0])
        results: dict[int, NDArray[np.float32]] = {}
        for batch in self._batches(steps):
            if len(batch) == 1:
                results[batch[0]] = self._in_parts(*steps[batch[0]], all_logits)
            else:
                results.update(zip(batch, self._run([steps[i] for i in batch], all_logits), strict=True))
        return np.concatenate([results[i] for i in range(len(steps))])

    def best(self, steps: Sequence[Step]) -> Best:
        """Append tokens to sequences and return the likeliest next ones."""
        return Best.of(self.forward(steps))

    def ahead(self, steps: Sequence[Step], count: int) -> Best:
        """Append tokens and those that are found."""
        return repeated(self, steps, count)

    def _step(self, handle: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """One token of one sequence: logits [1, V]."""
        logits = self._cache.step(self._slots[handle], self._lengths[handle], int(tokens[0]))
        self._lengths[handle] += 1
        return logits

    def _in_parts(self, handle: int, tokens: NDArray[np.int64], all_logits: bool) -> NDArray[np.float32]:
        """Tokens of one sequence, a part at a time: logits [R, V]."""
        parts = [next(self._run([(handle, tokens[at : at + PART])], all_logits)) for at in range(0, len(tokens), PART)]
        return np.concatenate(parts) if all_logits else parts[-1]

    def _check(self, steps: Sequence[Step]) -> None:
        if len({handle for handle, _ in steps}) != len(steps):
            raise ValueError("a sequence occurs twice in one forward")
        for handle, tokens in steps:
            if not len(tokens):
                raise ValueError("a step needs at least one token")
            if (total := self._lengths[handle] + len(tokens)) > self.context_length:
                raise MoecError(f"the sequence would have {total} tokens, more than the context of {self.context_length}")
            if len(wrong := tokens[(tokens < 0) | (tokens >= self.vocab_size)]):
                raise MoecError(f"token {wrong[0]} is outside of the vocabulary of {self.vocab_size}")

    def _batches(self, steps: Sequence[Step]) -> Iterator[list[int]]:
        """Which steps run together: single tokens of neighbouring slots."""
        single = [i for i, (_, tokens) in enumerate(steps) if len(tokens) == 1 and self._cache.batches]
        yield from ([i] for i in range(len(steps)) if i not in single)
        batch: list[int] = []
        for i in sorted(single, key=lambda i: self._slots[steps[i][0]]):
            if batch and self._slots[steps[i][0]] != self._slots[steps[batch[-1]][0]] + 1:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _run(self, steps: Sequence[Step], all_logits: bool) -> Iterator[NDArray[np.float32]]:
        """Run steps of equal size in neighbouring slots: logits [R, V] of each."""
        handles = [handle for handle, _ in steps]
        count = len(steps[0][1])
        ids = np.ascontiguousarray(np.stack([tokens for _, tokens in steps]), np.int64)
        positions = np.array([np.arange(self._lengths[h], self._lengths[h] + count) for h in handles], np.int64)
        rows = np.arange(0 if all_logits else count - 1, count, dtype=np.int32)
        feeds: dict[str, NDArray[Any]] = {"ids": ids, "positions": positions, "rows": rows}
        lengths = [self._lengths[h] + count for h in handles]
        logits = self._cache.run([self._slots[h] for h in handles], lengths, feeds)
        for handle, length in zip(handles, lengths, strict=True):
            self._lengths[handle] = length
        yield from logits


def load_executor(artifact: Artifact, threads: int | None, max_sequences: int) -> Executor:
    """The executor of an artifact. `threads`: None leaves the number to ONNX Runtime."""
    return OnnxExecutor(artifact, threads, max_sequences)
