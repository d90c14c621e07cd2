"""Derivatives through a graph: run it forward in segments, keep what crosses their borders, and go back segment by segment.

    forward   h0 -> [segment 1] -> h1 -> [segment 2] -> h2 -> loss        h0, h1, h2 are kept for every batch
    backward        run segment 2 again from h1 with a tape, then segment 1 from h0

A segment ends after each `experts` node. What is held at once is one segment's weights (for all batches) and tape (for one batch), and the
border values of all batches: tokens x hidden size x layers floats. Everything costs one forward pass more than keeping the whole tape
(https://arxiv.org/abs/1604.06174). Choices (`router` ids) are constants; the weights of the chosen are differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moec.compiler.interpreter import Interpreter, LazyStack, bind_symbols
from moec.compiler.ir import Graph, Node
from moec.compiler.ops import Stacked
from moec.compiler.weights import WeightSource

Weight = Tensor | LazyStack | Stacked

Loss = Callable[[int, tuple[Tensor, ...]], Tensor]
"""From the index of a batch and the graph's results to a number."""

Seen = Callable[[Node, Sequence[Sequence[Tensor | None]], Tensor | None], None]
"""Told of a wanted node: the node, for every batch its inputs (None in the place of parameters), and the gradients of its first result for
all tokens of all batches, [samples, N, D]; None of the graph's own results, whose gradients a loss knows better."""


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes, and the names of the values that they get from before and hand on."""

    nodes: tuple[Node, ...]
    given: tuple[str, ...]
    handed: tuple[str, ...]


def segments(graph: Graph, cuts: Collection[str] | None = None) -> list[Segment]:
    """The graph cut after the nodes `cuts`, or after each `experts` node."""
    runs: list[list[Node]] = [[]]
    for node in graph.nodes:
        runs[-1].append(node)
        if node.op == "experts" if cuts is None else node.name in cuts:
            runs.append([])
    runs = [run for run in runs if run]
    result = []
    for index, run in enumerate(runs):
        made = {o.name for node in run for o in node.outputs}
        used = {name for node in run for name in node.inputs if name and name not in graph.params}
        later = {name for rest in runs[index + 1 :] for node in rest for name in node.inputs} | set(graph.outputs)
        before = {v.name for v in graph.inputs} | {o.name for prior in runs[:index] for node in prior for o in node.outputs}
        given = sorted((used | later) & before)
        result.append(Segment(tuple(run), tuple(given), tuple(sorted(later & (made | before)))))
    return result


class Tape(Interpreter):
    """A graph that can be differentiated.

    Args:
        graph, weights: what to run.
        leaves: what takes the place of weights, by name: tensors that gradients are wanted of, whose `grad` grows; or for stacked experts
            an object whose items are functions of such tensors.
        cuts: nodes after which segments end; every `experts` node unless given.
        keep: hold every weight once read (for many steps over a model that fits in memory).
        device, dtype: where, and in which float type, everything is computed; torch's default device unless given.
    """

    def __init__(
        self,
        graph: Graph,
        weights: WeightSource,
        leaves: Mapping[str, Tensor | Stacked] | None = None,
        *,
        cuts: Collection[str] | None = None,
        keep: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(graph, weights, device, dtype)
        self.leaves, self.segments, self._keep = dict(leaves or {}), segments(graph, cuts), keep
        self._kept: dict[str, Weight] = {}

    def backward(
        self,
        batches: Sequence[Mapping[str, Tensor]],
        loss: Loss,
        wanted: Collection[str] = (),
        seen: Seen = lambda *_: None,
        samples: int = 1,
    ) -> list[float]:
        """Differentiate a loss of each batch.

        Args:
            batches: inputs by name.
            loss: of one batch; called `samples` times for each, for all batches before it is called for the first one again.
            wanted: names of nodes that `seen` is told of, last layers first, each when all batches are through.
            samples: losses that differ (in what they draw); what lies before the last segment is computed once for all of them.

        Returns:
            The loss of each batch, summed over samples; gradients of leaves are sums likewise.
        """
        symbols = [bind_symbols(self.graph, batch) for batch in batches]
        states = self.forward(batches)
        losses = [0.0] * len(batches)
        handed: list[list[dict[str, Tensor]]] = [[{} for _ in batches] for _ in range(samples)]
        for segment, entry in zip(reversed(self.segments), reversed(states), strict=True):
            weights, last = self._segment_weights(segment), segment is self.segments[-1]
            notes = {node.name: _Notes(node, samples, len(batches)) for node in segment.nodes if node.name in wanted}
            for first in range(samples if last else 1):
                for index in range(len(batches)):
                    given = {n: _leaf(v) for n, v in entry[index].items()}
                    chosen = [first] if last else list(range(samples))
                    with torch.enable_grad():
                        environment = self._through(segment, dict(given), weights, symbols[index], wanted)
                        if last:
                            total = loss(index, tuple(environment[name] for name in self.graph.outputs))
                            losses[index] += float(total.detach())
                    for note in notes.values():
                        note.keep(index, environment)
                    for sample in chosen:
                        pairs = [(environment[n], g) for n, g in handed[sample][index].items() if environment[n].requires_grad]
                        roots, seeds = ([total], [torch.ones_like(total)]) if last else ([v for v, _ in pairs], [g for _, g in pairs])
                        if roots and any(r.requires_grad for r in roots):
                            torch.autograd.backward(roots, seeds, retain_graph=sample != chosen[-1])
                        for note in notes.values():
                            note.take(sample, index, environment, note.node.name in self.graph.outputs)
                        handed[sample][index] = {n: v.grad for n, v in given.items() if v.grad is not None}
                        for value in given.values():
                            value.grad = None
            entry.clear()
            for note in reversed(notes.values()):
                seen(note.node, note.inputs, note.gradients())
        return losses

    @torch.no_grad()
    def forward(self, batches: Sequence[Mapping[str, Tensor]]) -> list[list[dict[str, Tensor]]]:
        """The values that each segment is given, by segment and batch (the last segment is not run)."""
        current = [{v.name: self._cast(b[v.name]) for v in self.graph.inputs if v.name in self.segments[0].given} for b in batches]
        states = []
        for segment in self.segments:
            states.append(current)
            if segment is not self.segments[-1]:
                weights = self._segment_weights(segment)
                pairs = zip(current, batches, strict=True)
                ends = [self._through(segment, dict(e), weights, bind_symbols(self.graph, b)) for e, b in pairs]
                current = [{n: end[n] for n in segment.handed} for end in ends]
        return states

    def logits(self, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """The graph's first result for each batch, without a tape."""
        return list(self.rest(batches, self.forward(batches)[-1], len(self.segments) - 1))

    @torch.no_grad()
    def rest(self, batches: Sequence[Mapping[str, Tensor]], states: Sequence[Mapping[str, Tensor]], start: int) -> Iterator[Tensor]:
        """The graph's first result for each batch, from the values that the segment `start` is given."""
        weights = [self._segment_weights(segment) for segment in self.segments[start:]]
        for state, batch in zip(states, batches, strict=True):
            current, symbols = dict(state), bind_symbols(self.graph, batch)
            for segment, values in zip(self.segments[start:], weights, strict=True):
                current = self._through(segment, current, values, symbols)
                current = {n: current[n] for n in segment.handed}
            yield current[self.graph.outputs[0]]

    def _segment_weights(self, segment: Segment) -> dict[str, Weight]:
        weights: dict[str, Weight] = {}
        for node in segment.nodes:
            for name in (n for n in node.inputs if n in self.graph.params):
                if name in self.leaves:
                    weights[name] = self.leaves[name]
                elif name in self._kept:
                    weights[name] = self._kept[name]
                elif name not in weights:
                    weights |= {n: w for n, w in self._weights(node).items() if n not in self.leaves}
        if self._keep:
            self._kept |= {n: w for n, w in weights.items() if n not in self.leaves}
        return weights

    def _through(
        self,
        segment: Segment,
        environment: dict[str, Tensor],
        weights: Mapping[str, Weight],
        symbols: Mapping[str, int],
        wanted: Collection[str] = (),
    ) -> dict[str, Tensor]:
        for node in segment.nodes:
            self._step(node, weights, environment, symbols)
            if node.name in wanted and (name := node.outputs[0].name) not in self.graph.outputs:
                # A value that depends on no leaf starts a tape of its own.
                environment[name].requires_grad_().retain_grad()
        return environment


class _Notes:
    """What is to be told of one node."""

    def __init__(self, node: Node, samples: int, batches: int) -> None:
        self.node = node
        self.inputs: list[list[Tensor | None]] = [[] for _ in range(batches)]
        self._found: list[list[Tensor | None]] = [[None] * batches for _ in range(samples)]

    def keep(self, index: int, environment: Mapping[str, Tensor]) -> None:
        """Keep the inputs of a batch."""
        if not self.inputs[index]:
            self.inputs[index] = [environment[n].detach() if n in environment else None for n in self.node.inputs]

    def take(self, sample: int, index: int, environment: Mapping[str, Tensor], result: bool) -> None:
        """Take the gradient of a batch off its tape."""
        value = environment[self.node.outputs[0].name]
        if not result:
            self._found[sample][index] = (torch.zeros_like(value) if value.grad is None else value.grad).flatten(0, -2)
        value.grad = None

    def gradients(self) -> Tensor | None:
        """[S, N, D], all batches one after the other."""
        rows = [[g for g in sample if g is not None] for sample in self._found]
        return torch.stack([torch.cat(row) for row in rows]) if all(rows) else None


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_() if value.is_floating_point() else value
