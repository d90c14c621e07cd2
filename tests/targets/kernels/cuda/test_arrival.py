"""Thread blocks that find out which one is the last."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.tirx.script import builder as T

from moec.targets.kernels.cuda.arrival import last_arrival
from moec.targets.kernels.cuda.emit import Expr, Shared, argument, kernel, store, strided, when
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.run_cuda import CudaKernel

pytestmark = needs_emulator


def test_the_last_block_sees_what_all_wrote() -> None:
    groups, blocks, threads = 3, 5, 64

    def arguments() -> Any:
        shapes = {"semaphores": (256,), "parts": (groups, blocks, threads), "out": (groups, threads)}
        return [argument(name, shape, "int32") for name, shape in shapes.items()]

    def body(operands: Any, _: Shared, group: Expr, block: Expr, thread: Expr) -> None:
        semaphores, parts, out = operands
        count = T.Bind(blocks - group)  # not all of them have work
        with when(block < count):
            store(parts, group * 100 + block + thread, group, block, thread)
            last = last_arrival(semaphores, group, count)
            with when(last != 0), strided(0, count, 1) as i:
                store(out, out[group, thread] + parts[group, i, thread], group, thread)

    run = CudaKernel(kernel("arrive", threads, arguments, lambda _: [groups, blocks], body))
    semaphores = np.zeros(256, np.int32)
    expected = [sum(group * 100 + i + np.arange(threads) for i in range(blocks - group)) for group in range(groups)]
    for _ in range(2):
        _, found = run(semaphores, outputs=[((groups, blocks, threads), "int32"), ((groups, threads), "int32")])
        np.testing.assert_array_equal(found, expected)
        assert not semaphores.any()
