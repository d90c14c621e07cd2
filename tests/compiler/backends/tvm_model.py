"""A graph, compiled by the TVM backend and loaded by its executor, without an artifact in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.cache_precision import RoundedCache
from moec.compiler.backends.tvm.backend import TvmBackend
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Graph, Param
from moec.compiler.model import Model
from moec.compiler.packed import CodedFormat, Quantized
from moec.compiler.stored import pack
from moec.compiler.weights import MemoryWeights, WeightSource
from moec.runtime.executors.tvm import TvmExecutor
from moec.runtime.formats import get_format
from moec.runtime.tvm_device import Device
from moec.targets import get_target

Arrays = dict[tuple[str, str], NDArray[np.generic]]


def restrict(backend: TvmBackend, sizes: Sequence[int]) -> None:
    """Let a backend compile no functions but those that take calls of these numbers of tokens."""
    every = backend.platform.functions(backend.graph)
    taken = dict.fromkeys(next(f for f in every if f.most is None or size <= f.most) for size in sizes)
    setattr(backend.platform, "functions", lambda _: list(taken))  # noqa: B010  # a method, for mypy


class Compiled:
    """A compiled graph, and the values that its packed weights stand for.

    Args:
        sizes: tokens of calls: functions that none of these takes are not compiled, which takes long; of any number unless given.
        cache_dtype: of keys and values. None: what the target has unless told, which on a GPU is less exact.
        activations: what products are computed with.
    """

    def __init__(
        self, graph: Graph, weights: WeightSource, folder: Path, target: str = "cpu", device: Device | None = None,
        sizes: Sequence[int] = (), cache_dtype: str | None = "float32", activations: str = "float",
    ) -> None:  # fmt: skip
        self.folder, self.backend = folder, TvmBackend(graph, get_target(target), cache_dtype, activations)
        if sizes:
            restrict(self.backend, sizes)
        self.arrays: Arrays = {}
        values: dict[str, torch.Tensor] = {}
        for param in graph.params.values():
            values[param.name] = self._store(param, weights)
        self.interpreter = Interpreter(graph, MemoryWeights(values))
        self.section = self.backend.build(folder, {})
        vocabulary, context = int(graph.meta["vocab_size"]), int(graph.meta["context_length"])
        self.executor = TvmExecutor(folder / "lib.so", self.section, self.arrays, vocabulary, context, threads=2, device=device)

    def _store(self, param: Param, weights: WeightSource) -> torch.Tensor:
        experts: Sequence[int | None] = range(int(param.type.shape[0])) if self.backend.stacked(param) else (None,)
        stored: list[Mapping[str, NDArray[np.generic]]] = []
        values = []
        for expert in experts:
            packed = pack(weights, param, expert)
            stored.append(self.backend.store(param, packed, expert))
            assert_equal(packed, self.backend.restore(param, stored[-1], expert))
            name = param.format if isinstance(param.format, str) else param.format[expert or 0]
            fmt = get_format(name)
            if isinstance(packed, Quantized):
                assert isinstance(fmt, CodedFormat)
                values.append(torch.from_numpy(fmt.dequantize(packed.codes, packed.scale, packed.zero)))
            else:
                values.append(torch.from_numpy(fmt.unpack({"data": packed}, packed.shape)))
        for component, array in self.backend.storage(param).items():
            parts = [arrays[component] for arrays in stored if component in arrays]
            whole = np.stack(parts) if self.backend.stacked(param) else parts[0]
            assert (whole.dtype.name, whole.shape) == (array.dtype, array.shape)
            self.arrays[param.name, component] = whole
        shape = [int(d) for d in param.type.shape]
        return (torch.stack(values) if self.backend.stacked(param) else values[0]).reshape(shape)

    def expected(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """The interpreter's logits [T, V] for one sequence, of keys and values rounded to what the cache has."""
        ids = torch.from_numpy(tokens)[None]
        inputs = {value.name: ids if i == 0 else torch.arange(len(tokens))[None] for i, value in enumerate(self.interpreter.graph.inputs)}
        found = list[NDArray[np.float32]]()
        model = Model(self.interpreter.graph, self.interpreter.weights)
        observer = RoundedCache(model) if self.backend.platform.cache_dtype == "bfloat16" else None
        self.interpreter.run([inputs], lambda _, outputs: found.append(outputs[0][0].numpy()), observer=observer)
        return found[0]

    def logits(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """The executor's logits [T, V] for one sequence, all at once."""
        sequence = self.executor.add()
        try:
            return self.executor.forward([(sequence, tokens)], all_logits=True)
        finally:
            self.executor.remove(sequence)


def assert_equal(a: object, b: object) -> None:
    """Packed weights are the same bit for bit."""
    if isinstance(a, Quantized) and isinstance(b, Quantized):
        for x, y in ((a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero)):
            np.testing.assert_array_equal(x, y)
    else:
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
