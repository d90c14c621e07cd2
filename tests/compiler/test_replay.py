"""Loops that a GPU replays compute what they compute without being recorded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moec.compiler.quantizers.gptq import quantize
from moec.compiler.replay import replayed
from moec.runtime.formats.int import IntFormat


@replayed
def powers(tensors: tuple[Tensor, ...], count: int) -> Tensor:
    """x^1 to x^count, plus y."""
    x, y = tensors
    found = [x]
    for _ in range(count - 1):
        found.append(found[-1] * x)
    return torch.stack(found) + y


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def test_other_values_other_results(device: str) -> None:
    """Values are those of each call, and a result stays when the next call comes."""
    results = []
    for value, count in ((2.0, 3), (3.0, 3), (2.0, 5), (4.0, 3)):
        x = torch.full((2, 3), value, device=device)
        results.append((powers((x, torch.ones(3, device=device)), count), [value ** (i + 1) + 1 for i in range(count)]))
        assert (x == value).all()
    for found, expected in results:
        assert found.shape == (len(expected), 2, 3)
        assert found[:, 1, 2].tolist() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("fmt", [IntFormat(4, 128), IntFormat(2, 0), IntFormat(3, 64, False)])
def test_gptq_on_a_gpu(fmt: IntFormat) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 192, generator=generator), torch.randn(400, 192, generator=generator)
    moment = x.T @ x / 400
    here, there = quantize(weight, fmt, moment), quantize(weight.cuda(), fmt, moment.cuda())
    assert (here.codes == there.codes).mean() > 0.99  # sums in another order round some ties otherwise
