"""The driver's functions, with a library that notes how they are called, and arrays on their way to a GPU whose copies happen late."""

from __future__ import annotations

import ctypes
import gc
import threading
from typing import Any

import numpy as np
import pytest

from moec.runtime import cuda_upload
from moec.runtime.cuda import Driver
from moec.runtime.cuda_upload import upload
from moec.runtime.errors import MoecError
from moec.runtime.tvm_arrays import Array, aligned, places
from tests.targets.kernels.emulator.driver import EmulatedDriver


class Library:
    """NVIDIA's driver with one GPU, whose memory is the host's."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.memory: dict[int, Any] = {}
        self.fails: str | None = None

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.called.append(name)
            return 700 if name == self.fails else getattr(self, f"_{name}", lambda *_: 0)(*arguments)

        if name.startswith("_"):
            raise AttributeError(name)
        return call

    def _cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802  # NVIDIA's names, here and below
        count._obj.value = 1
        return 0

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, _: Any) -> int:  # noqa: N802
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0

    def _cuMemHostAlloc(self, pointer: Any, nbytes: Any, _: int) -> int:  # noqa: N802
        memory = ctypes.create_string_buffer(nbytes.value)
        pointer._obj.value = ctypes.addressof(memory)
        self.memory[ctypes.addressof(memory)] = memory
        return 0

    def _cuMemFreeHost(self, pointer: Any) -> int:  # noqa: N802
        del self.memory[pointer.value]
        return 0

    def _cuMemcpyHtoDAsync_v2(self, target: Any, source: Any, nbytes: Any, _: Any) -> int:  # noqa: N802
        ctypes.memmove(target.value, source.value, nbytes.value)
        return 0

    def _cuMemsetD8Async(self, target: Any, value: Any, nbytes: Any, _: Any) -> int:  # noqa: N802
        ctypes.memset(target.value, value.value, nbytes.value)
        return 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_: found)
    return found


def test_pinned_memory_and_marks_are_given_back(library: Library) -> None:
    driver = Driver("sm_90a", "model")
    part = driver.host_array(64)[8:16].view(np.int32)
    part[:] = 7
    event = driver.event()
    event.put(0)
    event.wait()
    gc.collect()
    assert len(library.memory) == 1
    assert "cuEventDestroy_v2" not in library.called
    del part, event
    gc.collect()
    assert library.memory == {}
    assert library.called[-1] == "cuEventDestroy_v2"


def test_each_thread_enters_once(library: Library) -> None:
    driver = Driver("sm_90a", "model")
    for _ in range(2):
        driver.enter()
    assert library.called.count("cuCtxSetCurrent") == 1
    thread = threading.Thread(target=driver.enter)
    thread.start()
    thread.join()
    assert library.called.count("cuCtxSetCurrent") == 2


def test_a_failure_says_which_function(library: Library) -> None:
    driver = Driver("sm_90a", "model")
    library.fails = "cuMemsetD8Async"
    with pytest.raises(MoecError, match=r"failed in cuMemsetD8Async: .*\(700\)"):
        driver.clear(0, 1, 0)


def some_arrays(seed: int) -> list[Array]:
    """Arrays of odd sizes and several types, some without numbers, one that is not contiguous, one read-only."""
    draw = np.random.default_rng(seed)
    shapes: list[tuple[int, ...]] = [(1,), (3, 5), (0, 4), (1000,), (257, 3), (2,), (64,)]
    arrays = [draw.integers(0, 100, shape).astype(dtype) for shape, dtype in zip(shapes, "BhifdqH", strict=True)]
    arrays += [draw.standard_normal((9, 7)).T, draw.integers(0, 2, 5) > 0]
    arrays[3].flags.writeable = False
    return arrays


def uploaded(driver: Driver, arrays: list[Array], piece: int) -> None:
    """Upload arrays and compare."""
    starts, size = places(arrays, 256)
    memory = aligned(size, np.uint8)
    upload(driver, memory.ctypes.data, arrays, starts, 0, piece)
    for array, start in zip(arrays, starts, strict=True):
        np.testing.assert_array_equal(memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape), array)


@pytest.mark.parametrize("piece", [16, 100, 256, 1000, 1 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_arrays_arrive_whatever_the_pieces(piece: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_upload, "THREADS", threads)
    monkeypatch.setattr(cuda_upload, "available_cores", lambda: threads)
    driver = EmulatedDriver()  # copies happen when somebody waits
    uploaded(driver, some_arrays(piece), piece)
    assert driver.log[-1] == "wait"


def test_arrays_go_through_the_driver(library: Library) -> None:
    uploaded(Driver("sm_90a", "model"), some_arrays(0), 512)
    gc.collect()
    assert library.memory == {}
    memory = np.full(9, 3, np.uint8)
    Driver("sm_90a", "model").clear(memory.ctypes.data + 2, 5, 0)
    assert memory.tolist() == [3, 3, 0, 0, 0, 0, 0, 3, 3]
