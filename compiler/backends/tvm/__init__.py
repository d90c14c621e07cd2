"""The TVM backend: a graph as Relax functions over CPU kernels written in TIR, compiled into one shared library."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moec.compiler.backends.tvm.backend import TvmBackend
    from moec.compiler.ir import Graph
    from moec.targets import Target


def make(graph: Graph, target: Target, portable: bool = False) -> TvmBackend:  # noqa: ARG001  # an option of other backends
    """The backend for a graph and target."""
    from moec.compiler.backends.tvm.backend import TvmBackend  # importing TVM takes a second

    return TvmBackend(graph, target)


def takes_mixed_experts(target: Target) -> bool:
    """Whether a layer whose experts differ in format can be one node: the GPU's kernels have a table of them."""
    return target.kind == "cuda"
