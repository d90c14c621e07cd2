"""Calls of the TVM backend's code on a GPU, with memory of their own, which a driver can record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moec.runtime.cuda import Driver, Graph
from moec.runtime.tvm_arrays import Array, Placed, aligned, places
from moec.runtime.tvm_functions import in_turn

if TYPE_CHECKING:
    from moec.runtime.tvm_device import Gpu

WARM = 2
"""Calls of one shape that run before a third is recorded: they load code and fill the allocator's pool."""

MOST_AHEAD = 64
"""Calls of which `Ahead` keeps the results."""


class Staged:
    """Inputs of certain shapes: memory of the host and of the GPU for all of them, so that one copy brings them there."""

    def __init__(self, gpu: Gpu, driver: Driver | None, inputs: Sequence[Array]) -> None:
        self._gpu, self._driver = gpu, driver
        starts, size = places(inputs, 64)
        self._host = aligned(size, np.uint8) if driver is None else driver.host_array(size)
        self._memory = gpu.empty((size,), np.uint8)
        self._arrays = [self._host[at : at + x.nbytes].view(x.dtype).reshape(x.shape) for at, x in zip(starts, inputs, strict=True)]
        self._placed = [Placed(self._memory, at, x.shape, x.dtype) for at, x in zip(starts, inputs, strict=True)]
        self.tensors = [placed.tensor for placed in self._placed]

    def set(self, inputs: Sequence[Array]) -> None:
        """Write them into the host's memory, which no copy may be reading any more."""
        for own, array in zip(self._arrays, inputs, strict=True):
            own[...] = array

    def send(self) -> None:
        """Copy them to the GPU: on its stream where there is a driver."""
        if self._driver is None:
            self._gpu.refresh(self._memory, self._host)
        else:
            self._driver.copy_in(self._memory.data_ptr(), self._host, self._gpu.stream)


class Call:
    """A function with memory of its own for inputs of certain shapes, and perhaps others that get what it returns.

    A recorded call has its copies in it, to and from memory of the host that the GPU reaches: to run it again is one launch.
    """

    def __init__(self, gpu: Gpu, functions: Sequence[str], inputs: Sequence[Array], others: Sequence[Any], few: bool) -> None:
        self._gpu, self._functions, self._others = gpu, functions, others
        self._driver = gpu.driver if few else None
        self._staged = Staged(gpu, self._driver, inputs)
        self._count = 0
        self._graph: Graph | None = None
        self._result: Any = None
        self._found: NDArray[np.float32] | None = None

    def __call__(self, inputs: Sequence[Array]) -> NDArray[np.float32]:
        self._staged.set(inputs)
        if self._driver is None:
            self._staged.send()
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
        self._staged.send()
        self._result = self._launch()
        shape = tuple(int(n) for n in self._result.shape)
        found = self._gpu.pinned(4 * int(np.prod(shape)), self._driver).view(np.float32).reshape(shape)
        self._driver.copy_out(found, self._result.data_ptr(), self._gpu.stream)
        return found

    def _launch(self) -> Any:
        return in_turn(self._gpu.call, self._functions, [*self._staged.tensors, *self._others])


class Ahead:
    """Calls of a function one after the other, each with the tokens that the one before has found; the host gets them all at once.

    The inputs lie in the GPU's memory, where the function `ahead` makes those of the next call of them. All calls are on their way before
    the first one has ended. Each is a launch of its own, which begins when the one before is done: kernels read positions and the cache
    before they wait for the kernel in front of them.
    """

    def __init__(self, gpu: Gpu, function: str, order: Sequence[str], inputs: Mapping[str, Array], others: Sequence[Any]) -> None:
        self._gpu, self._function, self._others, self._driver = gpu, function, others, gpu.driver
        self._staged = Staged(gpu, gpu.driver, list(inputs.values()))
        tensors = dict(zip(inputs, self._staged.tensors, strict=True))
        self._inputs = [*(tensors[role] for role in order), tensors["blocks"]]
        self._changing = [tensors[role] for role in ("ids", "positions", "blocks", "turn")]
        self._shape = MOST_AHEAD, len(inputs["rows"]), 3
        self._history = gpu.empty(self._shape, np.float32)
        self._count = 0
        self._graph: Graph | None = None

    def __call__(self, inputs: Mapping[str, Array], count: int) -> NDArray[np.float32]:
        self._staged.set(list(inputs.values()))
        self._staged.send()
        if self._driver is None:
            for _ in range(count):
                self._enqueue()
            return self._gpu.fetch(self._history)[:count]
        for _ in range(count):
            self._count += 1
            if self._graph is None and self._count > WARM:
                self._graph, _ = self._driver.record(self._enqueue, self._gpu.stream)
            if self._graph is not None:
                self._graph.launch()
            else:
                self._enqueue()
        found = self._gpu.pinned(4 * int(np.prod(self._shape)), self._driver).view(np.float32).reshape(self._shape)[:count]
        self._driver.copy_out(found, self._history.data_ptr(), self._gpu.stream)
        self._driver.wait(self._gpu.stream)
        return found.copy()

    def _enqueue(self) -> None:
        best = in_turn(self._gpu.call, (self._function, "best"), [*self._inputs, *self._others])
        self._gpu.call("ahead", best, *self._changing, self._history)
