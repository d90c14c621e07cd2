"""The kernel from a hidden state to its experts against numpy in float64, and `moec.compiler.ops` for what follows the logits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moec.compiler import ops
from moec.targets.kernels.cuda.arrival import SEMAPHORES
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.projections import Projection
from moec.targets.kernels.cuda.routing_step import RoutingSpec, routing_step_func
from moec.targets.kernels.specs import NormSpec, RouterSpec, SkipSpec
from tests.targets.kernels.cuda.packed import MULTIPROCESSORS, packed
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.run_cuda import CudaKernel

pytestmark = needs_emulator


@dataclass(frozen=True)
class Case:
    """A layer's shape.

    Args:
        bias: of the linear layer.
    """

    d: int
    router: RouterSpec
    format: str = "bf16"
    norm: NormSpec | None = None
    bias: bool = False
    skip: SkipSpec | None = None

    @property
    def spec(self) -> RoutingSpec:
        gate = Projection(FragmentLayout(self.router.experts, self.d, self.format), self.bias)
        return RoutingSpec.of(gate, MULTIPROCESSORS, self.norm, self.router, self.skip)


GROUPS = RouterSpec(48, 6, "sigmoid", normalize=True, scale=2.5, groups=4, top_groups=2, group_score="top2", bias=True)
CASES = [
    Case(256, RouterSpec(64, 8), norm=NormSpec(256, 1, 1e-5, residual=True)),  # OLMoE's kind
    Case(264, RouterSpec(8, 2, normalize=True), norm=NormSpec(264, 1, 1e-5, residual=True)),  # Mixtral's: one block
    Case(384, RouterSpec(40, 4, "softmax_topk"), norm=NormSpec(384, 1, 1e-5, offset=1.0), bias=True),
    Case(128, GROUPS, norm=NormSpec(128, 1, 1e-6, residual=True)),
    Case(136, RouterSpec(33, 5), "int8_g32_asym", NormSpec(136, 1, 1e-5, center=True, bias=True, residual=True)),
    Case(2056, RouterSpec(20, 3), "int4_channel", skip=SkipSpec(3, 20, ratio=0.6, top_p=0.9, normalize=True)),
    Case(
        2304, RouterSpec(32, 4, normalize=True), norm=NormSpec(2304, 1, 1e-5, weight=False, residual=True), skip=SkipSpec(4, 32, ratio=0.5)
    ),
]


@cache
def kernel(case: Case) -> CudaKernel:
    return CudaKernel(routing_step_func(case.spec))


def normalised(case: Case, total: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any]) -> NDArray[np.float64]:
    """The row in float64."""
    row: NDArray[np.float64] = total.astype(np.float64)
    norm = case.norm
    if norm is None:
        return row
    row = row - row.mean() if norm.center else row
    row = row / np.sqrt((row * row).mean() + norm.eps)
    row = row * (weight.astype(np.float64) + norm.offset) if norm.weight else row
    if norm.bias:
        row = row + bias
    return row


@settings(max_examples=25, deadline=None)
@given(index=st.sampled_from(range(len(CASES))), seed=st.integers(0, 10_000), size=st.sampled_from([0.1, 1.0, 30.0]))
def test_routing_step(index: int, seed: int, size: float) -> None:
    case, rng = CASES[index], np.random.default_rng(seed)
    router, norm, wide = case.router, case.norm, (1, case.d)
    arrays, values = packed(case.spec.product.matrices[0].layout, rng)
    factor = 0.5 ** round(np.log2(case.d) / 2)  # logits of about 1
    values = values * factor
    scaled = "values" if case.format == "bf16" else "scale"
    arrays[scaled] = _scaled(arrays[scaled], factor)
    x, residual = (rng.standard_normal(wide).astype(np.float32) * np.float32(size) for _ in range(2))
    weight, bias = (rng.standard_normal(case.d).astype(np.float32) for _ in range(2))
    gate_bias, choice_bias = (rng.standard_normal(router.experts).astype(np.float32) * np.float32(scale) for scale in (1, 0.1))
    semaphores = np.zeros(SEMAPHORES, np.int32)
    total = x + residual if norm and norm.residual else x
    inputs = [*([choice_bias] if router.bias else []), semaphores, x, *([residual] if norm and norm.residual else [])]
    inputs += [a for a, there in ((weight, norm and norm.weight), (bias, norm and norm.bias)) if there]
    inputs += [*arrays.values(), *([gate_bias] if case.bias else [])]
    slots = (1, router.top_k)
    rows = [(wide, "float32")] * (int(norm is not None and norm.residual) + (norm is not None))
    outputs = [*rows, ((1, router.experts), "float32"), (slots, "float32"), (slots, "int64")]
    for _ in range(2):  # the second time the semaphores are as the first left them
        *found, logits, weights, ids = kernel(case)(*inputs, outputs=outputs)
    row = normalised(case, total[0], weight, bias)
    if norm is not None:
        np.testing.assert_allclose(found[-1][0], row, rtol=2e-5, atol=2e-5)
    if norm is not None and norm.residual:
        np.testing.assert_array_equal(found[0], total)
    expected = values @ row + (gate_bias if case.bias else 0)
    np.testing.assert_allclose(logits[0], expected, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(row).max()))
    attrs = {name: value for name, value in asdict(router).items() if name not in ("experts", "bias")}
    wanted = ops.router(torch.from_numpy(logits), torch.from_numpy(choice_bias) if router.bias else None, **attrs)
    if case.skip is not None:
        wanted = ops.skip(*wanted, experts=router.experts, ratio=case.skip.ratio, top_p=case.skip.top_p, normalize=case.skip.normalize)
    np.testing.assert_array_equal(ids, wanted[1].numpy())
    np.testing.assert_allclose(weights, wanted[0].numpy(), rtol=1e-4, atol=1e-6)
    assert not semaphores.any()


def _scaled(array: NDArray[Any], factor: float) -> NDArray[Any]:
    """Weights (bfloat16 as bits) or scales, times a power of two."""
    if array.dtype == np.float16:
        return (array * factor).astype(np.float16)
    values = (array.astype(np.uint32) << 16).view(np.float32) * np.float32(factor)
    return (values.view(np.uint32) >> 16).astype(np.uint16)
