"""`TvmBackend`: the `Backend` that compiles a graph with TVM."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moec.compiler.backends.base import Location, StoredArray
from moec.compiler.backends.select_rows import select_rows
from moec.compiler.backends.tokenwise import check_tokenwise
from moec.compiler.backends.tvm import cache_dtypes
from moec.compiler.backends.tvm.build import build_library
from moec.compiler.backends.tvm.lower import check_supported
from moec.compiler.backends.tvm.platform import platform_of
from moec.compiler.backends.tvm.relax_types import stream
from moec.compiler.backends.tvm.semantic import attention_spec
from moec.compiler.backends.tvm.storage import experts_layout, plan_storage
from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph, Node, Param
from moec.compiler.packed import Packed
from moec.targets import Target

LIBRARY = "lib.so"


class TvmBackend:
    """A causal language model, from ids and positions [B, T] to logits [B, T, V], for a processor or a GPU.

    Args:
        cache_dtype: one of `cache_dtypes`, the type of cached keys and values. None: the first of them.
        activations: one of `activation_kinds`.

    Raises:
        MoecError: the graph has ops that cannot be lowered, or mixes tokens other than by attention.
    """

    def __init__(self, graph: Graph, target: Target, cache_dtype: str | None = None, activations: str = "float") -> None:
        self._activations = activations
        check_supported(graph)
        check_tokenwise(graph)
        self.platform = platform_of(target, cache_dtype or cache_dtypes(target)[0], activations)
        self.roles = _input_roles(graph)
        self.graph = select_rows(graph)
        self._storage = plan_storage(self.graph, self.platform)
        self._attention = [attention_spec(self.graph, node) for node in self.graph.nodes if node.op == "attention"]

    def stacked(self, param: Param) -> bool:
        return self._storage[param.name].stacked

    def storage(self, param: Param) -> dict[str, StoredArray]:
        return self._storage[param.name].arrays()

    def store(self, param: Param, packed: Packed, expert: int | None = None) -> dict[str, NDArray[np.generic]]:
        return self._storage[param.name].store(packed, expert)

    def restore(self, param: Param, arrays: Mapping[str, NDArray[np.generic]], expert: int | None = None) -> Packed:
        return self._storage[param.name].restore(arrays, expert)

    def build(self, folder: Path, locations: Mapping[tuple[str, str], Location]) -> dict[str, Any]:
        """Compile into `lib.so`. What is returned, `moec.runtime.executors.tvm` reads."""
        del locations  # the runtime gets the weights by name
        pages = [tuple(shape) for spec in self._attention for shape in self.platform.page_shapes(spec)]
        found = build_library(self.graph, self._storage, self.platform, pages, folder / LIBRARY)
        return {
            "library": LIBRARY,
            "tvm": metadata.version("apache-tvm"),
            "functions": {f.name: {"tokens": f.tokens, "rows": f.rows, "most": f.most} for f in self.platform.functions(self.graph)},
            "chunk": self.platform.chunk,
            "inputs": self.roles,
            "page_tokens": self.platform.page_tokens,
            "cache_dtype": self.platform.cache_dtype,
            "activations": self._activations,
            "page_shapes": [list(shape) for shape in pages],
            "experts": [self._counted(node) for node in self.graph.nodes if node.op == "experts"] if self.platform.counted else [],
            "semaphores": self.platform.semaphores,
            "params": [[param, component] for param, storage in self._storage.items() for component in storage.arrays()],
            **found,
        }

    def _counted(self, node: Node) -> dict[str, Any]:
        """What the runtime's counters say of an experts node."""
        layout = experts_layout(self.graph, node, self.platform)
        top_k = int(self.graph.type_of(node.inputs[1]).shape[-1])
        router = self.graph.producers.get(node.inputs[1])
        found = stream(self.graph.type_of(node.inputs[1]))
        own = {"rows": found is not None and found[0] == "R", "chosen_run": router is not None and router.op == "router"}
        return {"name": node.inputs[3], "experts_per_token": top_k, "expert_bytes": layout.nbytes() // layout.experts, **own}


def _input_roles(graph: Graph) -> list[str]:
    """What each input of the lowered graph is: `ids`, `positions`, and `rows` at last."""
    others = graph.inputs[1:]
    if len(others) > 1 or any(v.type.shape != ("B", "T") or v.type.dtype not in ("i64", "i32") for v in graph.inputs):
        found = ", ".join(f"%{v.name}: {v.type}" for v in graph.inputs)
        raise MoecError(f"graph {graph.name}: expected the inputs ids and positions, integers [B, T]; got {found}")
    return ["ids", *("positions" for _ in others), "rows"]
