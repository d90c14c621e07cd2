"""Calls of the TVM backend's code on a GPU, with memory of their own, which a driver can record."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.cuda import Graph
from moec.runtime.tvm_arrays import Array, Placed, aligned
from moec.runtime.tvm_functions import in_turn

if TYPE_CHECKING:
    from moec.runtime.tvm_device import Gpu

WARM = 2
"""Calls of one shape that run before a third is recorded: they load code and fill the allocator's pool."""


class Call:
    """A function with memory of its own for inputs of certain shapes, and perhaps others that get what it returns.

    A recorded call has its copies in it, to and from memory of the host that the GPU reaches: to run it again is one launch.
    """

    def __init__(self, gpu: Gpu, functions: Sequence[str], inputs: Sequence[Array], others: Sequence[Any], few: bool) -> None:
        self._gpu, self._functions, self._others = gpu, functions, others
        self._driver = gpu.driver if few else None
        ends = list(accumulate(-(-array.nbytes // 64) * 64 for array in inputs))
        self._staging = aligned(ends[-1], np.uint8) if self._driver is None else self._driver.host_array(ends[-1])
        self._memory, starts = gpu.empty((ends[-1],), np.uint8), [0, *ends[:-1]]  # one copy is faster than one of each
        self._staged = [self._staging[at : at + x.nbytes].view(x.dtype).reshape(x.shape) for at, x in zip(starts, inputs, strict=True)]
        self._placed = [Placed(self._memory, at, x.shape, x.dtype) for at, x in zip(starts, inputs, strict=True)]
        self._count = 0
        self._graph: Graph | None = None
        self._result: Any = None
        self._found: NDArray[np.float32] | None = None

    def __call__(self, inputs: Sequence[Array]) -> NDArray[np.float32]:
        for staged, array in zip(self._staged, inputs, strict=True):
            staged[...] = array
        if self._driver is None:
            self._gpu.refresh(self._memory, self._staging)
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
        self._driver.copy_in(self._memory.data_ptr(), self._staging, self._gpu.stream)
        self._result = self._launch()
        shape = tuple(int(n) for n in self._result.shape)
        found = self._gpu.pinned(4 * int(np.prod(shape)), self._driver).view(np.float32).reshape(shape)
        self._driver.copy_out(found, self._result.data_ptr(), self._gpu.stream)
        return found

    def _launch(self) -> Any:
        return in_turn(self._gpu.call, self._functions, [*(placed.tensor for placed in self._placed), *self._others])
