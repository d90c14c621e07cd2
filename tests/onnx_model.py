"""A graph with random weights as an ONNX executor, without the rest of an artifact."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from moec.compiler.artifact import plan_shards
from moec.compiler.backends.onnx import Activations, OnnxBackend
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Graph
from moec.compiler.packed import Quantized
from moec.compiler.stored import pack
from moec.compiler.weights import MemoryWeights, WeightSource
from moec.runtime.executors.onnx import OnnxExecutor
from moec.runtime.formats import get_format
from moec.runtime.formats.int import IntFormat
from moec.targets import Target

TARGET = Target("test", "a machine for tests", "cpu", '{"kind": "llvm"}')


@dataclass
class Built:
    """A model on disk, and the values that its weights stand for."""

    folder: Path
    executor_section: Mapping[str, Any]
    graph: Graph
    backend: OnnxBackend
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def executor(self, max_sequences: int = 4, threads: int = 1) -> OnnxExecutor:
        """The model, loaded."""
        manifest = SimpleNamespace(vocab_size=self.graph.meta["vocab_size"], context_length=self.graph.meta["context_length"])
        artifact: Any = SimpleNamespace(
            manifest=manifest, executor=self.executor_section, folder=self.folder, path=lambda name: self.folder / name
        )
        return OnnxExecutor(artifact, threads, max_sequences)

    def reference(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [T, V] of the interpreter on the stored weights."""
        ids = torch.from_numpy(tokens)[None]
        inputs = {"ids": ids, "positions": torch.arange(ids.shape[1])[None]}
        names = {v.name for v in self.graph.inputs}
        run = Interpreter(self.graph, MemoryWeights(self.values))
        return run(**{k: v for k, v in inputs.items() if k in names})[0][0].numpy()


def build(
    graph: Graph,
    weights: WeightSource,
    folder: Path,
    *,
    portable: bool = False,
    activations: Activations = "float",
    target: Target = TARGET,
) -> Built:
    """Write model and weights of a graph."""
    backend = OnnxBackend(graph, target, portable, activations)
    values: dict[str, torch.Tensor] = {}
    locations = {}
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    for shard in plan_shards(backend):
        data = bytearray(shard.nbytes)
        data[: len(shard.header)] = shard.header
        for (name, component), (_, location) in shard.arrays.items():
            locations[name, component] = location
        for name in shard.params:
            param = backend.graph.params[name]
            experts = range(int(param.type.shape[0])) if backend.stacked(param) else (None,)
            parts = []
            for expert in experts:
                packed = pack(weights, param, expert)
                arrays = backend.store(param, packed)
                for component, array in arrays.items():
                    stored, location = shard.arrays[name, component]
                    shape = stored.shape if expert is None else stored.shape[1:]
                    assert (array.shape, array.dtype) == (shape, np.dtype(stored.dtype)), (name, component)
                    at = location.offset + (expert or 0) * array.nbytes
                    data[at : at + array.nbytes] = np.ascontiguousarray(array).tobytes()
                restored = backend.restore(param, arrays)
                check_same(packed, restored)
                parts.append(_value(str(param.format), packed, [d for d in param.type.shape if isinstance(d, int)][expert is not None :]))
            values[name] = parts[0] if experts == (None,) else torch.stack(parts)
        (folder / shard.path).write_bytes(bytes(data))
    return Built(folder, backend.build(folder, locations), graph, backend, values)


def check_same(a: Quantized | np.ndarray, b: Quantized | np.ndarray) -> None:
    """Two packed weights are equal bit for bit."""
    pairs: Iterator[tuple[np.ndarray, np.ndarray]]
    if isinstance(a, Quantized):
        assert isinstance(b, Quantized)
        pairs = iter([(a.codes, b.codes), (a.scale, b.scale), (a.zero, b.zero)])
    else:
        assert not isinstance(b, Quantized)
        pairs = iter([(a, b)])
    for x, y in pairs:
        np.testing.assert_array_equal(x, y.reshape(x.shape))
        assert x.dtype == y.dtype


def _value(name: str, packed: Quantized | np.ndarray, shape: list[int]) -> torch.Tensor:
    fmt = get_format(name)
    if isinstance(fmt, IntFormat):
        assert isinstance(packed, Quantized)
        return torch.from_numpy(fmt.dequantize(packed.codes, packed.scale, packed.zero)).view(shape)
    if isinstance(packed, np.ndarray) and packed.dtype.kind in "ib":
        return torch.from_numpy(packed).view(shape)
    assert isinstance(packed, np.ndarray)
    return torch.from_numpy(np.array(fmt.unpack({"data": packed}, tuple(shape)))).view(shape)
