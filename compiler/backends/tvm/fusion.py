"""Nodes that a platform's one kernel computes together.

A fusion takes nodes of the graph and is lowered when one of their values is first asked for: by a node outside, by another fusion or as
a result. Values inside that nothing outside reads need not exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from moec.compiler.ir import Graph, Node

if TYPE_CHECKING:
    from moec.compiler.backends.tvm.lower import FunctionLowering


class Fusion(Protocol):
    """Some nodes of a graph as one step of a Relax function."""

    @property
    def nodes(self) -> Sequence[Node]:
        """What it computes. No node outside may lie on a way from one of them to another."""
        ...

    def lower(self, low: FunctionLowering) -> None:
        """Emit the kernel, and define (`low.set_flat`) every value that is read outside."""
        ...


def disjoint(fusions: Iterable[Fusion]) -> list[Fusion]:
    """Those fusions whose nodes no earlier one has."""
    taken, kept = set[str](), list[Fusion]()
    for fusion in fusions:
        names = {node.name for node in fusion.nodes}
        if not names & taken:
            taken |= names
            kept.append(fusion)
    return kept


def read_outside(graph: Graph, nodes: Sequence[Node]) -> set[str]:
    """Values of the nodes that others read, or that the graph returns."""
    inside = {node.name for node in nodes}
    own = {output.name for node in nodes for output in node.outputs}
    read = {name for name in own for user in graph.users.get(name, ()) if user.name not in inside}
    return read | (own & set(graph.outputs))
