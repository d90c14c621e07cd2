"""Arrays of the host as tensors of TVM."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.ffi import tvm_ffi

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


class _DLTensor(ctypes.Structure):
    """https://dmlc.github.io/dlpack/latest/c_api.html"""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _DLTensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
"""DLPack's kinds of numbers."""

_libc = ctypes.CDLL(None)
_malloc = _libc.malloc
_malloc.restype, _malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def places(arrays: Sequence[Array], alignment: int) -> tuple[list[int], int]:
    """Where arrays lie one behind the other, each at a multiple of some bytes, and where the last one ends."""
    ends = list(accumulate(-(-array.nbytes // alignment) * alignment for array in arrays))
    return [0, *ends][: len(arrays)], [0, *ends][-1]


class Placed:
    """Part of the memory of a tensor, from some byte on, which `tensor` is of another shape and type.

    TVM's own views keep the tensor's address and have an offset beside it, which compiled functions refuse.
    """

    def __init__(self, memory: Any, start: int, shape: tuple[int, ...], dtype: Any) -> None:
        kind = np.dtype(dtype)
        self._memory, self._device = memory, tuple(map(int, memory.__dlpack_device__()))
        # What describes a tensor goes with the tensor, whenever that is: the C library, not Python, allocates it and takes it back.
        self._address = _malloc(ctypes.sizeof(_DLManagedTensor) + 8 * max(len(shape), 1))
        sizes = (ctypes.c_int64 * len(shape)).from_address(self._address + ctypes.sizeof(_DLManagedTensor))
        sizes[:] = list(shape)
        numbers = _CODES[kind.kind], 8 * kind.itemsize, 1
        extents = ctypes.cast(ctypes.addressof(sizes), ctypes.POINTER(ctypes.c_int64))
        tensor = _DLTensor(memory.data_ptr() + start, *self._device, len(shape), *numbers, extents, None, 0)
        managed = _DLManagedTensor(tensor, None, ctypes.cast(_libc.free, ctypes.c_void_p))
        ctypes.memmove(self._address, ctypes.byref(managed), ctypes.sizeof(managed))
        self.tensor = tvm_ffi.from_dlpack(self)
        """To be used as long as the memory is there, which this object keeps."""

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(self._address, b"dltensor", None)

    def __dlpack_device__(self) -> Any:
        return self._device
