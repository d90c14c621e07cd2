"""A driver for the emulated GPU, under which nothing is done until somebody waits for it: copies and kernels wait in one stream."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.runtime.cuda import Driver, Graph
from moec.runtime.tvm_arrays import aligned
from moec.runtime.tvm_device import Gpu
from tests.targets.kernels import emulator

Work = Callable[[], object]


class EmulatedDriver(Driver):
    """See above. What it counts are calls that the host makes.

    Attributes:
        log: what was called, in order: `copy_in`, `copy_out`, `launch`, `wait`, `record`, `clear`.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self._stream: list[Work] = []
        self._graphs: list[list[Work]] = []
        self._recorded: list[Work] | None = None

    def queue(self, work: Work) -> None:
        """Do something when its turn comes, or when the recording is launched that it belongs to."""
        (self._stream if self._recorded is None else self._recorded).append(work)

    def flush(self, until: Callable[[], bool] = lambda: False) -> None:
        """Do what is waiting, all of it or until something is so."""
        assert self._recorded is None, "a call that waits cannot be recorded"
        while self._stream and not until():
            self._stream.pop(0)()

    def enter(self) -> None:
        pass

    def host_array(self, nbytes: int) -> NDArray[np.uint8]:
        found: NDArray[np.uint8] = aligned(nbytes, np.uint8)
        found[...] = 0xA5  # nobody may rely on zeros
        return found

    def copy_in(self, device: int, host: NDArray[Any], stream: int) -> None:
        self.log.append("copy_in")
        self.queue(lambda: ctypes.memmove(device, host.ctypes.data, host.nbytes))

    def copy_out(self, host: NDArray[Any], device: int, stream: int) -> None:
        self.log.append("copy_out")
        self.queue(lambda: ctypes.memmove(host.ctypes.data, device, host.nbytes))

    def clear(self, device: int, nbytes: int, stream: int) -> None:
        self.log.append("clear")
        self.queue(lambda: ctypes.memset(device, 0, nbytes))

    def wait(self, stream: int) -> None:
        self.log.append("wait")
        self.flush()

    def event(self) -> Any:
        return _Event(self)

    def record(self, call: Callable[[], Any], stream: int) -> tuple[Graph, Any]:
        self.log.append("record")
        self._recorded = []
        try:
            result = call()
            self._graphs.append(self._recorded)
        finally:
            self._recorded = None
        return Graph(self, ctypes.c_void_p(len(self._graphs)), ctypes.c_void_p(stream)), result

    def launch(self, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        self.log.append("launch")
        for work in self._graphs[(executable.value or 0) - 1]:
            self.queue(work)

    def destroy(self, executable: ctypes.c_void_p) -> None:
        self._graphs[(executable.value or 0) - 1] = [_gone]


class _Event:
    """A mark in the stream."""

    def __init__(self, driver: EmulatedDriver) -> None:
        self._driver, self._reached = driver, True

    def put(self, stream: int) -> None:
        self._reached = False
        self._driver.queue(lambda: setattr(self, "_reached", True))

    def wait(self) -> None:
        self._driver.flush(until=lambda: self._reached)


def _gone() -> None:
    raise AssertionError("a recording was launched that is gone")


def driven(patch: pytest.MonkeyPatch) -> tuple[Gpu, EmulatedDriver]:
    """The emulated GPU with a driver: kernels and copies run late, as they may on a real one."""
    driver = EmulatedDriver()
    gpu = Gpu("", b"", driver)
    patch.setattr(emulator, "launched", driver.queue)
    sync = gpu._sync  # where the host waits without the driver

    def wait(*arguments: Any) -> None:
        driver.flush()
        sync(*arguments)

    setattr(gpu, "_sync", wait)  # noqa: B010  # a method, for mypy
    return gpu, driver
