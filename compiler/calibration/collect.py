"""Running calibration text through a model and summing what its experts do.

Each node runs for all windows before the next one starts, so that the weights of one layer are in memory at a time; an expert's
outputs are computed once, for the statistics and for the model.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moec.compiler.calibration.statistics import LayerStatistics, Statistics, load_statistics, load_unfinished
from moec.compiler.calibration.text import Text
from moec.compiler.damage import batches
from moec.compiler.errors import MoecError
from moec.compiler.interpreter import Interpreter, States
from moec.compiler.ir import Node
from moec.compiler.layers import MoeLayer, moe_layers
from moec.compiler.model import Model
from moec.compiler.observed import joined, parted, rows
from moec.compiler.ops import expert_activation, router_scores
from moec.compiler.progress import Progress


def batches_of(text: Text) -> list[dict[str, Tensor]]:
    """The windows as inputs of a graph, some at a time."""
    return batches(text.ids)


FINGERPRINT_VALUES = 4096
"""So many values of each weight are looked at to tell models apart."""


def model_fingerprint(model: Model) -> str:
    """What tells a model from another of the same shape: the graph, and values all over every weight (of stacked ones of three experts)."""
    digest = hashlib.sha256(model.digest().encode())
    stacked = {name for node in model.graph.nodes if node.op == "experts" for name in node.inputs[3:5]}
    for name, param in model.graph.params.items():
        last = int(param.type.shape[0]) - 1 if name in stacked else 0
        for expert in sorted({0, last // 2, last}) if name in stacked else (None,):
            value = model.weights.load(name, expert).flatten()
            digest.update(value[:: max(1, len(value) // FINGERPRINT_VALUES)].double().cpu().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: Model, text: Text) -> str:
    """What statistics are of: `model_fingerprint` and the text's."""
    return model_fingerprint(model) + text.fingerprint()


SNAPSHOT_EVERY_S = 20.0
"""A run that keeps its state writes it after a layer if so many seconds have passed: it is as large as the states of all windows."""


def load_or_collect(model: Model, text: Text, file: Path, progress: Progress) -> Statistics:
    """Statistics from a file if there is one, else measured and written there.

    A run that was cut off goes on after the last layer that it had written to the file's neighbour `FILE.unfinished`.

    Raises:
        MoecError: the file's statistics are of another model or text.
    """
    if not file.exists():
        measured = collect(model, text, progress, unfinished := file.with_name(file.name + ".unfinished"))
        measured.save(file)
        unfinished.unlink(missing_ok=True)
        return measured
    found = load_statistics(file)
    if found.fingerprint != fingerprint(model, text):
        raise MoecError(f"{file}: these statistics are of another model or calibration text; remove the file to measure anew")
    return found


def collect(model: Model, text: Text, progress: Progress | None = None, unfinished: Path | None = None) -> Statistics:
    """Measure what the experts of a model do on calibration text.

    Args:
        unfinished: a file that keeps the latest finished layer's state; an earlier run of the same model and text goes on from it.
    """
    observer, resume, mark = _Collector(model, text), None, fingerprint(model, text)
    last = time.monotonic()

    def made() -> Statistics:
        return Statistics(observer.layers, observer.linear, text.domains, text.ids.shape[1], mark)

    def keep(index: int, states: States) -> None:
        nonlocal last
        if unfinished is not None and model.graph.nodes[index].name in observer.layers and time.monotonic() - last >= SNAPSHOT_EVERY_S:
            made().save(unfinished, (index, states))
            last = time.monotonic()

    if unfinished is not None and unfinished.is_file():
        found, states = load_unfinished(unfinished)
        if states is not None and found.fingerprint == mark:
            observer.layers, observer.linear, resume = dict(found.layers), dict(found.linear_square), states
    with (progress or Progress(quiet=True)).counter("calibrate") as count:
        Interpreter(model.graph, model.weights).run(batches_of(text), lambda *_: None, count, observer, keep, resume)
    return made()


