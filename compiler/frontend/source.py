"""The weights that a graph in normal form reads: a checkpoint's or a module's, constants, and layouts applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from moec.compiler.aten import DTYPE_NAMES
from moec.compiler.errors import MoecError
from moec.compiler.frontend.layout import Computed, Layout
from moec.compiler.ir import Graph, Param


class Stored(Protocol):
    """Weights in the module's own layout."""

    def load(self, name: str, expert: int | None = None) -> Tensor: ...
    def format(self, name: str) -> str: ...
    def check(self, param: Param) -> None: ...


@dataclass(frozen=True)
class ModuleWeights:
    """The parameters and buffers of a module in memory."""

    tensors: Mapping[str, Tensor]

    def load(self, name: str, expert: int | None = None) -> Tensor:
        if name not in self.tensors:
            raise MoecError(f"the module has no parameter called {name!r}")
        value = self.tensors[name].detach()
        return value if expert is None else value[expert]

    def format(self, name: str) -> str:
        return DTYPE_NAMES[self.tensors[name].dtype]

    def check(self, param: Param) -> None:
        found, expected = tuple(self.tensors[param.name].shape), tuple(param.type.shape)
        if found != expected:
            raise MoecError(f"{param.name} has the shape {list(found)}, expected {list(expected)}")


@dataclass(frozen=True)
class NoWeights:
    """A model of which only config.json is there: the graph can be made and planned, not executed."""

    where: str
    dtype: str

    def load(self, name: str, expert: int | None = None) -> Tensor:
        raise MoecError(f"{self.where}: there are no weights in this folder, so {name} cannot be read; download *.safetensors")

    def format(self, name: str) -> str:
        return self.dtype

    def check(self, param: Param) -> None:
        return None


@dataclass(frozen=True)
class GraphWeights:
    """The `WeightSource` of a graph in normal form.

    Args:
        stored: the weights as the model keeps them.
        constants: values that are no weights (rotary frequencies, tables made while tracing).
        layouts: what to do to a parameter when it is read.
        original: the parameters as the model keeps them.
    """

    stored: Stored
    constants: Mapping[str, Tensor]
    layouts: Mapping[str, Layout | Computed]
    original: Mapping[str, Param]
    latest: dict[str, Tensor] = field(default_factory=dict)

    def load(self, name: str, expert: int | None = None) -> Tensor:
        """The value of a parameter, or of one index of its first axis, in the element type it is stored in."""
        if name in self.constants:
            value = self.constants[name]
            return value if expert is None else value[expert]
        layout = self.layouts.get(name)
        if isinstance(layout, Computed):
            value = self._computed(name, layout)
            return value if expert is None else value[expert]
        value = self.stored.load(name, expert)
        return value if layout is None else layout.apply(value, stacked=expert is None)

    def _computed(self, name: str, layout: Computed) -> Tensor:
        """A computed parameter's value; the latest one is kept, since experts are asked for one after the other."""
        if name not in self.latest:
            self.latest.clear()
            self.latest[name] = layout.value({p.name: self.stored.load(p.name) for p in layout.inputs})
        return self.latest[name]

    def _format(self, name: str) -> str:
        if name in self.constants:
            return DTYPE_NAMES[self.constants[name].dtype]
        layout = self.layouts.get(name)
        return self.stored.format(layout.inputs[0].name if isinstance(layout, Computed) else name)

    def formatted(self, graph: Graph) -> Graph:
        """The graph with each parameter's format that of the stored weight."""
        formats = {name: self._format(name) for name in graph.params}
        return graph.with_params(replace(p, format=formats[n]) for n, p in graph.params.items())

    def check(self, graph: Graph) -> None:
        """Check every parameter's presence and shape before long work starts.

        Raises:
            MoecError: one is missing or has another shape.
        """
        for name in graph.params:
            layout = self.layouts.get(name)
            if isinstance(layout, Computed):
                for param in layout.inputs:
                    self.stored.check(param)
            elif name not in self.constants:
                self.stored.check(self.original[name])


def check(graph: Graph, weights: Any) -> None:
    """Check that `weights` has every parameter of the graph, in the right shape, from file headers alone."""
    if isinstance(weights, GraphWeights):
        weights.check(graph)
