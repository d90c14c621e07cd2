"""The kernel from a hidden state to its experts against numpy in float64, and `moec.compiler.ops` for what follows the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moec.compiler import ops
from moec.targets.kernels.cuda.arrival import SEMAPHORES
from moec.targets.kernels.cuda.calls import Gpu
from moec.targets.kernels.cuda.layout import FragmentLayout
from moec.targets.kernels.cuda.matrices import Projection
from moec.targets.kernels.cuda.routing_step import RoutingSpec, routing_step_func
from moec.targets.kernels.cuda.routing_tokens import routing_tokens_func
from moec.targets.kernels.specs import NormSpec, RouterSpec, SkipSpec
from tests.targets.kernels.cuda.packed import MULTIPROCESSORS, packed
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.run_cuda import CudaKernel

pytestmark = needs_emulator

GPU = Gpu(232_448, MULTIPROCESSORS)


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
    def gate(self) -> Projection:
        return Projection(FragmentLayout(self.router.experts, self.d, self.format), self.bias)

    def of(self, tokens: int | None = 1, most: int = 1) -> RoutingSpec:
        return RoutingSpec.of(self.gate, GPU, self.norm, self.router, self.skip, tokens=tokens, most=most)


GROUPS = RouterSpec(48, 6, "sigmoid", normalize=True, scale=2.5, groups=4, top_groups=2, group_score="top2", bias=True)
CASES = [
    Case(256, RouterSpec(64, 8), norm=NormSpec(256, 1, 1e-5, residual=True)),  # OLMoE's kind
    Case(264, RouterSpec(8, 2, normalize=True), norm=NormSpec(264, 1, 1e-5, residual=True)),  # Mixtral's: one block
    Case(384, RouterSpec(40, 4, "softmax_topk"), norm=NormSpec(384, 1, 1e-5, offset=1.0), bias=True),
    Case(128, GROUPS, norm=NormSpec(128, 1, 1e-6, residual=True)),
    Case(136, RouterSpec(33, 5), "int8_g32_asym", NormSpec(136, 1, 1e-5, center=True, bias=True, residual=True)),
    Case(520, RouterSpec(33, 5), norm=NormSpec(520, 1, 1e-5, center=True, bias=True, residual=True), bias=True),
    Case(640, RouterSpec(24, 4, "sigmoid", bias=True), "fp8_channel", NormSpec(640, 1, 1e-6)),
    Case(2056, RouterSpec(20, 3), "int4_channel", skip=SkipSpec(3, 20, ratio=0.6, top_p=0.9, normalize=True)),
    Case(
        2304, RouterSpec(32, 4, normalize=True), norm=NormSpec(2304, 1, 1e-5, weight=False, residual=True), skip=SkipSpec(4, 32, ratio=0.5)
    ),
]


@cache
def several(case: Case, tokens: int | None, together: int, terms: int = 0) -> CudaKernel:
    spec = case.of(tokens)
    product = replace(spec.product, tokens=min(together, spec.product.warps))
    return CudaKernel(routing_tokens_func(replace(spec, product=product, terms=terms)))


@cache
def single(case: Case) -> CudaKernel:
    return CudaKernel(routing_step_func(case.of()))


def normalised(case: Case, total: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any]) -> NDArray[np.float64]:
    """The rows in float64."""
    row: NDArray[np.float64] = total.astype(np.float64)
    norm = case.norm
    if norm is None:
        return row
    row = row - row.mean(-1, keepdims=True) if norm.center else row
    row = row / np.sqrt((row * row).mean(-1, keepdims=True) + norm.eps)
    row = row * (weight.astype(np.float64) + norm.offset) if norm.weight else row
    if norm.bias:
        row = row + bias
    return row


class Layer:
    """Random weights of a layer and rows of some tokens, as inputs of the kernel, and what it is to give.

    Args:
        size: of the rows' numbers.
    """

    def __init__(self, case: Case, tokens: int, seed: int, size: float) -> None:
        rng = np.random.default_rng(seed)
        self.case, self.tokens = case, tokens
        arrays, values = packed(case.gate.layout, rng)
        factor = 0.5 ** round(np.log2(case.d) / 2)  # logits of about 1
        self.values = values * factor
        scaled = "values" if case.format == "bf16" else "scale"
        arrays[scaled] = _scaled(arrays[scaled], factor)
        wide, router = (tokens, case.d), case.router
        self.x, self.residual = (rng.standard_normal(wide).astype(np.float32) * np.float32(size) for _ in range(2))
        weight, bias = (rng.standard_normal(case.d).astype(np.float32) for _ in range(2))
        gate_bias, self.choice_bias = (rng.standard_normal(router.experts).astype(np.float32) * np.float32(scale) for scale in (1, 0.1))
        norm = case.norm
        self.total = self.x + self.residual if norm and norm.residual else self.x
        self.row = normalised(case, self.total, weight, bias)
        self.logits = self.row @ self.values.T + (gate_bias if case.bias else 0)
        self._parameters = [a for a, there in ((weight, norm and norm.weight), (bias, norm and norm.bias)) if there]
        self._parameters += [*arrays.values(), *([gate_bias] if case.bias else [])]
        self.semaphores = np.zeros(SEMAPHORES, np.int32)

    def run(self, kernel: CudaKernel, first: int = 0, tokens: int | None = None, terms: int = 0) -> list[NDArray[Any]]:
        """What the kernel gives for some of the tokens: [sum,] [row,] [its terms,] logits, weights, ids."""
        count, case, norm = self.tokens if tokens is None else tokens, self.case, self.case.norm
        own = slice(first, first + count)
        inputs = [*([self.choice_bias] if case.router.bias else []), self.semaphores, self.x[own]]
        inputs += [*([self.residual[own]] if norm and norm.residual else []), *self._parameters]
        slots, rows = (count, case.router.top_k), int(norm is not None and norm.residual) + (norm is not None)
        outputs = [((count, case.d), "float32")] * rows + [((terms, count, case.d), "uint16")] * bool(terms)
        outputs += [((count, case.router.experts), "float32"), (slots, "float32"), (slots, "int64")]
        return kernel(*inputs, outputs=outputs)

    def check(self, found: Sequence[NDArray[Any]]) -> None:
        """Compare what the kernel gave for all tokens."""
        *rows, logits, weights, ids = found
        case, norm, router = self.case, self.case.norm, self.case.router
        if norm is not None:
            np.testing.assert_allclose(rows[-1], self.row, rtol=2e-5, atol=2e-5)
        if norm is not None and norm.residual:
            np.testing.assert_array_equal(rows[0], self.total)
        np.testing.assert_allclose(logits, self.logits, rtol=1e-4, atol=1e-4 * max(1.0, np.abs(self.row).max()))
        attrs = {name: value for name, value in asdict(router).items() if name not in ("experts", "bias")}
        wanted = ops.router(torch.from_numpy(logits), torch.from_numpy(self.choice_bias) if router.bias else None, **attrs)
        if case.skip is not None:
            skip = case.skip
            wanted = ops.skip(*wanted, experts=router.experts, ratio=skip.ratio, top_p=skip.top_p, normalize=skip.normalize)
        np.testing.assert_array_equal(ids, wanted[1].numpy())
        np.testing.assert_allclose(weights, wanted[0].numpy(), rtol=1e-4, atol=1e-6)
        assert not self.semaphores.any()


SIZES = st.sampled_from([0.1, 1.0, 30.0])


@settings(max_examples=25, deadline=None)
@given(case=st.sampled_from(CASES), seed=st.integers(0, 10_000), size=SIZES)
def test_routing_step(case: Case, seed: int, size: float) -> None:
    layer = Layer(case, 1, seed, size)
    for _ in range(2):  # the second time the semaphores are as the first left them
        found = layer.run(single(case))
    layer.check(found)


@settings(max_examples=40, deadline=None)
@given(
    case=st.sampled_from(CASES), seed=st.integers(0, 10_000), size=SIZES, tokens=st.sampled_from([2, 4, 8]),
    together=st.sampled_from([1, 2, 4, 8]),
)  # fmt: skip
def test_routing_of_some_tokens(case: Case, seed: int, size: float, tokens: int, together: int) -> None:
    layer = Layer(case, tokens, seed, size)
    found = layer.run(several(case, tokens, together))
    layer.check(found)
    if case.format == "bf16" or together == 1:  # which experts run depends on no batch
        for those, alone in zip(found, layer.run(single(case), tokens - 1, 1), strict=True):
            np.testing.assert_array_equal(those[-1:], alone)


@settings(max_examples=20, deadline=None)
@given(case=st.sampled_from(CASES), seed=st.integers(0, 10_000), tokens=st.integers(1, 11), together=st.sampled_from([1, 2, 4, 8]))
def test_routing_of_any_number_of_tokens(case: Case, seed: int, tokens: int, together: int) -> None:
    layer = Layer(case, tokens, seed, 1.0)
    terms = (1 + seed % 2) * (case.norm is not None)
    for _ in range(2):
        found = layer.run(several(case, None, together, terms), terms=terms)
    if terms:
        high, *low = found.pop(-4).view(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(high, found[-4].astype(ml_dtypes.bfloat16).astype(np.float32))
        for rest in low:
            np.testing.assert_array_equal(rest, (found[-4] - high).astype(ml_dtypes.bfloat16).astype(np.float32))
    layer.check(found)


def test_how_many_tokens_share_a_block() -> None:
    many, qwen, wide = (Case(d, RouterSpec(e, 8)) for d, e in ((2048, 64), (2048, 128), (7168, 256)))
    assert [many.of(None, most).product.tokens for most in (8, 32, 48, 64, 192)] == [1, 1, 2, 2, 8]
    assert [qwen.of(None, most).product.tokens for most in (8, 16, 32, 64)] == [1, 1, 2, 4]
    assert [wide.of(None, most).product.tokens for most in (8, 16, 64)] == [1, 2, 4]  # their rows fill the memory of a block


def _scaled(array: NDArray[Any], factor: float) -> NDArray[Any]:
    """Weights (bfloat16 as bits) or scales, times a power of two."""
    if array.dtype != np.uint16:
        return (array * factor).astype(array.dtype)
    values = (array.astype(np.uint32) << 16).view(np.float32) * np.float32(factor)
    return (values.view(np.uint32) >> 16).astype(np.uint16)
