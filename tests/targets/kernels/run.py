"""Running one CPU kernel on numpy arrays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from numpy.typing import NDArray
from tvm.target import Target

from moec.runtime.tvm_arrays import aligned
from moec.targets import get_target
from moec.targets.kernels.cpu.isa import Isa

TARGET = Target(json.loads(get_target("cpu").tvm))
ISA = Isa.of(TARGET)


class Kernel:
    """A compiled PrimFunc."""

    def __init__(self, func: Any) -> None:
        self._library = tvm.compile(func.with_attr("global_symbol", "kernel"), TARGET)
        self._function = self._library["kernel"]

    def __call__(self, *inputs: NDArray[Any], outputs: Sequence[tuple[tuple[int, ...], str]] = ()) -> list[NDArray[Any]]:
        """Call it with inputs (which it may change, if they are aligned), then new outputs of these shapes and types."""
        arrays = [*(self.aligned(x) for x in inputs), *(aligned(shape, np.dtype(dtype)) for shape, dtype in outputs)]
        self._function(*(tvm_ffi.from_dlpack(x) for x in arrays))
        return arrays[len(inputs) :]

    @staticmethod
    def aligned(x: NDArray[Any]) -> NDArray[Any]:
        """The array where TVM wants it."""
        if x.ctypes.data % 64 == 0 and x.flags.c_contiguous:
            return x
        copy = aligned(x.shape, x.dtype)
        copy[...] = x
        return copy
