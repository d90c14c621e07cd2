"""Backends: a folder each, found by its name, with a `make(graph, target, portable)` that returns a `base.Backend`.

It may also have a `takes_mixed_experts(target)`, where a layer whose experts differ in format can be one node.
"""

from __future__ import annotations

from moec.compiler.backends.base import Backend
from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph
from moec.compiler.plugins import load_file
from moec.runtime.errors import unknown
from moec.targets import Target


def takes_mixed_experts(name: str, target: Target) -> bool:
    """Whether a backend runs a layer whose experts differ in format as one node, unless it has low-rank factors; others get several.

    Raises:
        MoecError: there is no such backend.
    """
    takes = getattr(load_file(__name__, "backend", name, folders=True), "takes_mixed_experts", None)
    return takes is not None and bool(takes(target))


def make_backend(
    name: str, graph: Graph, target: Target, portable: bool = False, activations: str = "float", terms: bool | None = None
) -> Backend:
    """The backend of this name, made for a graph, which it lowers.

    Args:
        portable, activations: options of the ONNX backend: standard operators only; what packed weights are multiplied with.
        terms: of the ONNX backend, as an artifact states it. None: what the target is best served with.

    Raises:
        MoecError: there is no such backend, or it cannot lower the graph.
    """
    module = load_file(__name__, "backend", name, folders=True)
    if portable and name != "onnx":
        raise MoecError(f"--portable is an option of the onnx backend, not of {name}")
    if activations not in (kinds := ("float", "int8", "float16", "bfloat16")):
        raise unknown("kind of activations", activations, kinds)
    if activations != "float" and name != "onnx":
        raise MoecError(f"--activations {activations} is an option of the onnx backend; {name} computes with 16-bit activations or better")
    options = {"activations": activations, "terms": terms} if name == "onnx" else {}
    backend: Backend = module.make(graph, target, portable, **options)
    return backend
