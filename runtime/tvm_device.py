"""Where the TVM backend's code runs and its arrays lie: this machine's processor, or an NVIDIA GPU."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moec.runtime.cuda import Driver, Graph
from moec.runtime.errors import MoecError
from moec.runtime.ffi import tvm_ffi
from moec.runtime.tvm_functions import latest

_CPU, _CUDA, _POOLED = 1, 2, 2  # DLPack's kinds of device, and TVM's kind of allocator
_COMPILE = "tvm_callback_cuda_compile"
WARM = 2
"""Calls of one shape that run before a third is recorded: they load code and fill the allocator's pool."""

MOST_RECORDED = 64
"""Tokens of a call that is worth recording: of longer ones the kernels take longer than their launches."""

Array = NDArray[Any]


def aligned(shape: int | tuple[int, ...], dtype: Any) -> Array:
    """Zeros that start at a multiple of 64 bytes, as TVM's code takes for granted."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array: Array = raw[start : start + size].view(dtype).reshape(shape)
    return array


def as_tensor(array: Array) -> Any:
    """An array as TVM's tensor, without a copy where it is aligned."""
    if array.ctypes.data % 64 or not array.flags.c_contiguous:
        copy = aligned(array.shape, array.dtype)
        copy[...] = array
        array = copy
    if not array.flags.writeable:  # numpy would refuse to export it
        memory = (ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data)
        array = np.frombuffer(memoryview(memory), array.dtype).reshape(array.shape)
    return tvm_ffi.from_dlpack(array)


