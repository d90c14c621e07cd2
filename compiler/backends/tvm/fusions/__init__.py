"""What the GPU's kernels compute together for a single token: each file has one `match`, which finds its pattern in a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moec.compiler.backends.tvm.fusion import Fusion, disjoint
from moec.compiler.backends.tvm.fusions import attention, projections, routing
from moec.compiler.backends.tvm.storage import matrix_layout
from moec.compiler.ir import Graph, Node
from moec.targets.kernels.cuda.calls import Gpu
from moec.targets.kernels.cuda.layout import FragmentLayout

MATCHERS: tuple[Callable[[Graph, Mapping[str, Any], Gpu], Sequence[Fusion]], ...] = (attention.match, routing.match, projections.match)
"""In the order in which they choose: attention, routing, then the projections that are left."""


def match(graph: Graph, storage: Mapping[str, Any], gpu: Gpu) -> list[Fusion]:
    """All fusions of a graph whose weights their kernels can read, with options for a GPU; no two share a node."""
    found = (fusion for matcher in MATCHERS for fusion in matcher(graph, storage, gpu))
    return disjoint(fusion for fusion in found if all(_in_fragments(node, storage) for node in fusion.nodes))


def _in_fragments(node: Node, storage: Mapping[str, Any]) -> bool:
    """Whether the tensor cores' kernels read the matrix of a linear layer; other nodes have none."""
    if node.op != "linear":
        return True
    layout = matrix_layout(storage[node.inputs[1]])
    return isinstance(layout, FragmentLayout) and layout.in_fragments
