"""What the GPU's kernels compute together for a single token: each file has one `match`, which finds its pattern in a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moec.compiler.backends.tvm.fusion import Fusion, disjoint
from moec.compiler.backends.tvm.fusions import attention, routing
from moec.compiler.ir import Graph

MATCHERS: tuple[Callable[[Graph, Mapping[str, Any]], Sequence[Fusion]], ...] = (attention.match, routing.match)
"""In the order in which they choose: attention, routing, then the projections that are left."""


def match(graph: Graph, storage: Mapping[str, Any]) -> list[Fusion]:
    """All fusions of a graph; no two share a node."""
    return disjoint(fusion for matcher in MATCHERS for fusion in matcher(graph, storage))
