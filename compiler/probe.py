"""What a unit's quantisation changes: text runs through the model once, and at each node every unit is put into every format.

With x [n, D] the tokens of an expert, g their routing weights and f the expert, a unit in a format changes the layer's output z by

    delta = g (f'(x) - f(x))        [n, D];   linear layers: delta = x (W' - W)^T;   embeddings: delta = W'[ids] - W[ids]

while everything before it is unchanged. The quantised values of one expert are held at a time, and where gradients are asked for
(G, of the log-likelihood of a window, by z) those of one segment of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.allocation import Problem
from moec.compiler.calibration.collect import batches_of
from moec.compiler.change import Change, Part, Reached
from moec.compiler.gradients import Tape
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Node
from moec.compiler.layers import MoeLayer, moe_layers
from moec.compiler.moments import moment_of
from moec.compiler.observed import joined
from moec.compiler.ops import expert_activation
from moec.runtime.host import physical_cores

HEAD_ELEMENTS = 1 << 24
"""Logits that are looked at together."""


Score = Callable[[Change], float]
"""What a change does, in a unit of the objective's own, summed over its tokens."""


def probe(problem: Problem, score: Score, labels: str | None = None, samples: int = 1) -> Tensor:
    """A number for each unit in each format: float64 [U, O], zero where the unit may not get the format.

    Args:
        labels: ask for gradients, of labels `sampled` from the model itself, which makes the mean of squares the Fisher information, or
            of the `text`'s own next tokens (one sample; the empirical Fisher).
        samples: S, how many times labels are drawn.
    """
    prober = Prober(problem, score)
    run_probe(prober, labels, samples)
    return prober.result


def run_probe(prober: Prober, labels: str | None, samples: int) -> None:
    """Show a prober the nodes that have units; see `probe`."""
    problem, batches = prober.problem, batches_of(prober.problem.text)
    with problem.context.progress.counter("probe") as count:
        if labels is None:
            Interpreter(problem.model.graph, problem.model.weights).run(batches, lambda *_: None, count, prober)
            return
        wanted, device = {name for unit in problem.units for name in unit.uses}, torch.get_default_device()
        generator, seen = torch.Generator(device).manual_seed(problem.context.seed), list[str]()

        def loss(index: int, outputs: tuple[Tensor, ...]) -> Tensor:
            p = outputs[0].detach().softmax(-1)  # [B, T, V]
            if labels == "text":
                drawn = batches[index]["ids"][:, 1:].to(device)
                p[:, -1] = 0  # what comes after a window is not known
            else:
                drawn = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(p.shape[:2])
            p[:, : drawn.shape[1]].scatter_add_(2, drawn[..., None], p.new_full((*drawn.shape, 1), -1.0))
            total: Tensor = torch.linalg.vecdot(outputs[0], p).sum()  # with the cross entropy's derivative: p less what was drawn
            return total

        def show(node: Node, inputs: Sequence[Sequence[Tensor | None]], gradients: Tensor | None) -> None:
            prober.visit(node, inputs, gradients)
            seen.append(node.name)
            count(len(seen), len(wanted))

        Tape(problem.model.graph, problem.model.weights).backward(batches, loss, wanted, show, samples)


