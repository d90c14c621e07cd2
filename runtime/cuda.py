"""NVIDIA's driver, called through ctypes: what GPU there is, memory for fast copies, and recorded calls ("graphs").

https://docs.nvidia.com/cuda/cuda-driver-api/
"""

from __future__ import annotations

import ctypes
import importlib.util
import statistics
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.errors import MoecError

LIBRARY = "libcuda.so.1"
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: other threads may do what they like meanwhile
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


class Driver:
    """The driver of the first GPU that this process may use.

    Args:
        arch: what the code is compiled for, such as `sm_90a`.
        what: the artifact, for messages.

    Raises:
        MoecError: there is no such GPU.
    """

    def __init__(self, arch: str, what: str) -> None:
        advice = "compile the model with --target cpu for this machine's processor"
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise MoecError(f"{what}: this artifact needs an NVIDIA GPU, and its driver ({LIBRARY}) is not found: {advice}") from error
        count = ctypes.c_int(0)
        if self._library.cuInit(0) or self._library.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
            raise MoecError(f"{what}: this artifact needs an NVIDIA GPU, and the driver finds none: {advice}")
        self._device = device = ctypes.c_int(0)
        self._thread, name = threading.local(), ctypes.create_string_buffer(100)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDeviceGetName", name, len(name), device)
        self.name = name.value.decode(errors="replace")
        found = [ctypes.c_int(0), ctypes.c_int(0)]
        for value, attribute in zip(found, (_MAJOR, _MINOR), strict=True):
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        self.capability = (found[0].value, found[1].value)
        if not runs_on(arch, self.capability):
            raise MoecError(
                f"{what}: its code is for {arch}, and this GPU ({self.name}) is sm_{found[0].value}{found[1].value}: "
                "compile the model with a --target of its kind (`moec targets`)"
            )

    def enter(self) -> None:
        """Let the calling thread use the GPU; other libraries do so for the threads that call them only."""
        if not hasattr(self._thread, "context"):
            context = ctypes.c_void_p()
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
            self._call("cuCtxSetCurrent", context)
            self._thread.context = context

    def _call(self, function: str, *args: Any) -> None:
        if status := getattr(self._library, function)(*args):
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise MoecError(f"the GPU's driver failed in {function}: {(text.value or b'').decode()} ({status})")

    def host_array(self, nbytes: int) -> NDArray[np.uint8]:
        """Memory of the host that the GPU copies to and from directly. It is given back with the last array that shows it."""
        pointer = ctypes.c_void_p()
        self._call("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(nbytes), 0)
        memory = (ctypes.c_uint8 * nbytes).from_address(pointer.value or 0)
        weakref.finalize(memory, self._library.cuMemFreeHost, pointer).atexit = False
        return np.frombuffer(memoryview(memory), np.uint8)

    def copy_in(self, device: int, host: NDArray[Any], stream: int) -> None:
        """Copy an array to the GPU; it must not change until the stream has come so far."""
        self._call("cuMemcpyHtoDAsync_v2", *self._copy(device, host.ctypes.data, host.nbytes, stream))

    def copy_out(self, host: NDArray[Any], device: int, stream: int) -> None:
        """Copy from the GPU into an array, which has the numbers once the stream has come so far."""
        self._call("cuMemcpyDtoHAsync_v2", *self._copy(host.ctypes.data, device, host.nbytes, stream))

    def clear(self, device: int, nbytes: int, stream: int) -> None:
        """Fill memory of the GPU with zeros."""
        self._call("cuMemsetD8Async", ctypes.c_uint64(device), ctypes.c_ubyte(0), ctypes.c_size_t(nbytes), ctypes.c_void_p(stream))

    def wait(self, stream: int) -> None:
        """Wait until all on a stream is done."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def event(self) -> Event:
        """A mark to put into a stream."""
        handle = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(handle), _NO_TIMING)
        weakref.finalize(event := Event(self._call, handle), self._library.cuEventDestroy_v2, handle).atexit = False
        return event

    def copy_bandwidth(self, nbytes: int = 1 << 30, repetitions: int = 10) -> float:
        """Bytes a second, read and written, of copies within the GPU's memory: the median of some."""
        memory, times = [ctypes.c_uint64(), ctypes.c_uint64()], []
        try:
            for pointer in memory:
                self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(nbytes))
            for _ in range(repetitions + 2):
                start = time.perf_counter()
                self._call("cuMemcpyDtoDAsync_v2", memory[0], memory[1], ctypes.c_size_t(nbytes), None)
                self._call("cuStreamSynchronize", None)
                times.append(time.perf_counter() - start)
        finally:
            for pointer in memory:
                self._library.cuMemFree_v2(pointer)
        return 2 * nbytes / statistics.median(times[2:])

    @staticmethod
    def _copy(target: int, source: int, nbytes: int, stream: int) -> tuple[Any, ...]:
        return ctypes.c_uint64(target), ctypes.c_uint64(source), ctypes.c_size_t(nbytes), ctypes.c_void_p(stream)

    def record(self, call: Callable[[], Any], stream: int) -> tuple[Graph, Any]:
        """Record what a call launches on the stream, without running it; also returns the call's result."""
        handle = ctypes.c_void_p(stream)
        graph = ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", handle, _RELAXED)
        try:
            result = call()
        finally:
            self._call("cuStreamEndCapture", handle, ctypes.byref(graph))
        executable = ctypes.c_void_p()
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        self._call("cuGraphDestroy", graph)
        return Graph(self, executable, handle), result

    def launch(self, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        self._call("cuGraphLaunch", executable, stream)

    def destroy(self, executable: ctypes.c_void_p) -> None:
        self._library.cuGraphExecDestroy(executable)


class Event:
    """A mark in a stream. One that was not put anywhere is reached."""

    def __init__(self, call: Callable[..., None], handle: ctypes.c_void_p) -> None:
        self._call, self._handle = call, handle

    def put(self, stream: int) -> None:
        """Put it behind all that a stream has to do so far."""
        self._call("cuEventRecord", self._handle, ctypes.c_void_p(stream))

    def wait(self) -> None:
        """Wait until the stream has come so far."""
        self._call("cuEventSynchronize", self._handle)


class Graph:
    """Recorded launches of kernels."""

    def __init__(self, driver: Driver, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        self._driver, self._executable, self._stream = driver, executable, stream

    def launch(self) -> None:
        """Run them once more."""
        self._driver.launch(self._executable, self._stream)

    def __del__(self) -> None:
        self._driver.destroy(self._executable)


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for an architecture runs on a GPU of this compute capability.

    >>> runs_on("sm_80", (8, 9)), runs_on("sm_90a", (9, 0)), runs_on("sm_90a", (10, 0)), runs_on("sm_89", (8, 6))
    (True, True, False, False)
    """
    digits = arch.removeprefix("sm_").rstrip("af")
    major, minor = int(digits[:-1]), int(digits[-1])
    exact = arch.endswith("a")
    return capability == (major, minor) if exact else capability[0] == major and capability[1] >= minor


def load_with_cudart(library: Path) -> None:
    """Load a library that needs NVIDIA's libcudart, which may lie in the package nvidia-cuda-runtime.

    Raises:
        MoecError: it is not found.
    """
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        return
    except OSError as error:
        reason = str(error)
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for found in sorted(Path(folder).glob("*/lib/libcudart.so.*"), reverse=True):
            ctypes.CDLL(str(found), ctypes.RTLD_GLOBAL)
            try:
                ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
                return
            except OSError as error:
                reason = str(error)
    raise MoecError(f"{library.name} cannot be loaded ({reason}): pip install nvidia-cuda-runtime, or install the CUDA toolkit")