class Device(Protocol):
    """A device and its memory."""

    def start(self, library: Path) -> None:
        """Load the library's code."""
        ...

    def copy_bandwidth(self) -> float | None:
        """Bytes a second, read and written, of copies within its own memory; None where that is the host's."""
        ...

    def prepare(self) -> None:
        """Called before the calls of a thread."""
        ...

    def constant(self, array: Array) -> Any:
        """An array that stays as it is, as a tensor."""
        ...

    def mirror(self, array: Array) -> Any:
        """An aligned array of the host that changes, as a tensor."""
        ...

    def refresh(self, tensor: Any, array: Array) -> None:
        """Bring a mirror up to date."""
        ...

    def recall(self, tensor: Any, array: Array) -> None:
        """Bring an array up to date with its mirror, to which kernels write."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: str, first: Any | None) -> Any:
        """A tensor that begins with the rows of another one; the rest is zero."""
        ...

    def run(self, function: str, inputs: Sequence[Array], others: Sequence[Any]) -> NDArray[np.float32]:
        """Call a function of the library with aligned arrays and tensors, and return its result."""
        ...


class Host:
    """The processor: memory is shared with it, so nothing is copied."""

    def __init__(self) -> None:
        self._vm: Any = None

    def start(self, library: Path) -> None:
        self._vm = tvm_ffi.load_module(str(library))["vm_load_executable"]()
        self._vm["vm_initialization"](_CPU, 0, _POOLED)

    def prepare(self) -> None:
        pass

    def copy_bandwidth(self) -> float | None:
        return None

    def constant(self, array: Array) -> Any:
        return as_tensor(array)

    def mirror(self, array: Array) -> Any:
        return tvm_ffi.from_dlpack(array)

    def refresh(self, tensor: Any, array: Array) -> None:
        pass

    def recall(self, tensor: Any, array: Array) -> None:
        pass

    def zeros(self, shape: tuple[int, ...], dtype: str, first: Any | None) -> Any:
        array = aligned(shape, dtype)
        if first is not None:
            array[: first.shape[0]] = np.from_dlpack(first)
        return tvm_ffi.from_dlpack(array)

    def run(self, function: str, inputs: Sequence[Array], others: Sequence[Any]) -> NDArray[np.float32]:
        return np.array(np.from_dlpack(self._vm[function](*map(as_tensor, inputs), *others)))


class Gpu:
    """An NVIDIA GPU. Calls of few tokens are recorded the third time, and then replayed with one launch.

    Args:
        source_sha256, cubin: what code belongs to which source.
        driver: None where the GPU is emulated.
    """

    def __init__(self, source_sha256: str, cubin: bytes, driver: Driver | None) -> None:
        self._sha256, self._cubin, self.driver = source_sha256, cubin, driver
        self._device = tvm_ffi.device("cuda", 0)
        self._allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._copy = tvm_ffi.get_global_func("runtime.TVMTensorCopyFromTo")
        self._view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
        self._set_stream = tvm_ffi.get_global_func("runtime.Device_SetStream")
        self._sync = tvm_ffi.get_global_func("runtime.Device_StreamSync")
        self._stream = tvm_ffi.get_global_func("runtime.Device_StreamCreate")(self._device)
        self.stream = int(getattr(self._stream, "value", self._stream) or 0)
        self._vm: Any = None
        self._calls: dict[tuple[Any, ...], _Call] = {}
        self._pinned: dict[int, Array] = {}

    def start(self, library: Path) -> None:
        self.prepare()
        with self._compiled():
            self._vm = tvm_ffi.load_module(str(library))["vm_load_executable"]()
            self._vm["vm_initialization"](_CUDA, 0, _POOLED, _CPU, 0, _POOLED)

    @contextlib.contextmanager
    def _compiled(self) -> Iterator[None]:
        """While the library is loaded, TVM asks for the machine code of its CUDA source."""
        before = tvm_ffi.get_global_func(_COMPILE, allow_missing=True)

        def find(source: Any) -> bytes:
            text = source if isinstance(source, bytes) else str(source).encode()
            if hashlib.sha256(text).hexdigest() != self._sha256:
                raise MoecError("the library's kernels are not those of the machine code beside it: compile the artifact again")
            return self._cubin

        tvm_ffi.register_global_func(_COMPILE, find, override=True)
        try:
            yield
        finally:
            if before is None:
                tvm_ffi.remove_global_func(_COMPILE)
            else:
                tvm_ffi.register_global_func(_COMPILE, before, override=True)

    def prepare(self) -> None:
        self._set_stream(self._device, self._stream)

    def copy_bandwidth(self) -> float | None:
        return None if self.driver is None else self.driver.copy_bandwidth()

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """A tensor whose numbers are yet to come."""
        return self._allocate(tvm_ffi.Shape(tuple(shape)), tvm_ffi.dtype(str(np.dtype(dtype))), self._device, None)

    def _move(self, source: Any, target: Any) -> None:
        """Copy between tensors, after all that was called before, and before all that comes.

        TVM copies on the default stream, for which calls on ours do not wait, nor it for them.
        """
        self._sync(self._device, self._stream)
        self._copy(source, target)
        self._sync(self._device, 0)

    def constant(self, array: Array) -> Any:
        tensor = self.empty(array.shape, array.dtype)
        if array.nbytes:
            self._move(as_tensor(array), tensor)
        return tensor

    mirror = constant

    def refresh(self, tensor: Any, array: Array) -> None:
        self._move(as_tensor(array), tensor)

    def recall(self, tensor: Any, array: Array) -> None:
        self._move(tensor, tvm_ffi.from_dlpack(array))

    def zeros(self, shape: tuple[int, ...], dtype: str, first: Any | None) -> Any:
        self._calls.clear()  # what was recorded has the old addresses
        tensor = self.empty(shape, dtype)
        done = first.shape[0] if first is not None else 0
        row = int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
        if first is not None:
            self._move(first, self.view(tensor, (done, *shape[1:]), dtype, 0))
        rest = self.view(tensor, (shape[0] - done, *shape[1:]), dtype, done * row)
        self._move(as_tensor(aligned((shape[0] - done, *shape[1:]), dtype)), rest)
        return tensor

    def run(self, function: str, inputs: Sequence[Array], others: Sequence[Any]) -> NDArray[np.float32]:
        key = (function, *(array.shape for array in inputs))
        if inputs[0].shape[0] > MOST_RECORDED:
            return _Call(self, function, inputs, others, few=False)(inputs)
        return latest(self._calls, key, lambda: _Call(self, function, inputs, others, few=True))(inputs)

    def call(self, function: str, *tensors: Any) -> Any:
        """Call a function of the library."""
        return self._vm[function](*tensors)

    def view(self, tensor: Any, shape: Sequence[int], dtype: Any, offset: int) -> Any:
        """Part of a tensor, from some byte on."""
        return self._view(tensor, tvm_ffi.Shape(tuple(shape)), tvm_ffi.dtype(str(np.dtype(dtype))), offset)

    def pinned(self, nbytes: int, driver: Driver) -> Array:
        """Memory of the host for results of a size; the next result of this size overwrites it."""
        if nbytes not in self._pinned:
            self._pinned[nbytes] = driver.host_array(nbytes)
        return self._pinned[nbytes]

    def fetch(self, tensor: Any) -> NDArray[np.float32]:
        """A tensor of float32 as an array of the host, once all before it is done."""
        found: NDArray[np.float32] = np.empty(tuple(int(n) for n in tensor.shape), np.float32)
        self._move(tensor, tvm_ffi.from_dlpack(found))
        return found


class _Call:
    """A function with memory of its own for inputs of certain shapes.

    A recorded call has its copies in it, to and from memory of the host that the GPU reaches: to run it again is one launch.
    """

    def __init__(self, gpu: Gpu, function: str, inputs: Sequence[Array], others: Sequence[Any], few: bool) -> None:
        self._gpu, self._function, self._others = gpu, function, others
        self._driver = gpu.driver if few else None
        ends = list(accumulate(-(-array.nbytes // 64) * 64 for array in inputs))
        staging = aligned(ends[-1], np.uint8) if self._driver is None else self._driver.host_array(ends[-1])
        starts = [0, *ends[:-1]]
        self._staged = [staging[at : at + x.nbytes].view(x.dtype).reshape(x.shape) for at, x in zip(starts, inputs, strict=True)]
        self._tensors = [gpu.empty(x.shape, x.dtype) for x in inputs]
        self._count = 0
        self._graph: Graph | None = None
        self._result: Any = None
        self._found: NDArray[np.float32] | None = None

    def __call__(self, inputs: Sequence[Array]) -> NDArray[np.float32]:
        for staged, array in zip(self._staged, inputs, strict=True):
            staged[...] = array
        if self._driver is None:
            for tensor, staged in zip(self._tensors, self._staged, strict=True):
                self._gpu.refresh(tensor, staged)
            return self._gpu.fetch(self._launch())
        self._count += 1
        if self._graph is None and self._count > WARM:
            self._result = None  # its memory is used again
            self._graph, self._found = self._driver.record(self._enqueue, self._gpu.stream)
        if self._graph is not None:
            self._graph.launch()
        else:
            self._found = self._enqueue()
        self._driver.wait(self._gpu.stream)
        assert self._found is not None
        return self._found.copy()

    def _enqueue(self) -> NDArray[np.float32]:
        """Copy, call and copy back on the stream, without waiting."""
        assert self._driver is not None
        for tensor, staged in zip(self._tensors, self._staged, strict=True):
            self._driver.copy_in(tensor.data_ptr(), staged, self._gpu.stream)
        self._result = self._launch()
        shape = tuple(int(n) for n in self._result.shape)
        found = self._gpu.pinned(4 * int(np.prod(shape)), self._driver).view(np.float32).reshape(shape)
        self._driver.copy_out(found, self._result.data_ptr(), self._gpu.stream)
        return found

    def _launch(self) -> Any:
        return self._gpu.call(self._function, *self._tensors, *self._others)
