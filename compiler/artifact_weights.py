"""Reading an artifact back into the compiler: its graph, and its packed weights as values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moec.compiler.backends import make_backend
from moec.compiler.backends.base import Backend
from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph, Param
from moec.compiler.packed import CodedFormat, Quantized, is_quantized
from moec.compiler.text import parse_graph
from moec.runtime.artifact import Artifact
from moec.runtime.artifact import open_artifact as open_for_reading
from moec.runtime.formats import get_format
from moec.runtime.formats.float import PlainFormat
from moec.targets import Target


class ArtifactWeights:
    """The values that an artifact's packed weights stand for, one parameter or expert at a time."""

    def __init__(self, artifact: Artifact, backend: Backend) -> None:
        self.artifact, self.arrays, self.backend = artifact, artifact.weights, backend

    def load(self, name: str, expert: int | None = None) -> Tensor:
        param = self.backend.graph.params.get(name)
        if param is None:
            raise MoecError(f"the artifact has no weight {name!r}")
        if param.format == "zero":
            return torch.zeros([d for d in (param.type.shape if expert is None else param.type.shape[1:]) if isinstance(d, int)])
        if self.backend.stacked(param) and expert is None:
            return torch.stack([self.load(name, e) for e in range(int(param.type.shape[0]))])
        return _value(param, expert, self.backend.restore(param, self._arrays(param, expert), expert))

    def packed(self, name: str, expert: int | None = None) -> Quantized | None:
        """See `PackedSource`."""
        param = self.backend.graph.params[name]
        if not is_quantized(param) or (self.backend.stacked(param) and expert is None):
            return None
        restored = self.backend.restore(param, self._arrays(param, expert), expert)
        return restored if isinstance(restored, Quantized) else None

    def _arrays(self, param: Param, expert: int | None) -> dict[str, np.ndarray]:
        storage = self.backend.storage(param)
        if expert is None:
            return {component: self.arrays[param.name, component] for component in storage}
        places = {component: place for component, stored in storage.items() if (place := stored.place(expert)) is not None}
        return {component: self.arrays[param.name, component][place] for component, place in places.items()}


def _value(param: Param, expert: int | None, packed: Quantized | np.ndarray) -> Tensor:
    shape = tuple(d for d in (param.type.shape if expert is None else param.type.shape[1:]) if isinstance(d, int))
    fmt = get_format(param.format if isinstance(param.format, str) else param.format[expert or 0])
    if isinstance(fmt, CodedFormat):
        assert isinstance(packed, Quantized)
        return torch.from_numpy(fmt.dequantize(packed.codes, packed.scale, packed.zero)).view(shape)
    assert isinstance(fmt, PlainFormat)
    assert isinstance(packed, np.ndarray)
    if param.type.dtype != "f32":
        return torch.from_numpy(np.array(packed)).view(shape)
    return torch.from_numpy(fmt.unpack({"data": packed}, shape).copy())


def open_artifact(path: str | Path) -> tuple[Graph, ArtifactWeights]:
    """The graph of an artifact and the values of its weights, for the interpreter."""
    artifact = open_for_reading(path)
    graph = parse_graph(artifact.read("graph.txt").decode())
    portable = bool(artifact.executor.get("portable", False))
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in artifact.manifest.target.items()}
    target = Target(**fields)
    activations = str(artifact.executor.get("activations", "float"))
    terms = bool(artifact.executor.get("terms", False))
    return graph, ArtifactWeights(artifact, make_backend(artifact.manifest.backend, graph, target, portable, activations, terms))
