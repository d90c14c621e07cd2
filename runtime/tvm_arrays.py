"""Arrays of the host as tensors of TVM."""

from __future__ import annotations

import ctypes
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


_CODES = {"i": 0, "u": 1, "f": 2}
"""DLPack's kinds of numbers."""

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


_exported: dict[int, tuple[object, ...]] = {}
"""What is to live as long as an exported tensor, by the address of its description."""


def _delete(address: int) -> None:
    del _exported[address]


_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_delete)


class Placed:
    """Part of the memory of a tensor, from some byte on, which `tensor` is of another shape and type.

    TVM's own views keep the tensor's address and have an offset beside it, which compiled functions refuse.
    """

    def __init__(self, memory: Any, start: int, shape: tuple[int, ...], dtype: Any) -> None:
        self._memory, self._start, self._shape, self._kind = memory, start, shape, np.dtype(dtype)
        self.tensor = tvm_ffi.from_dlpack(self)

    def __dlpack__(self, **_: Any) -> Any:
        shape, numbers = (ctypes.c_int64 * len(self._shape))(*self._shape), (_CODES[self._kind.kind], 8 * self._kind.itemsize, 1)
        device = map(int, self.__dlpack_device__())
        tensor = _DLTensor(self._memory.data_ptr() + self._start, *device, len(self._shape), *numbers, shape, None, 0)
        managed = _DLManagedTensor(tensor, None, ctypes.cast(_deleter, ctypes.c_void_p))
        address = ctypes.addressof(managed)
        _exported[address] = managed, shape, self._memory
        return _new_capsule(address, b"dltensor", None)

    def __dlpack_device__(self) -> Any:
        return self._memory.__dlpack_device__()
