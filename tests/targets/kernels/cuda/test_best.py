"""best: the likeliest of a row of logits, and what its probability takes, executed by the emulator."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from moec.runtime.sampler import logprob
from moec.targets.kernels.cuda.best import best_func
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.run_cuda import CudaKernel

pytestmark = needs_emulator


def best(logits: NDArray[np.float32], rows: int | None) -> NDArray[np.float32]:
    found: NDArray[np.float32] = CudaKernel(best_func(logits.shape[1], rows))(logits, outputs=[((len(logits), 3), "float32")])[0]
    return found


@pytest.mark.parametrize(("size", "count", "rows"), [(50, 1, 1), (9001, 3, None)])
def test_the_likeliest_token(size: int, count: int, rows: int | None) -> None:
    logits = (np.random.default_rng(0).standard_normal((count, size)) * 4).astype(np.float32)
    logits[0, 7] = logits[0, 31] = 40  # the first of equals
    logits[-1, 3] = -np.inf
    found = best(logits, rows)
    np.testing.assert_array_equal(found[:, 0], logits.argmax(-1))
    np.testing.assert_array_equal(found[:, 1], logits.max(-1))
    expected = [logprob(row, int(row.argmax())) for row in logits]
    np.testing.assert_allclose(found[:, 1] - found[:, 2], expected, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 49])
def test_a_number_that_is_none_shows(bad: float, place: int) -> None:
    logits = np.zeros((1, 50), np.float32)
    logits[0, place] = bad
    assert not np.isfinite(best(logits, 1)[0, 1:]).all()
    assert not np.isfinite(best(np.full((1, 50), -np.inf, np.float32), 1)[0, 1:]).all()
