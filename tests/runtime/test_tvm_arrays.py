"""Tensors that lie in the memory of another one."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np

from moec.runtime.executors.tvm import load_runtime
from moec.runtime.ffi import tvm_ffi
from moec.runtime.tvm_arrays import Array, Placed, aligned, places

# What a failing program leaves behind lives until the interpreter has taken itself apart.
FAILING = """
import numpy as np
from moec.runtime.executors.tvm import load_runtime
from moec.runtime.ffi import tvm_ffi
from moec.runtime.tvm_arrays import Placed, aligned

def main():
    load_runtime()
    placed = [Placed(tvm_ffi.from_dlpack(aligned(256, np.uint8)), 64, (2, 3), np.float32)]
    placed += [placed, placed[0].tensor]  # a cycle
    raise SystemError("the end")

main()
"""


def test_where_arrays_lie_in_one_memory() -> None:
    arrays: list[Array] = [np.zeros(5, np.int64), np.zeros((0, 2), np.int32), np.zeros((3, 4), np.float32), np.ones(1, bool)]
    starts, size = places(arrays, 64)
    assert (starts, size) == ([0, 64, 64, 128], 192)
    assert places([], 64) == ([], 0)
    load_runtime()
    host = aligned(size, np.uint8)
    memory = tvm_ffi.from_dlpack(host)
    tensors = [Placed(memory, start, array.shape, array.dtype).tensor for array, start in zip(arrays, starts, strict=True)]
    gc.collect()  # a tensor does not need what made it, only the memory
    for tensor, array, start in zip(tensors, arrays, starts, strict=True):
        seen = np.from_dlpack(tensor)
        assert (seen.shape, seen.dtype) == (array.shape, array.dtype)
        if array.size:
            assert seen.ctypes.data == host.ctypes.data + start


def test_a_program_that_fails_ends_with_its_error() -> None:
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr[-300:]
    assert done.stderr.endswith("SystemError: the end\n")
