"""Weights of few values in the layout of the CUDA kernels: ternary codes are two bits, binary ones are refused."""

from __future__ import annotations

import numpy as np
import pytest

from moec.runtime.errors import MoecError
from moec.targets.kernels.cuda.layout import FragmentLayout


@pytest.mark.parametrize("name", ["ternary_g64", "ternary_channel"])
def test_untile_inverts_tile(name: str) -> None:
    layout, rng = FragmentLayout(50, 200, name), np.random.default_rng(0)
    codes = rng.integers(0, 3, (2, 50, 200), np.uint8)
    scale = rng.random((2, 50, layout.groups)).astype(np.float16)
    arrays = layout.tile(codes, scale)
    assert arrays["codes"].nbytes == 2 * 64 * 256 // 4
    found = layout.untile(arrays)
    np.testing.assert_array_equal(found[0], codes)
    np.testing.assert_array_equal(found[1], scale)
    assert (found[2] == 1).all()


def test_binary_is_refused() -> None:
    with pytest.raises(MoecError, match="no CUDA kernel for binary_g64"):
        FragmentLayout(64, 128, "binary_g64")
