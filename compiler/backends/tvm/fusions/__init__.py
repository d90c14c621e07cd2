"""What the GPU's kernels compute together for one or a few tokens: each pattern is a file, whose `match` finds it in a graph.

A `match` takes the number of tokens of the function, which is static, and finds nothing where its kernel does not take so many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moec.compiler.backends.tvm.fusion import Fusion, disjoint
from moec.compiler.backends.tvm.fusions import attention, projections, routing
from moec.compiler.backends.tvm.fusions.matrix import in_fragments
from moec.compiler.ir import Graph
from moec.targets.kernels.cuda.calls import Gpu

Match = Callable[[Graph, Mapping[str, Any], Gpu, int], Sequence[Fusion]]

MATCHERS: tuple[Match, ...] = (attention.match, routing.match, projections.match)
"""In the order in which they choose: attention, routing, then the projections that are left."""


def match(graph: Graph, storage: Mapping[str, Any], gpu: Gpu, tokens: int) -> list[Fusion]:
    """All fusions of a graph whose weights their kernels can read, with options for a GPU and T tokens; no two share a node."""
    found = (fusion for matcher in MATCHERS for fusion in matcher(graph, storage, gpu, tokens))
    return disjoint(fusion for fusion in found if all(in_fragments(storage, node) for node in fusion.nodes if node.op == "linear"))
