"""Every MoE family that transformers offers, held against the frontend on a tiny random model.

The models are those of `moec.compiler.frontend.tiny_models`; the logits of the graph under the interpreter are compared with
transformers' own eager execution.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from moec.compiler.core_aten import unknown_ops
from moec.compiler.frontend.model import graph_of
from moec.compiler.frontend.tiny_models import families, tiny_model
from moec.compiler.interpreter import Interpreter
from moec.compiler.ir import Graph
from moec.compiler.ops import OPS
from moec.compiler.weights import WeightSource

TOLERANCE = 1e-4
SHAPES = ((1, 1), (2, 13), (1, 40))
"""(sequences, tokens) that are compared: beyond the windows and chunks of 8 tokens that tiny configurations have."""


@dataclass
class Row:
    """What was found for one family."""

    name: str
    traced: bool = False
    verified: bool = False
    error: float = float("nan")
    ops: dict[str, int] = field(default_factory=dict)
    raised: bool = False
    reason: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.traced and self.verified and self.error <= TOLERANCE


def difference(model: Any, graph: Any, weights: Any) -> float:
    """The largest difference of logits between the interpreter and eager execution, over `SHAPES`."""
    worst = 0.0
    for batch, tokens in SHAPES:
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(1, model.config.get_text_config().vocab_size, (batch, tokens), generator=generator)
        positions = torch.arange(tokens).expand(batch, -1).contiguous()
        (logits,) = Interpreter(graph, weights)(ids=ids, positions=positions)
        with torch.no_grad():
            expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        error = float((logits - expected).abs().max())
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


@dataclass
class Checked:
    """A family that was tried, with its tiny model and the model's graph, where there are such."""

    row: Row
    model: Any = None
    graph: Graph | None = None
    weights: WeightSource | None = None


def check_family(name: str) -> Checked:
    """Try one family."""
    row, started = Row(name), time.perf_counter()
    checked = Checked(row)
    try:
        _, checked.model = tiny_model(name)
        graph, weights = graph_of(checked.model)
        checked.graph, checked.weights = graph, weights
        row.traced = row.verified = True
        row.ops = dict(Counter(n.op for n in graph.nodes if n.op in OPS))
        left = list(unknown_ops(graph))
        row.raised = row.ops.get("experts", 0) > 0 and row.ops.get("router", 0) == row.ops.get("experts", 0)
        row.error = difference(checked.model, graph, weights)
        row.reason = f"not core: {', '.join(left)}" if left else ""
    except Exception as error:  # noqa: BLE001  # whatever went wrong is what the table reports
        message = str(error).strip().splitlines()
        row.traced = row.traced or type(error).__name__ == "VerifyError"
        row.reason = f"{type(error).__name__}: {message[0] if message else ''}"[:220]
    row.seconds = time.perf_counter() - started
    return checked


def check_families(names: list[str] | None = None) -> Iterator[Row]:
    """Try the named families, or all of them."""
    for name in names or families():
        yield check_family(name).row
