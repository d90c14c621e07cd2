"""ahead: the inputs of the next step, executed by the emulator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.targets.kernels.cuda.ahead import THREADS, ahead_func
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.run_cuda import CudaKernel

pytestmark = needs_emulator


@pytest.mark.parametrize(("tokens", "rows", "sequences"), [(1, 1, 1), (4, 4, 3), (8, 5, 5), (THREADS + 9, THREADS + 9, THREADS + 9)])
def test_what_was_found_goes_in_at_the_next_position(tokens: int, rows: int, sequences: int) -> None:
    draw = np.random.default_rng(tokens)
    found = draw.standard_normal((rows, 3)).astype(np.float32)
    found[:, 0] = draw.integers(0, 1 << 24, rows)
    ids, positions = draw.integers(0, 99, tokens), draw.integers(0, 1 << 20, tokens)
    blocks = draw.integers(0, 99, (tokens, 4)).astype(np.int32)
    turn, history = np.array([2, sequences], np.int32), draw.standard_normal((5, rows, 3)).astype(np.float32)
    expected_history, expected_blocks = history.copy(), blocks.copy()
    expected_history[2] = found
    expected_blocks[:, 3] += 1
    expected = [found[min(token, sequences - 1), 0] for token in range(tokens)], positions + 1, expected_blocks, [3, sequences]
    changed: list[NDArray[Any]] = [ids, positions, blocks, turn]
    CudaKernel(ahead_func())(found, *changed, history)
    for got, wanted in zip(changed, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(history, expected_history)