@dataclass
class _Collector:
    """The observer that sums."""

    model: Model
    text: Text
    layers: dict[str, LayerStatistics] = field(default_factory=dict)
    linear: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._layers = {layer.name: layer for layer in moe_layers(self.model.graph)}
        self._last = {layer.router.name: layer.name for layer in self._layers.values()}  # several may have one router
        self._logits: dict[str, Tensor] = {}
        self._scores: dict[str, Tensor] = {}

    def visit(self, node: Node, inputs: Sequence[Sequence[Tensor | None]]) -> Sequence[tuple[Tensor, ...]] | None:
        """See `Observer`."""
        if node.op == "linear" and node.inputs[1] in self.model.graph.params:
            parts = [rows(batch[0]) for batch in inputs]
            self.linear[node.inputs[1]] = torch.stack([x.square().sum(0).double() for x in parts]).sum(0) / sum(map(len, parts))
        elif (name := node.name) in self._last:
            self._logits[name] = joined(inputs, 0).float()
            score = str(node.attrs.get("score", "softmax"))
            self._scores[name] = router_scores(self._logits[name], "softmax" if score == "softmax_topk" else score)
        elif (layer := self._layers.get(node.name)) is not None:
            return self._experts(layer, inputs)
        if node.name in self.model.graph.outputs:  # nobody reads the logits, and they are a large part of the work
            return [(torch.empty(0),)] * len(inputs)
        return None

    def _experts(self, layer: MoeLayer, inputs: Sequence[Sequence[Tensor | None]]) -> list[tuple[Tensor, ...]]:
        """Sum over one `experts` node, and compute it."""
        x, ids, weights = (joined(inputs, i) for i in range(3))  # [N, D], [N, K], [N, K]
        sums = _Sums(layer, x.shape[-1])
        result = torch.zeros_like(x)
        for expert in range(layer.count):
            token, slot = torch.where(ids == expert)
            if len(token):
                g = weights[token, slot]
                f, h = expert_outputs(self.model, layer, expert, x[token])
                sums.add(expert, x[token], h, f, g)
                result.index_add_(0, token, f * g[:, None])
        window = self.text.ids.shape[1]
        domain = torch.tensor(self.text.domain).repeat_interleave(window)
        router = layer.router.name
        self.layers[layer.name] = sums.finish(ids, weights, self._logits[router], self._scores[router], domain, self.text)
        if self._last[router] == layer.name:
            del self._logits[router], self._scores[router]
        return parted(result, inputs)


def expert_outputs(model: Model, layer: MoeLayer, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """One expert on tokens x [n, D]: its outputs [n, D] before the routing weight, and what enters its down projection [n, F]."""
    up, down = (layer.matrix(model, name, expert).to(x.device) for name in (layer.up, layer.down))
    biases = [None if bias is None else bias.to(x.device)[expert] for bias in layer.load_biases(model)]
    h = expert_activation(torch.nn.functional.linear(x, up, biases[0]), **layer.activation)
    return torch.nn.functional.linear(h, down, biases[1]), h


class _Sums:
    """The sums of one layer in the making."""

    def __init__(self, layer: MoeLayer, hidden: int) -> None:
        e, d, f = layer.count, hidden, layer.width
        sizes = {
            "weight": (e,), "weight_square": (e,), "output_norm": (e,), "weighted_norm": (e,), "output_peak": (e,), "output": (e, d),
            "input_square": (e, d), "weighted_input_square": (e, d), "hidden_square": (e, f), "weighted_hidden_square": (e, f),
            "weighted_hidden": (e, f),
        }  # fmt: skip
        self.count = torch.zeros(e, dtype=torch.int64)
        self.sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}

    def add(self, expert: int, x: Tensor, h: Tensor, f: Tensor, g: Tensor) -> None:
        """Tokens of one expert: x [n, D], h [n, F], f [n, D], g [n]."""
        self.count[expert] += len(g)
        norm, weights = f.norm(dim=1), torch.stack((torch.ones_like(g), g, g.square()))  # [3, n]: sums over tokens are products with these
        x_square, h_square = weights @ x.square(), weights @ h.square()  # [3, D], [3, F]
        parts = {
            "weight": g.sum(), "weight_square": weights[2].sum(), "output_norm": norm.sum(), "weighted_norm": g @ norm, "output": f.sum(0),
            "input_square": x_square[0], "weighted_input_square": x_square[2], "hidden_square": h_square[0],
            "weighted_hidden_square": h_square[2], "weighted_hidden": g @ h.abs(),
        }  # fmt: skip
        for name, part in parts.items():
            self.sums[name][expert] += part.double()
        self.sums["output_peak"][expert] = max(float(self.sums["output_peak"][expert]), float(f.abs().max()))

    def finish(self, ids: Tensor, weights: Tensor, logits: Tensor, scores: Tensor, domain: Tensor, text: Text) -> LayerStatistics:
        """The statistics, with what concerns the routing as a whole."""
        e = len(self.count)
        chosen = torch.zeros(len(ids), e + 1).scatter_(1, ids.clamp(-1, e).where(ids >= 0, torch.tensor(e)), 1.0)[:, :e]  # [N, E]
        domains = torch.zeros(len(text.domains), e).index_add_(0, domain, chosen).long()
        wide = logits.double()
        return LayerStatistics(
            count=self.count, **self.sums, score=scores.double().sum(0), logit=wide.sum(0), logit_moment=wide.T @ wide,
            together=(chosen.T @ chosen).long(), domain_count=domains, ids=ids.to(torch.int16), weights=weights.half(),
        )  # fmt: skip
