"""The kernels that CPUs and GPUs both have, compiled and callable with numpy arrays, so that one test holds both against the definition."""

from __future__ import annotations

from functools import cache
from typing import Any, Protocol

import numpy as np
import pytest
from tvm import relax, tirx

from moec.targets.kernels.cpu import attention as cpu_attention
from moec.targets.kernels.cpu import norm as cpu_norm
from moec.targets.kernels.cpu import rope as cpu_rope
from moec.targets.kernels.cpu import router as cpu_router
from moec.targets.kernels.cpu import skip as cpu_skip
from moec.targets.kernels.cuda import attention as cuda_attention
from moec.targets.kernels.cuda import norm as cuda_norm
from moec.targets.kernels.cuda import rope as cuda_rope
from moec.targets.kernels.cuda import router as cuda_router
from moec.targets.kernels.cuda import skip as cuda_skip
from moec.targets.kernels.cuda.arrival import SEMAPHORES
from moec.targets.kernels.cuda.step import step_func
from moec.targets.kernels.cuda.step_spec import StepOptions, StepSpec
from moec.targets.kernels.specs import AttentionSpec, NormSpec, RouterSpec, SkipSpec
from tests.targets.kernels.cuda.packed import MULTIPROCESSORS
from tests.targets.kernels.emulator import needs_emulator
from tests.targets.kernels.run import ISA, Kernel
from tests.targets.kernels.run_cuda import CudaFunction, CudaKernel

MEMORY = 96 << 10
"""Bytes of shared memory that attention takes at most."""

KINDS = ["cpu", pytest.param("cuda", marks=needs_emulator)]


class Hardware(Protocol):
    """Kernels of one kind of hardware, each compiled once."""

    def norm(self, spec: NormSpec, tokens: int | None) -> Any: ...
    def rope(self, heads: int, d: int, tokens: int | None) -> Any: ...
    def router(self, spec: RouterSpec, tokens: int | None) -> Any: ...
    def topk(self, size: int, k: int, largest: bool) -> Any: ...
    def skip(self, spec: SkipSpec, tokens: int | None) -> Any: ...
    def attention(self, spec: AttentionSpec, tokens: int | None) -> Any: ...
    def page_shapes(self, spec: AttentionSpec) -> Any: ...


class _Cpu:
    norm = staticmethod(cache(lambda spec, tokens: Kernel(cpu_norm.norm_func(spec, tokens, ISA))))
    rope = staticmethod(cache(lambda heads, d, tokens: Kernel(cpu_rope.rope_func(heads, d, tokens, ISA))))
    router = staticmethod(cache(lambda spec, tokens: Kernel(cpu_router.router_func(spec, tokens, ISA))))
    topk = staticmethod(cache(lambda size, k, largest: Kernel(cpu_router.topk_func(size, k, largest, None, ISA))))
    skip = staticmethod(cache(lambda spec, tokens: Kernel(cpu_skip.skip_func(spec, tokens))))
    attention = staticmethod(cache(lambda spec, tokens: Kernel(cpu_attention.attention_func(spec, tokens, ISA))))
    page_shapes = staticmethod(cpu_attention.page_shapes)


def _getter(bb: relax.BlockBuilder) -> cuda_attention.Get:
    return lambda name, key, make: bb.add_func(make(), name)


class CudaStep:
    """Attention of one token, called as the CPU's kernel is."""

    def __init__(self, spec: StepSpec) -> None:
        self._options, self._spec = StepOptions.of(spec, "float32", MEMORY, MULTIPROCESSORS), spec.attention
        self._kernel = CudaKernel(step_func(spec, self._options))

    def __call__(self, *inputs: Any, outputs: Any) -> list[Any]:
        spec, splits, semaphores = self._spec, self._options.splits, np.zeros(SEMAPHORES, np.int32)
        shapes = [((splits, spec.heads, spec.dv), "float32"), ((splits, spec.heads, 2), "float32"), *outputs]
        return self._kernel(*inputs[:7], semaphores, *inputs[7:], outputs=shapes)[2:]


class _Cuda:
    norm = staticmethod(cache(lambda spec, tokens: CudaKernel(cuda_norm.norm_func(spec, tokens))))
    rope = staticmethod(cache(lambda heads, d, tokens: CudaKernel(cuda_rope.rope_func(heads, d, tokens))))
    router = staticmethod(cache(lambda spec, tokens: CudaKernel(cuda_router.router_func(spec, tokens))))
    topk = staticmethod(cache(lambda size, k, largest: CudaKernel(cuda_router.topk_func(size, k, largest, None))))
    skip = staticmethod(cache(lambda spec, tokens: CudaKernel(cuda_skip.skip_func(spec, tokens))))
    page_shapes = staticmethod(cuda_attention.page_shapes)

    @staticmethod
    @cache
    def attention(spec: AttentionSpec, tokens: int | None) -> Any:
        """The kernels of attention as one function, with the arguments of the CPU's kernel."""
        if tokens == 1:
            return CudaStep(StepSpec(spec))
        count, blocks, pages, slots, most = (tirx.Var(name, "int64") for name in ("T", "NB", "pages", "S", "MP"))
        widths = (spec.heads * spec.d, spec.kv_heads * spec.d, spec.kv_heads * spec.dv)
        types = [relax.TensorType([pages, *shape], "float32") for shape in cuda_attention.page_shapes(spec)]
        types += [relax.TensorType([count, width], "float32") for width in widths]
        types += [relax.TensorType([blocks, 4], "int32"), relax.TensorType([slots, most], "int32")]
        types += [relax.TensorType([spec.heads], "float32")] if spec.sinks else []
        if not cuda_attention.takes_step(spec, None, "float32", MEMORY):
            return CudaFunction(types, lambda bb, *args: cuda_attention.attention(bb, _getter(bb), args[:2], args[2:], spec))
        step = StepSpec(spec, tokens=None)
        options = StepOptions.of(step, "float32", MEMORY, MULTIPROCESSORS, 64)
        types.insert(7, relax.TensorType([SEMAPHORES], "int32"))
        run = CudaFunction(types, lambda bb, *args: cuda_attention.attention_step(bb, _getter(bb), args[:2], args[2:], step, options))
        return lambda *inputs, outputs: run(*inputs[:7], np.zeros(SEMAPHORES, np.int32), *inputs[7:], outputs=outputs)


_HARDWARE: dict[str, Hardware] = {"cpu": _Cpu(), "cuda": _Cuda()}


def hardware(kind: str) -> Hardware:
    """The kernels of a kind, `cpu` or `cuda`."""
    return _HARDWARE[kind]
