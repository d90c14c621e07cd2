"""Where the TVM backend's code runs and its arrays lie: this machine's processor, or an NVIDIA GPU."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moec.runtime.cuda import Driver
from moec.runtime.cuda_upload import upload
from moec.runtime.errors import MoecError
from moec.runtime.ffi import tvm_ffi
from moec.runtime.tvm_arrays import Array, Placed, aligned, as_tensor, places
from moec.runtime.tvm_call import Ahead, Call
from moec.runtime.tvm_functions import in_turn, latest

_CPU, _CUDA, _POOLED = 1, 2, 2  # DLPack's kinds of device, and TVM's kind of allocator
_ALIGNED = 256
"""Bytes at whose multiples constants begin, as those do that are allocated one by one."""

_COMPILE = "tvm_callback_cuda_compile"

MOST_RECORDED = 64
"""Tokens of a call that is worth recording: of longer ones the kernels take longer than their launches."""


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

    def constants(self, arrays: Sequence[Array]) -> list[Any]:
        """Arrays that stay as they are, as tensors."""
        ...

    def staging(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An aligned array of the host, of zeros, for `mirror` and `send`."""
        ...

    def mirror(self, array: Array) -> Any:
        """An aligned array of the host that changes, as a tensor."""
        ...

    def refresh(self, tensor: Any, array: Array) -> None:
        """Bring a mirror up to date."""
        ...

    def send(self, tensor: Any, array: Array, begin: int, end: int) -> None:
        """Bring some elements of a mirror of what `staging` returned up to date for what is called next. They must stay until that is done.

        Args:
            begin, end: which elements, counted in the order of memory; others may come too.
        """
        ...

    def recall(self, tensor: Any, array: Array) -> None:
        """Bring an array up to date with its mirror, to which kernels write."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: str, first: Any | None) -> Any:
        """A tensor that begins with the rows of another one; the rest is zero."""
        ...

    def run(self, functions: Sequence[str], inputs: Sequence[Array], others: Sequence[Any]) -> NDArray[np.float32]:
        """Call a function of the library with aligned arrays and tensors, then others with what the one before returned."""
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

    def constants(self, arrays: Sequence[Array]) -> list[Any]:
        return [as_tensor(array) for array in arrays]

    def staging(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return aligned(shape, dtype)

    def mirror(self, array: Array) -> Any:
        return tvm_ffi.from_dlpack(array)

    def refresh(self, tensor: Any, array: Array) -> None:
        pass

    def send(self, tensor: Any, array: Array, begin: int, end: int) -> None:
        pass

    def recall(self, tensor: Any, array: Array) -> None:
        pass

    def zeros(self, shape: tuple[int, ...], dtype: str, first: Any | None) -> Any:
        array = aligned(shape, dtype)
        if first is not None:
            array[: first.shape[0]] = np.from_dlpack(first)
        return tvm_ffi.from_dlpack(array)

    def run(self, functions: Sequence[str], inputs: Sequence[Array], others: Sequence[Any]) -> NDArray[np.float32]:
        found = in_turn(lambda name, *arguments: self._vm[name](*arguments), functions, [*map(as_tensor, inputs), *others])
        return np.array(np.from_dlpack(found))


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
        self._calls: dict[tuple[Any, ...], Call] = {}
        self._aheads: dict[tuple[Any, ...], Ahead] = {}
        self._constants: list[Placed] = []
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
        if self.driver is not None:
            self.driver.enter()
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

    def constants(self, arrays: Sequence[Array]) -> list[Any]:
        if not arrays:
            return []
        starts, size = places(arrays, _ALIGNED)
        memory = self.empty((size,), np.uint8)
        found = [Placed(memory, at, array.shape, array.dtype) for at, array in zip(starts, arrays, strict=True)]
        self._constants += found
        if self.driver is not None:
            upload(self.driver, memory.data_ptr(), arrays, starts, self.stream)
        else:
            for array, place in zip(arrays, found, strict=True):
                if array.nbytes:
                    self._move(as_tensor(array), place.tensor)
        return [place.tensor for place in found]

    def staging(self, shape: tuple[int, ...], dtype: Any) -> Array:
        found = aligned(shape, dtype)
        if self.driver is not None:
            found = self.driver.host_array(max(found.nbytes, 1))[: found.nbytes].view(dtype).reshape(shape)
            found[...] = 0
        return found

    def mirror(self, array: Array) -> Any:
        tensor = self.empty(array.shape, array.dtype)
        self.refresh(tensor, array)
        return tensor

    def refresh(self, tensor: Any, array: Array) -> None:
        self._move(as_tensor(array), tensor)

    def send(self, tensor: Any, array: Array, begin: int, end: int) -> None:
        if self.driver is None:
            self.refresh(tensor, array)
        else:
            self.driver.copy_in(tensor.data_ptr() + begin * array.itemsize, array.reshape(-1)[begin:end], self.stream)

    def recall(self, tensor: Any, array: Array) -> None:
        self._move(tensor, tvm_ffi.from_dlpack(array))

    def zeros(self, shape: tuple[int, ...], dtype: str, first: Any | None) -> Any:
        self._calls.clear()  # what was recorded has the old addresses
        self._aheads.clear()
        tensor = self.empty(shape, dtype)
        done = first.shape[0] if first is not None else 0
        row = int(np.prod(shape[1:])) * np.dtype(dtype).itemsize
        if first is not None:
            self._move(first, self.view(tensor, (done, *shape[1:]), dtype, 0))
        if self.driver is not None:
            self.driver.clear(tensor.data_ptr() + done * row, (shape[0] - done) * row, self.stream)
        else:
            rest = self.view(tensor, (shape[0] - done, *shape[1:]), dtype, done * row)
            self._move(as_tensor(aligned((shape[0] - done, *shape[1:]), dtype)), rest)
        return tensor

    def run(self, functions: Sequence[str], inputs: Sequence[Array], others: Sequence[Any]) -> NDArray[np.float32]:
        key = (*functions, *(array.shape for array in inputs))
        if inputs[0].shape[0] > MOST_RECORDED:
            return Call(self, functions, inputs, others, few=False)(inputs)
        return latest(self._calls, key, lambda: Call(self, functions, inputs, others, few=True))(inputs)

    def ahead(
        self, function: str, order: Sequence[str], inputs: Mapping[str, Array], others: Sequence[Any], count: int
    ) -> NDArray[np.float32]:
        """Call a function, `best` and `ahead` of the library `count` times.

        Args:
            order: roles of the function's inputs, which `blocks` follow.
            inputs: by role; and `turn`, int32 (0, rows that are wanted).

        Returns:
            float32 [count, R, 3]: what `best` found.
        """
        key = (function, *(array.shape for array in inputs.values()))
        return latest(self._aheads, key, lambda: Ahead(self, function, order, inputs, others))(inputs, count)

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
