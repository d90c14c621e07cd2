"""Backends: a folder each, found by its name, with a `make(graph, target, portable, cache_dtype, activations)`: a `base.Backend`.

Its `activation_kinds(target)` are what it can compute products with, and its `cache_dtypes(target, activations)` the types that keys and
values can be kept in, in both the one that it takes unless told first. It may also have a `takes_mixed_experts(target)`, where a layer
whose experts differ in format can be one node.
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


CACHE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number in the cache of keys and values, by its type."""


def cache_dtype(name: str, target: Target, asked: str | None = None, activations: str = "float") -> str:
    """The type that a backend keeps keys and values in on a target: the one that is asked for, or the one that it takes unless told.

    Args:
        activations: what it computes with.

    Raises:
        MoecError: there is no such backend or type, or the backend does not have it on this target.
    """
    offered: tuple[str, ...] = load_file(__name__, "backend", name, folders=True).cache_dtypes(target, activations)
    if asked is None or asked in offered:
        return asked or offered[0]
    if asked not in CACHE_BYTES:
        raise unknown("type of key/value cache", asked, CACHE_BYTES)
    raise MoecError(
        f"--kv-cache-dtype {asked}: the {name} backend keeps keys and values in {' or '.join(offered)} on target {target.name}; "
        "leave the option out, or choose another --target or --backend"
    )


ACTIVATIONS = ("float", "int8", "float16", "bfloat16", "fp8")
"""What backends compute products with."""


def check_activations(name: str, target: Target, asked: str) -> None:
    """Whether a backend computes with these activations on a target.

    Raises:
        MoecError: there is no such backend or kind, or the backend does not have it on this target.
    """
    offered: tuple[str, ...] = load_file(__name__, "backend", name, folders=True).activation_kinds(target)
    if asked in offered:
        return
    if asked not in ACTIVATIONS:
        raise unknown("kind of activations", asked, ACTIVATIONS)
    raise MoecError(
        f"--activations {asked}: the {name} backend computes with {' or '.join(offered)} on target {target.name}; "
        "leave the option out, or choose another --target or --backend"
    )


def make_backend(
    name: str, graph: Graph, target: Target, portable: bool = False, activations: str = "float", terms: bool | None = None,
    kv_cache_dtype: str | None = None,
) -> Backend:  # fmt: skip
    """The backend of this name, made for a graph, which it lowers.

    Args:
        portable: of the ONNX backend: standard operators only.
        activations: what products are computed with, see the backend's `activation_kinds`.
        terms: of the ONNX backend, as an artifact states it. None: what the target is best served with.
        kv_cache_dtype: what keys and values are kept in, see `cache_dtype`.

    Raises:
        MoecError: there is no such backend, or it cannot lower the graph.
    """
    module = load_file(__name__, "backend", name, folders=True)
    if portable and name != "onnx":
        raise MoecError(f"--portable is an option of the onnx backend, not of {name}")
    check_activations(name, target, activations)
    options = {"terms": terms} if name == "onnx" else {}
    cached = cache_dtype(name, target, kv_cache_dtype, activations)
    backend: Backend = module.make(graph, target, portable, cached, activations, **options)
    return backend
