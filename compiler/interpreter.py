"""The meaning of a graph: every node run in torch, one after the other.

Weights are asked for when a node needs them and dropped after it, an expert at a time where the op allows, and each node runs
for all batches before the next node starts: a model larger than memory is evaluated with one layer of weights in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moec.compiler import aten
from moec.compiler.ir import Dim, Graph, Node, dim_symbols, dim_value
from moec.compiler.ops import EXPERT_MATRICES, OPS, Stacked
from moec.compiler.text import print_node
from moec.compiler.weights import WeightSource


class Observer(Protocol):
    """Sees a graph run, node by node: calibration and calibrated quantisation are observers."""

    def visit(self, node: Node, inputs: Sequence[Sequence[Tensor | None]]) -> Sequence[tuple[Tensor, ...]] | None:
        """Called before a node runs, and before its weights are read (they may be changed now).

        Args:
            node: what is about to run.
            inputs: for every batch the node's inputs; None in the place of parameters.

        Returns:
            The node's results for every batch, if the observer has computed them; None to have them computed.
        """
        ...


States = Sequence[Mapping[str, Tensor]]
"""For every batch the values that later nodes read."""


STACKED_INPUTS = {"experts": EXPERT_MATRICES}
"""Inputs that an op reads one index of the first axis at a time."""


@dataclass
class LazyStack:
    """A stacked weight [E, ...] whose experts are read when they are indexed."""

    weights: WeightSource
    name: str
    shape: Sequence[int]
    device: torch.device
    dtype: torch.dtype
    is_meta: bool = False
    _cache: dict[int, Tensor] = field(default_factory=dict)

    def __getitem__(self, expert: int) -> Tensor:
        if expert not in self._cache:
            self._cache[expert] = self.weights.load(self.name, expert).to(self.device, self.dtype)
        return self._cache[expert]


def bind_symbols(graph: Graph, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """The values of the graph's symbols for these inputs.

    Raises:
        ValueError: an input is missing or its shape or element type does not fit.
    """
    symbols: dict[str, int] = {}
    for value in graph.inputs:
        if value.name not in inputs:
            raise ValueError(f"graph {graph.name}: input %{value.name}: {value.type} is missing")
        shape = tuple(inputs[value.name].shape)
        fits = len(shape) == len(value.type.shape) and all(
            symbols.setdefault(dim, size) == size if isinstance(dim, str) and dim_symbols(dim) == {dim} else dim == size
            for dim, size in zip(value.type.shape, shape, strict=True)
        )
        if not fits:
            raise ValueError(f"graph {graph.name}: input %{value.name}: {value.type} got the shape {list(shape)}")
    return symbols


class Interpreter:
    """Runs a graph in torch.

    Args:
        graph: what to run.
        weights: values of its parameters.
        device, dtype: where, and in which float type, everything is computed; torch's default device unless given.
    """

    def __init__(
        self, graph: Graph, weights: WeightSource, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.graph, self.weights, self.dtype = graph, weights, dtype
        self.device = torch.get_default_device() if device is None else torch.device(device)
        last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
        self._dead: dict[int, list[str]] = {}
        for name, index in last_use.items():
            if name not in graph.params and name not in graph.outputs:
                self._dead.setdefault(index, []).append(name)

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        """The graph's results for one batch of inputs, given by name."""
        results: list[tuple[Tensor, ...]] = []
        self.run([inputs], lambda _, outputs: results.append(outputs))
        return results[0]

    @torch.no_grad()
    def run(
        self,
        batches: Iterable[Mapping[str, Tensor]],
        consume: Callable[[int, tuple[Tensor, ...]], None],
        progress: Callable[[int, int], None] | None = None,
        observer: Observer | None = None,
        snapshot: Callable[[int, States], None] | None = None,
        resume: tuple[int, States] | None = None,
    ) -> None:
        """Run many batches, node by node.

        Args:
            batches: inputs by name, a mapping a batch.
            consume: called once a batch with its index and the graph's results, which are dropped afterwards.
            progress: called after each node with the number of nodes done and of all nodes.
            observer: shown each node before it runs.
            snapshot: called after each node but the last ones with its index and the values that are alive.
            resume: what `snapshot` was called with in an earlier run of the same batches: goes on after that node.
        """
        environments: list[dict[str, Tensor]] = []
        symbols = []
        for batch in batches:
            symbols.append(bind_symbols(self.graph, batch))
            environments.append({v.name: self._cast(batch[v.name]) for v in self.graph.inputs})
        first = 0
        if resume is not None:
            first, environments = resume[0] + 1, [{n: self._cast(v) for n, v in state.items()} for state in resume[1]]
        ready = max((i for i, n in enumerate(self.graph.nodes) if any(o.name in self.graph.outputs for o in n.outputs)), default=-1)
        for index, node in enumerate(self.graph.nodes[first:], first):
            given = observer.visit(node, [self._activations(node, e) for e in environments]) if observer else None
            weights = self._weights(node) if given is None else {}
            for batch_index, environment in enumerate(environments):
                if given is None:
                    self._step(node, weights, environment, symbols[batch_index])
                else:
                    environment.update(zip((o.name for o in node.outputs), given[batch_index], strict=True))
                for name in self._dead.get(index, ()):
                    environment.pop(name, None)
                if index == ready:
                    consume(batch_index, tuple(environment[name] for name in self.graph.outputs))
                    environments[batch_index] = {}
            if progress:
                progress(index + 1, len(self.graph.nodes))
            if index == ready:
                return
            if snapshot:
                snapshot(index, environments)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype if tensor.is_floating_point() else tensor.dtype)

    def _weights(self, node: Node) -> dict[str, Tensor | LazyStack]:
        weights: dict[str, Tensor | LazyStack] = {}
        for position, name in enumerate(node.inputs):
            if (param := self.graph.params.get(name)) is None:
                continue
            if position in STACKED_INPUTS.get(node.op, ()):
                shape = [d for d in param.type.shape if isinstance(d, int)]
                weights[name] = LazyStack(self.weights, name, shape, self.device, self.dtype)
            else:
                weights[name] = self._cast(self.weights.load(name))
        return weights

    def _activations(self, node: Node, environment: Mapping[str, Tensor]) -> list[Tensor | None]:
        return [environment.get(name) for name in node.inputs]

    def _step(
        self,
        node: Node,
        weights: Mapping[str, Tensor | LazyStack | Stacked],
        environment: dict[str, Tensor],
        symbols: Mapping[str, int],
    ) -> None:
        tensors = [None if not name else weights[name] if name in weights else environment[name] for name in node.inputs]
        try:
            outputs = evaluate(node, tensors, symbols, self.dtype, self.device)
        except Exception as error:
            error.add_note(f"in graph {self.graph.name}, node {print_node(self.graph, node)}")
            raise
        environment.update(zip((o.name for o in node.outputs), outputs, strict=True))


def evaluate(
    node: Node,
    tensors: Sequence[Tensor | LazyStack | Stacked | None],
    symbols: Mapping[str, int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, ...]:
    """The results of one node for given inputs."""
    if (op := OPS.get(node.op)) is not None:
        result = op(*tensors, **node.attrs)
    else:
        plain = [t for t in tensors if t is None or isinstance(t, Tensor)]
        result = aten.call(node.op, plain, node.attrs, symbols, dtype, device)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def concrete(shape: Iterable[Dim], symbols: Mapping[str, int]) -> tuple[int, ...]:
    """A shape with the symbols' values put in."""
    return tuple(dim_value(d, symbols) for d in shape)
