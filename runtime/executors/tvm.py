"""The executor of the TVM backend: a Relax virtual machine over one shared library, and the pages of its attention caches.

It needs numpy, `tvm_ffi` and `libtvm_runtime.so`, which is looked for in $MOEC_TVM_RUNTIME, in an installed apache-tvm and
in the artifact (for a GPU also `libtvm_runtime_cuda.so` and NVIDIA's libcudart); the compiler itself is never imported.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moec.runtime.artifact import Artifact
from moec.runtime.counters import COUNTS, ExpertCounters
from moec.runtime.cuda import Driver, load_with_cudart
from moec.runtime.errors import MoecError
from moec.runtime.executor import Step, repeated
from moec.runtime.ffi import tvm_ffi
from moec.runtime.host import available_cores, physical_cores
from moec.runtime.sampler import Best
from moec.runtime.tvm_arrays import aligned
from moec.runtime.tvm_call import MOST_AHEAD
from moec.runtime.tvm_device import MOST_RECORDED, Device, Gpu, Host
from moec.runtime.tvm_functions import Functions
from moec.runtime.tvm_pages import Pages
from moec.runtime.tvm_steps import BLOCK, Batch, Calls, Inputs

RUNTIME = "libtvm_runtime.so"
CUDA_RUNTIME = "libtvm_runtime_cuda.so"
_LOADER = "ffi.Module.load_from_bytes.relax.VMExecutable"
"""A function that the library registers."""

CHUNK = 512
"""Tokens that one call computes at most, unless the library says otherwise: longer prompts are cut."""

PORTION = 8
"""Steps that a GPU runs before the host sees their tokens: a tenth of what the host adds to one step, and a stream still flows."""

LOGITS_BYTES = 1 << 26
"""Logits that one call may return."""


Result = TypeVar("Result")


def load_executor(artifact: Artifact, threads: int | None, max_sequences: int) -> TvmExecutor:
    """The executor of an artifact."""
    manifest, section = artifact.manifest, artifact.executor
    bundled = artifact.path(RUNTIME) if RUNTIME in manifest.files else None
    device = open_device(section, artifact.path, bundled, str(artifact.folder))
    library = artifact.path(str(section["library"]))
    return TvmExecutor(library, section, artifact.weights, manifest.vocab_size, manifest.context_length, threads, max_sequences, device)


def open_device(section: Mapping[str, Any], path: Callable[[str], Path], bundled: Path | None, what: str) -> Device:
    """What a library runs on, with TVM's runtime loaded.

    Args:
        section: what `TvmBackend.build` returned.
        path: where the files are that it wrote, by name.
        bundled: a copy of TVM's runtime to fall back on.
        what: the artifact, for messages.
    """
    gpu = section.get("cuda")
    driver = Driver(str(gpu["arch"]), what) if gpu else None
    load_runtime(bundled, section.get("tvm"))
    if not gpu:
        return Host()
    load_cuda_runtime(path(CUDA_RUNTIME))
    return Gpu(str(gpu["source_sha256"]), path(str(gpu["cubin"])).read_bytes(), driver)


def load_cuda_runtime(bundled: Path) -> None:
    """Load what TVM's runtime needs for NVIDIA GPUs, unless it is there.

    Raises:
        MoecError: it needs CUDA's runtime library, which is not found.
    """
    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is None:
        load_with_cudart(bundled)


def load_runtime(bundled: Path | None = None, version: str | None = None) -> None:
    """Load TVM's runtime library into the process, unless it is there: a second copy would end the process.

    Args:
        bundled: a copy to fall back on.
        version: the version of apache-tvm that compiled the library. An installed package of this version comes first, because its
            compiler, should the process import it later, brings the same file.

    Raises:
        MoecError: there is none.
    """
    if tvm_ffi.get_global_func(_LOADER, allow_missing=True) is not None:
        return
    os.environ.setdefault("TVM_BIND_THREADS", "0")  # two processes would be pinned to the same cores
    asked = os.environ.get("MOEC_TVM_RUNTIME")
    installed = _installed(version)
    found = next((path for path in ([Path(asked)] if asked else [installed, bundled]) if path is not None and path.is_file()), None)
    if found is None:
        where = f"$MOEC_TVM_RUNTIME is {asked}" if asked else "the package apache-tvm has it: pip install apache-tvm"
        raise MoecError(f"{RUNTIME} is not found: {where}, or set MOEC_TVM_RUNTIME to its path")
    ctypes.CDLL(str(found), ctypes.RTLD_GLOBAL)


def _installed(version: str | None) -> Path | None:
    """The library in an installed apache-tvm of this version."""
    try:
        if version is not None and metadata.version("apache-tvm") != version:
            return None
    except metadata.PackageNotFoundError:
        return None
    spec = importlib.util.find_spec("tvm")
    return next((Path(folder, "lib", RUNTIME) for folder in (spec.submodule_search_locations or ())), None) if spec else None


class TvmExecutor:
    """Executes a library of the TVM backend.

    Args:
        library: the shared library.
        section: what `TvmBackend.build` returned.
        weights: the stored arrays by (parameter, component).
        vocab_size, context_length: of the model.
        threads: threads to compute with, one for each core unless given.
        max_sequences: sequences that can be open at once.
        device: what computes, the processor unless given.
    """

    def __init__(
        self,
        library: Path,
        section: Mapping[str, Any],
        weights: Mapping[tuple[str, str], NDArray[np.generic]],
        vocab_size: int,
        context_length: int,
        threads: int | None = None,
        max_sequences: int = 8,
        device: Device | None = None,
    ) -> None:
        self.device = device or Host()
        self.vocab_size, self.context_length = vocab_size, context_length
        self._threads = threads or physical_cores()
        self._configured: set[int] = set()
        self._configure()
        self.device.start(library.resolve())
        self._mapped = [weights[param, component] for param, component in section["params"]]  # keeps the memory of the tensors alive
        layers = section.get("experts", ())
        counts = aligned((len(layers), COUNTS), np.int64)
        semaphores = int(section.get("semaphores", 0))
        constants = self.device.constants(self._mapped)
        counted = [self.device.mirror(row) for row in counts]
        shared = self.device.constants([aligned(semaphores, np.int32)] if semaphores else [])
        self._weights = tvm_ffi.convert([*constants, *counted, *shared])
        self.counters = self._counters(layers, counts, counted) if layers else None
        self._inputs, self._finds_best = list(section["inputs"]), bool(section.get("best"))
        self._calls, self._chunk = Calls(Functions(section["functions"]), self.counters), int(section.get("chunk", CHUNK))
        cached, page = str(section.get("cache_dtype", "float32")), int(section["page_tokens"])
        self._pages = Pages(section["page_shapes"], page, max_sequences, context_length, self.device, cached)
        self._gpu = self.device if section.get("ahead") and isinstance(self.device, Gpu) else None
        self.portion = PORTION if self._gpu is not None else 1

    def _counters(self, layers: Sequence[Mapping[str, Any]], counts: NDArray[np.int64], mirrors: Sequence[Any]) -> ExpertCounters:
        def each(act: Callable[[Any, NDArray[np.int64]], None]) -> None:
            self.device.prepare()
            for mirror, row in zip(mirrors, counts, strict=True):
                act(mirror, row)

        return ExpertCounters(layers, counts, lambda: each(self.device.recall), lambda: each(self.device.refresh))

    def add(self) -> int:
        """Start an empty sequence and return its handle."""
        return self._pages.add()

    def remove(self, sequence: int) -> None:
        """Forget a sequence and give its pages back."""
        self._pages.remove(sequence)

    def length(self, sequence: int) -> int:
        """Tokens that the sequence holds."""
        return self._pages.length(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first `length` tokens of a sequence."""
        if not 0 <= length <= self._pages.length(sequence):
            raise MoecError(f"truncate to {length}: the sequence has {self._pages.length(sequence)} tokens")
        self._pages.resize(sequence, length)

    def forward(self, steps: Sequence[Step], all_logits: bool = False) -> NDArray[np.float32]:
        """Append tokens to sequences and return logits, as `Executor.forward` says."""
        return self._forward(steps, all_logits, ())

    def best(self, steps: Sequence[Step]) -> Best:
        """Append tokens to sequences and return the likeliest next ones, as `Executor.best` says."""
        return Best.found(self._forward(steps, False, ("best",))) if self._finds_best else Best.of(self.forward(steps))

    def ahead(self, steps: Sequence[Step], count: int) -> Best:
        """Append tokens and those that are found, as `Executor.ahead` says: on a GPU without the host, where each step is one token."""
        few = 0 < len(steps) <= MOST_RECORDED and count <= MOST_AHEAD
        if self._gpu is None or not few or any(len(tokens) != 1 for _, tokens in steps):
            return repeated(self, steps, count)
        gpu = self._gpu

        def run(batch: Batch) -> Best:
            function, inputs = self._calls.single(batch, count)
            found = gpu.ahead(function, self._inputs, {**inputs, "turn": np.array([0, len(steps)], np.int32)}, self._others(), count)
            best = Best.found(found[:, : len(steps)].reshape(-1, 3))
            return Best(best.ids.reshape(count, -1), best.logprobs.reshape(count, -1))

        return self._extended(steps, count - 1, run)

    def _forward(self, steps: Sequence[Step], all_logits: bool, then: tuple[str, ...]) -> NDArray[np.float32]:
        """Run the model, and `then` other functions on what it computes."""
        width = 3 if then else self.vocab_size  # 3: of `best`

        def run(batch: Batch) -> NDArray[np.float32]:
            if batch.single and not all_logits and len(steps) <= self._chunk:
                function, inputs = self._calls.single(batch)
                return self._call((function, *then), inputs)[: len(steps)]
            out, done = np.empty((len(batch.ids) if all_logits else len(steps), width), np.float32), 0
            most = min(self._chunk, max(BLOCK, LOGITS_BYTES // (4 * self.vocab_size))) if all_logits else self._chunk
            for function, inputs, wanted in self._calls.any(batch, most, all_logits):
                out[done : done + wanted] = self._call((function, *then), inputs)[:wanted]
                done += wanted
            return out

        return self._extended(steps, 0, run) if steps else np.empty((0, width), np.float32)

    def _extended(self, steps: Sequence[Step], more: int, run: Callable[[Batch], Result]) -> Result:
        """What `run` returns, with room in each sequence for its step and `more` tokens; where it fails, sequences are as before."""
        batch = Batch.of(steps, self._pages, self.vocab_size, self.context_length, more)
        self._configure()
        self.device.prepare()
        try:
            self._pages.set_lengths(batch.rows, batch.after(more))
            return run(batch)
        except BaseException:
            self._pages.set_lengths(batch.rows, batch.before)
            raise

    def _call(self, functions: Sequence[str], inputs: Inputs) -> NDArray[np.float32]:
        return self.device.run(functions, [*(inputs[role] for role in self._inputs), inputs["blocks"]], self._others())

    def _others(self) -> list[Any]:
        return [self._pages.table(), *self._pages.pools, self._weights]

    def _configure(self) -> None:
        """Set the number of threads: TVM has a pool for each thread that calls it."""
        caller = threading.get_ident()
        if caller not in self._configured:
            # A pool is made with as many threads as the variable says, and cannot grow; calls use as many as it says then.
            os.environ["TVM_NUM_THREADS"] = str(max(self._threads, available_cores()))
            tvm_ffi.get_global_func("runtime.config_threadpool")(1, self._threads)
            self._configured.add(caller)
        os.environ["TVM_NUM_THREADS"] = str(self._threads)
