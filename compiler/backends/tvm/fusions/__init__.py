"""What the GPU's kernels compute together for one or a few tokens: each pattern is a file, whose `match` finds it in a graph.

A `match` takes the number of tokens of the function, which is static, and finds nothing where its kernel does not take so many; of
functions of any number of tokens `match_up_to` takes the most.
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


UP_TO: tuple[Match, ...] = (routing.match_up_to, projections.match_up_to)
"""The same for functions of any number of tokens up to so many."""


def match(graph: Graph, storage: Mapping[str, Any], gpu: Gpu, tokens: int) -> list[Fusion]:
    """All fusions of a graph whose weights their kernels can read, with options for a GPU and T tokens; no two share a node."""
    return _found(MATCHERS, graph, storage, gpu, tokens)


def match_up_to(graph: Graph, storage: Mapping[str, Any], gpu: Gpu, most: int) -> list[Fusion]:
    """The same for any number of tokens up to `most`."""
    return _found(UP_TO, graph, storage, gpu, most)


def _found(matchers: Sequence[Match], graph: Graph, storage: Mapping[str, Any], gpu: Gpu, tokens: int) -> list[Fusion]:
    found = (fusion for matcher in matchers for fusion in matcher(graph, storage, gpu, tokens))
    return disjoint(fusion for fusion in found if all(in_fragments(storage, node) for node in fusion.nodes if node.op == "linear"))