@dataclass
class Prober:
    """The observer that puts units into formats."""

    problem: Problem
    score: Score
    result: Tensor = field(init=False)

    def __post_init__(self) -> None:
        problem = self.problem
        self.result = torch.zeros(len(problem.units), len(problem.formats), dtype=torch.float64, device="cpu")
        self._layers = {layer.name: layer for layer in moe_layers(problem.model.graph)}
        self.units: dict[tuple[str, int | None], list[int]] = {}
        for index, unit in enumerate(problem.units):
            for name in unit.uses:
                self.units.setdefault((name, unit.expert), []).append(index)
        windows, tokens = problem.text.ids.shape
        self._window = torch.arange(windows, device=torch.get_default_device()).repeat_interleave(tokens)

    def visit(self, node: Node, inputs: Sequence[Sequence[Tensor | None]], gradients: Tensor | None = None) -> None:
        """See `Observer`."""
        if (node.name, None) in self.units:
            if node.op == "embedding":
                self._embedding(node, torch.cat([batch[0].flatten() for batch in inputs if batch[0] is not None]), gradients)
            else:
                self._linear(node, joined(inputs, 0), gradients)
        layer = self._layers.get(node.name)
        if layer is not None and (node.name, 0) in self.units:
            x, ids, routing = (joined(inputs, i) for i in range(3))  # [N, D], [N, K], [N, K]
            with _each(x.is_cpu) as each:
                each(partial(self._routed, layer, x, ids, routing, gradients), range(layer.count))

    def _reached(self, token: Tensor, routed: Tensor, gradients: Tensor | None, logits: Tensor | None = None) -> Reached:
        return Reached(token, self._window[token], routed, None if gradients is None else gradients[:, token], logits)

    def _embedding(self, node: Node, ids: Tensor, gradients: Tensor | None) -> None:
        weight, token = self.problem.model.load(node.inputs[1]), torch.arange(len(ids), device=ids.device)
        reached = self._reached(token, torch.ones(len(ids), device=ids.device), gradients)
        for index, at, fmt in self.trials(node.name, None):
            self.note(
                index, at, Change(self.problem.units[index], node.name, reached, (Part((self.quantized(weight, fmt) - weight)[ids]),), list)
            )

    def _linear(self, node: Node, x: Tensor, gradients: Tensor | None) -> None:
        weight, result = self.problem.model.load(node.inputs[1]), node.name in self.problem.model.graph.outputs
        moment = _Moment(x)
        errors = {fmt: self.quantized(weight, fmt, None if result else moment) - weight for _, _, fmt in self.trials(node.name, None)}
        size = max(1, HEAD_ELEMENTS // len(weight)) if result else len(x)
        for token in torch.arange(len(x), device=x.device).split(size):
            part = x[token]
            bias = self.problem.model.load(node.inputs[2]) if result and len(node.inputs) > 2 and node.inputs[2] else None
            reached = self._reached(
                token, torch.ones(len(token), device=x.device), gradients, F.linear(part, weight, bias) if result else None
            )
            for index, at, fmt in self.trials(node.name, None):
                error = errors[fmt]
                made = partial(_pairs, [error], [moment])
                self.note(index, at, Change(self.problem.units[index], node.name, reached, (Part(part, error),), made))

    def _routed(self, layer: MoeLayer, x: Tensor, ids: Tensor, routing: Tensor, gradients: Tensor | None, expert: int) -> None:
        token, slot = torch.where(ids == expert)
        if len(token):
            self.expert(layer, expert, x[token], self._reached(token, routing[token, slot], gradients))

    def expert(self, layer: MoeLayer, expert: int, x: Tensor, reached: Reached) -> None:
        """Try the units of an expert, whose tokens are x [n, D]."""
        model = self.problem.model
        bias = model.load(layer.biases[0])[expert] if layer.experts.inputs[5:6] not in ((), ("",)) else None
        up, down = model.load(layer.up, expert), model.load(layer.down, expert)

        def hidden(weight: Tensor) -> Tensor:
            return expert_activation(F.linear(x, weight, bias), **layer.activation)

        h = hidden(up)
        moments = {layer.up: _Moment(x, reached.routed), layer.down: _Moment(h, reached.routed)}
        back = None if reached.gradients is None else reached.pulled @ down  # [S, n, F]
        for fmt, trials in self.by_format(layer.name, expert):
            members = {member for index, _ in trials for member in self.problem.units[index].members}
            tried = {m: self.quantized(w, fmt, moments[m]) - w for m, w in ((layer.up, up), (layer.down, down)) if m in members}
            changed = hidden(up + tried[layer.up]) if layer.up in members else h
            for index, at in trials:
                own = self.problem.units[index].members
                parts = [Part(changed - h, down, back)] if layer.up in own else []
                if layer.down in own:
                    parts.append(Part(changed if layer.up in own else h, tried[layer.down]))
                made = partial(_pairs, [tried[m] for m in own], [moments[m] for m in own])
                self.note(index, at, Change(self.problem.units[index], layer.name, reached, tuple(parts), made))

    def trials(self, node: str, expert: int | None) -> Iterator[tuple[int, int, str]]:
        """What is to be tried at a node: unit, column and format."""
        for at, fmt in enumerate(self.problem.formats):
            for index in self.units[node, expert]:
                if self.problem.allowed[index, at]:
                    yield index, at, fmt

    def by_format(self, node: str, expert: int | None) -> Iterable[tuple[str, list[tuple[int, int]]]]:
        """`trials`, those of one format together."""
        found: dict[str, list[tuple[int, int]]] = {}
        for index, at, fmt in self.trials(node, expert):
            found.setdefault(fmt, []).append((index, at))
        return found.items()

    def quantized(self, weight: Tensor, fmt: str, moment: _Moment | None = None) -> Tensor:
        """See `Problem.changed`."""
        return self.problem.changed(weight, fmt, None if moment is None else lambda: moment.value)

    def note(self, index: int, at: int, change: Change) -> None:
        """Add the score of a change: a tied matrix has one for each of its uses."""
        self.result[index, at] += self.score(change)


class _Moment:
    """The second moment of inputs [n, K], each weighted by scale^2, made once if it is asked for."""

    def __init__(self, x: Tensor, scale: Tensor | None = None) -> None:
        self._x, self._scale = x, scale

    @cached_property
    def value(self) -> Tensor:
        """[K, K] float32."""
        return moment_of([self._x], self._scale)


def _pairs(errors: Sequence[Tensor], moments: Sequence[_Moment]) -> list[tuple[Tensor, Tensor]]:
    return [(error, moment.value) for error, moment in zip(errors, moments, strict=True)]


@contextmanager
def _each(threads: bool) -> Iterator[Callable[[Callable[[int], Any], Iterable[int]], None]]:
    """What calls a function for each of some numbers: on the processor several at a time, each on one core."""
    if not threads:
        yield lambda work, numbers: list(map(work, numbers)).clear()
        return
    with ThreadPoolExecutor(physical_cores(), "probe", torch.set_num_threads, (1,)) as pool:
        yield lambda work, numbers: list(pool.map(work, numbers)).clear()
