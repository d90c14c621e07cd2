"""A reference model's answers on a text, computed once and shared by all models that are measured against it.

The log-probabilities [N, V] lie in a file that is mapped into memory, so that neither they nor the states of all windows have to fit:
windows run in groups whose states take a bounded amount of memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moec.compiler.damage import Distance, Tally
from moec.compiler.errors import MoecError
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Dim, Graph, dim_symbols, dim_value
from moec.compiler.model import Model
from moec.compiler.progress import Progress

STATE_BYTES = 1 << 30
"""Values between nodes, of all windows of a group."""

BATCH_BYTES = 1 << 26
"""Logits of a batch: enough tokens for the products to be efficient."""

_QUIET = Progress(quiet=True)


def state_bytes(graph: Graph) -> int:
    """Bytes of float32 values that one token keeps alive at most between two nodes; results are handed over at once and do not count.

    >>> from moec.compiler.ir import Node, TensorType, Value
    >>> x, y, z = (Value(name, TensorType("f32", ("B", "T", size))) for name, size in (("x", 3), ("y", 5), ("z", 7)))
    >>> nodes = (Node("silu", ("x",), (y,)), Node("silu", ("y",), (z,)))
    >>> state_bytes(Graph("g", (x,), {}, nodes, ("z",)))
    32
    """
    last = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    live = {v.name: _elements(v.type.shape) for v in graph.inputs}
    most = 0
    for index, node in enumerate(graph.nodes):
        live |= {o.name: _elements(o.type.shape) for o in node.outputs if o.name not in graph.outputs}
        most = max(most, sum(live.values()))
        live = {name: size for name, size in live.items() if last.get(name, -1) > index}
    return 4 * most


def _elements(shape: Sequence[Dim]) -> int:
    total = 1
    for dim in shape:
        total *= dim_value(dim, dict.fromkeys(dim_symbols(dim), 1))
    return total


def each_logits(model: Model, ids: Tensor, consume: Callable[[int, Tensor], None], progress: Progress = _QUIET, name: str = "") -> None:
    """Run windows [W, T] through a model.

    Args:
        consume: called in order with the number of tokens before a batch and the batch's logits [n, V].
    """
    windows, length = ids.shape
    vocabulary = int(model.graph.type_of(model.graph.outputs[0]).shape[-1])
    size = max(1, BATCH_BYTES // (4 * vocabulary * length))  # windows of a batch
    group = max(size, STATE_BYTES // (state_bytes(model.graph) * length) // size * size)  # windows of a run
    positions, interpreter = torch.arange(length), Interpreter(model.graph, model.weights)
    runs = -(-windows // group)
    with progress.counter(name) as count:
        for run in range(runs):
            part = ids[run * group : (run + 1) * group]
            batches = [{"ids": p, "positions": positions.expand(len(p), -1)} for p in part.split(size)]

            def take(index: int, outputs: tuple[Tensor, ...], run: int = run) -> None:
                consume((run * group + index * size) * length, outputs[0].flatten(0, 1))

            def done(node: int, nodes: int, run: int = run) -> None:
                count(run * nodes + node, runs * nodes)

            interpreter.run(batches, take, done)


class Reference:
    """Measures models against a reference on the same windows.

    Args:
        model: the reference, whose logits are the truth.
        ids, targets: [W, T] tokens, and the token after each.
        file: keeps the log-probabilities; used as it is if it is there.

    Raises:
        MoecError: the file does not fit on the disk.
    """

    def __init__(
        self, model: Model, ids: Tensor, targets: Tensor, file: Path, progress: Progress = _QUIET, name: str = "reference"
    ) -> None:
        self.ids, self.targets = ids, targets.reshape(-1)
        shape = (ids.numel(), int(model.graph.type_of(model.graph.outputs[0]).shape[-1]))
        needed = 4 * shape[0] * shape[1]
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(file.parent).free) < needed:
                raise MoecError(
                    f"disk full: the reference's log-probabilities on {shape[0]} tokens need {needed} bytes and {file.parent} has {free}: "
                    "lower --max-tokens, or give -o on a larger disk"
                )
            part = file.with_name(file.name + ".part")
            kept = np.memmap(part, np.float32, "w+", shape=shape)

            def keep(at: int, logits: Tensor) -> None:
                kept[at : at + len(logits)] = logits.float().log_softmax(-1).cpu().numpy()

            each_logits(model, ids, keep, progress, name)
            kept.flush()
            del kept
            part.replace(file)
        self._truth = np.memmap(file, np.float32, "r", shape=shape)

    @torch.no_grad()
    def __call__(self, model: Model, progress: Progress = _QUIET, name: str = "evaluate") -> Distance:
        """The distance of a model, in nats a token."""
        tally = Tally()

        def score(at: int, logits: Tensor) -> None:
            truth = torch.from_numpy(np.array(self._truth[at : at + len(logits)]))  # a copy: the file is mapped for reading only
            tally.add(truth.to(logits.device), logits, self.targets[at : at + len(logits)].to(logits.device))

        each_logits(model, self.ids, score, progress, name)
        return tally.distance()


def pooled(distances: Sequence[Distance]) -> Distance:
    """The distance on several texts taken together: each token counts the same."""
    tokens = sum(d.tokens for d in distances)
    names = ("nll", "kl_divergence", "top1_agreement", "reference_nll")
    return Distance(tokens, **{n: sum(getattr(d, n) * d.tokens for d in distances) / tokens for n in names})
