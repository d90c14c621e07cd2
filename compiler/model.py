"""A model in the compiler: a graph and the values of its parameters. Passes turn one into another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.ir import Graph, Param
from moec.compiler.text import print_graph
from moec.compiler.weights import Edit, Edited, WeightSource


@dataclass(frozen=True)
class Model:
    """A graph and its weights."""

    graph: Graph
    weights: WeightSource

    def load(self, name: str, expert: int | None = None) -> Tensor:
        """The value of a parameter (or of one expert of it) in float32, or as the integers it is, on torch's default device."""
        value = self.weights.load(name, expert).to(torch.get_default_device())
        return value.float() if value.is_floating_point() else value

    def edited(self, graph: Graph, edits: Mapping[str, Edit]) -> Model:
        """A model with another graph, in which the parameters in `edits` have new values."""
        return Model(graph, Edited(self.weights, edits) if edits else self.weights)

    def with_params(self, params: Iterable[Param], edits: Mapping[str, Edit]) -> Model:
        """This model with parameters added or replaced, types and values."""
        return self.edited(self.graph.with_params(params), edits)

    def digest(self) -> str:
        """What tells one graph from another; values of weights are not looked at."""
        return hashlib.sha256(print_graph(self.graph).encode()).hexdigest()
