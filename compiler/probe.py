"""What a unit's quantisation changes: calibration text runs through the model once, and at each layer every unit is put into every format.

With x [n, D] the tokens of an expert, g their routing weights and f the expert, a unit in a format changes the layer's output z by

    delta = g (f'(x) - f(x))        [n, D];   linear layers: delta = x (W' - W)^T

while everything before it is unchanged. The quantised values of one layer are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.allocation import Problem, Unit
from moec.compiler.calibration.collect import batches_of
from moec.compiler.gradients import Tape
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Node
from moec.compiler.layers import MoeLayer, moe_layers
from moec.compiler.observed import joined, parted
from moec.compiler.ops import expert_activation


@dataclass(frozen=True)
class Change:
    """One unit in one format.

    Args:
        delta: [n, D], the change of the node's output at the tokens that reach the unit.
        token: [n], the tokens of the text that reach the unit.
        window: [n], the window of text of each token.
        gradients: [S, n, D], S samples of the gradient of the log-likelihood of a window by the node's output; None if not asked for.
        errors: of each member, the change of the weight [N, K] and the second moment of what it is multiplied with [K, K].
        routed: [n], the tokens' routing weights (ones in a linear layer).
    """

    unit: Unit
    delta: Tensor
    token: Tensor
    window: Tensor
    gradients: Tensor | None
    errors: list[tuple[Tensor, Tensor]]
    routed: Tensor


Score = Callable[[Change], float]


def probe(problem: Problem, score: Score, gradients: Mapping[str, Tensor] | None = None) -> Tensor:
    """A number for each unit in each format: float64 [U, O].

    Args:
        gradients: by node, [S, N, D] for all N tokens of the text.
    """
    observer = Prober(problem, score, gradients)
    with problem.context.progress.counter("probe") as count:
        Interpreter(problem.model.graph, problem.model.weights).run(batches_of(problem.text), lambda *_: None, count, observer)
    return observer.result


def output_gradients(problem: Problem, samples: int, labels: str) -> dict[str, Tensor]:
    """The gradient of each window's log-likelihood by the output of each node that has units: by node, [S, N, D].

    Args:
        samples: S, how many times labels are drawn.
        labels: `sampled` from the model itself, which makes the mean of squares the Fisher information, or the `text`'s own next tokens
            (S = 1; the empirical Fisher).
    """
    batches, device = batches_of(problem.text), torch.get_default_device()
    wanted = {unit.node for unit in problem.units}
    tape = Tape(problem.model.graph, problem.model.weights)
    rows = [b["ids"].numel() for b in batches]
    starts = [sum(rows[:i]) for i in range(len(rows))]
    found: dict[str, Tensor] = {}
    generator = torch.Generator(device).manual_seed(problem.context.seed)
    for sample in range(samples):

        def loss(index: int, outputs: tuple[Tensor, ...]) -> Tensor:
            logits = outputs[0].flatten(0, 1)
            if labels == "text":
                logits = outputs[0][:, :-1].flatten(0, 1)
                drawn = batches[index]["ids"][:, 1:].flatten().to(device)
            else:
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            return F.cross_entropy(logits, drawn, reduction="sum")

        def seen(name: str, index: int, gradient: Tensor, sample: int = sample) -> None:
            flat = gradient.flatten(0, -2)
            store = found.setdefault(name, torch.zeros(samples, sum(rows), flat.shape[-1], device=device))
            store[sample, starts[index] : starts[index] + rows[index]] = flat

        tape.backward(batches, loss, wanted, seen)
    return found


@dataclass
class Prober:
    """The observer that puts units into formats."""

    problem: Problem
    score: Score
    gradients: Mapping[str, Tensor] | None
    result: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.result = torch.zeros(len(self.problem.units), len(self.problem.formats), dtype=torch.float64)
        self._layers = {layer.name: layer for layer in moe_layers(self.problem.model.graph)}
        self._units: dict[tuple[str, int | None], list[int]] = {}
        for index, unit in enumerate(self.problem.units):
            self._units.setdefault((unit.node, unit.expert), []).append(index)
        windows, tokens = self.problem.text.ids.shape
        self._window = torch.arange(windows, device=torch.get_default_device()).repeat_interleave(tokens)

    def visit(self, node: Node, inputs: Sequence[Sequence[Tensor | None]]) -> Sequence[tuple[Tensor, ...]] | None:
        """See `Observer`."""
        if (node.name, None) in self._units:
            self._linear(node, joined(inputs, 0))
        layer = self._layers.get(node.name)
        return self._experts(layer, inputs) if layer is not None and (node.name, 0) in self._units else None

    def _linear(self, node: Node, x: Tensor) -> None:
        weight = self.problem.model.load(node.inputs[1]).to(x.device)
        moment = _moment(x, None)
        token = torch.arange(len(x), device=x.device)
        for index in self._units[node.name, None]:
            for at, fmt in enumerate(self.problem.formats):
                error = self.problem.changed(weight, fmt, moment) - weight
                self._note(index, at, token, x @ error.T, [(error, moment)], torch.ones_like(x[:, 0]))

    def _experts(self, layer: MoeLayer, inputs: Sequence[Sequence[Tensor | None]]) -> list[tuple[Tensor, ...]]:
        x, ids, routing = (joined(inputs, i) for i in range(3))  # [N, D], [N, K], [N, K]
        result = torch.zeros_like(x)
        for expert in range(layer.count):
            token, slot = torch.where(ids == expert)
            if len(token):
                result.index_add_(0, token, self.expert(layer, expert, x[token], routing[token, slot], token))
        return parted(result, inputs)

    def expert(self, layer: MoeLayer, expert: int, x: Tensor, g: Tensor, token: Tensor) -> Tensor:
        """The weighted outputs [n, D] of an expert, after its units were tried."""
        model = self.problem.model
        biases = [None if bias is None else bias.to(x.device)[expert] for bias in layer.load_biases(model)]
        plain = {name: layer.matrix(model, name, expert).to(x.device) for name in (layer.up, layer.down)}

        def hidden(up: Tensor) -> Tensor:
            return expert_activation(F.linear(x, up, biases[0]), **layer.activation)

        h = hidden(plain[layer.up])
        base = F.linear(h, plain[layer.down], biases[1])
        moments = {layer.up: _moment(x, g), layer.down: _moment(h, g)}
        for at, fmt in enumerate(self.problem.formats):
            tried = {name: self.problem.changed(weight, fmt, moments[name]) for name, weight in plain.items()}
            changed = hidden(tried[layer.up])
            for index in self._units[layer.name, expert]:
                members = self.problem.units[index].members
                down = tried[layer.down] if layer.down in members else plain[layer.down]
                delta = (F.linear(changed if layer.up in members else h, down, biases[1]) - base) * g[:, None]
                errors = [(tried[m] - plain[m], moments[m]) for m in members]
                self._note(index, at, token, delta, errors, g)
        return base * g[:, None]

    def _note(self, index: int, at: int, token: Tensor, delta: Tensor, errors: list[tuple[Tensor, Tensor]], routed: Tensor) -> None:
        unit = self.problem.units[index]
        gradients = None if self.gradients is None else self.gradients[unit.node][:, token]
        self.result[index, at] = self.score(Change(unit, delta, token, self._window[token], gradients, errors, routed))


def _moment(x: Tensor, scale: Tensor | None) -> Tensor:
    """The mean of x x^T over rows, each weighted by scale^2: [K, K] float64."""
    scaled = x if scale is None else x * scale[:, None]
    return (scaled.T @ scaled).double() / max(1, len(x))
