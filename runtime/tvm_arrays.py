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
