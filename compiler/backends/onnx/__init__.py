"""The ONNX backend: one model for prefill and decoding, whose weights stay in the artifact's weight files.

For processors it is a model for ONNX Runtime's CPUExecutionProvider, or of standard operators (`portable`); for NVIDIA GPUs one for its
CUDAExecutionProvider, whose values are float32 among products, attention and experts in 16 bits (see `half`), with a small model beside
it that makes room in the caches (see `grow`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from moec.compiler.backends.base import Location, StoredArray
from moec.compiler.backends.onnx.emit import Emitter
from moec.compiler.backends.onnx.grow import grow_model
from moec.compiler.backends.onnx.layout import IntLayout
from moec.compiler.backends.onnx.lower import Lowering, check_lowerable, reserved_names
from moec.compiler.backends.onnx.placement import place
from moec.compiler.backends.select_rows import select_rows
from moec.compiler.backends.tokenwise import check_tokenwise
from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph, Param
from moec.compiler.packed import Packed, Quantized
from moec.targets import Target

MODEL = "model.onnx"
GROW = "grow.onnx"

Activations = Literal["float", "int8", "float16", "bfloat16"]

_HALVES = {"float": "f16", "bfloat16": "bf16", "float16": "f16"}
"""What GPUs compute with, by the name of activations: unless told the more exact of both, as what adds up over layers stays float32."""

_NAMES = {"bf16": "bfloat16", "f16": "float16", None: "float32"}
"""What they and their caches are called; None: on CPUs."""


class OnnxBackend:
    """A graph lowered to ONNX.

    Args:
        graph: from ids and positions [B, T] to logits [B, T, V].
        target: a CPU or an NVIDIA GPU.
        portable: standard operators only, for CPUs.
        activations: what products compute with. On a CPU `float` (float32), or `int8` with a scale a block where weights are integers,
            which is faster and costs about 1 % of accuracy a product. On a GPU `float16` (which `float` means), or `bfloat16`, which is
            an eighth as exact, for models whose activations are beyond 65504 within a layer.
        terms: with float activations, 8-bit linear layers compute with two int8 terms (see `linear`). None: on x86-64.
    """

    def __init__(
        self, graph: Graph, target: Target, portable: bool = False, activations: Activations = "float", terms: bool | None = None
    ) -> None:
        self.half = _check(target, portable, activations)
        self.graph, self.portable, self.activations = graph, portable, activations
        check_tokenwise(graph)
        check_lowerable(graph)
        self._lowered = select_rows(graph)
        plain = not portable and self.half is None and activations == "float"
        self.terms = plain and (_is_x86(target) if terms is None else terms)
        self._placement = place(graph, portable, "float" if self.half else activations, self.terms, self.half)

    def stacked(self, param: Param) -> bool:
        """See `Backend`."""
        return param.name in self._placement.stacked

    def storage(self, param: Param) -> dict[str, StoredArray]:
        """See `Backend`."""
        arrays = self._placement.layouts[param.name].arrays()
        if not self.stacked(param):
            return arrays
        experts = int(param.type.shape[0])
        return {name: StoredArray(array.dtype, (experts, *array.shape)) for name, array in arrays.items()}

    def store(self, param: Param, packed: Packed, expert: int | None = None) -> dict[str, NDArray[np.generic]]:
        """See `Backend`."""
        del expert  # all experts are alike
        layout = self._placement.layouts[param.name]
        if isinstance(layout, IntLayout):
            assert isinstance(packed, Quantized)
            return layout.store(packed)
        return layout.store(packed)

    def restore(self, param: Param, arrays: Mapping[str, NDArray[np.generic]], expert: int | None = None) -> Packed:
        """See `Backend`."""
        del expert
        return self._placement.layouts[param.name].restore(arrays)

    def activation_quantised(self) -> list[str]:
        """The nodes whose products round activations to int8 (about 1 % a product), with the reason.

        Everything else is computed in float32, but for 8-bit linear layers with two terms, whose error is about 5e-5 (`terms`), and on
        GPUs, where none rounds to int8.
        """
        found = list[str]()
        if self.half:
            return found
        for node in self.graph.nodes if not self.portable else ():
            if (plan := self._placement.experts.get(node.name)) is not None and plan.mode == "qmoe":
                if plan.bits != 4:
                    found.append(f"{node.name}: QMoE computes {plan.bits}-bit blocks with int8 activations")
                elif self.activations == "int8":
                    found.append(f"{node.name}: int8 activations were asked for")
            elif self.activations == "int8" and any(self._is_block(name) for name in node.inputs if node.op in ("linear", "experts")):
                found.append(f"{node.name}: int8 activations were asked for")
        return found

    def _is_block(self, name: str) -> bool:
        layout = self._placement.layouts.get(name)
        return isinstance(layout, IntLayout) and layout.block > 0

    def build(self, folder: Path, locations: Mapping[tuple[str, str], Location]) -> dict[str, Any]:
        """See `Backend`."""
        storage = {(p.name, c): array for p in self.graph.params.values() for c, array in self.storage(p).items()}
        level = 4 if self.activations == "int8" else 0
        emitter = Emitter(locations, storage, reserved_names(self._lowered), prune=self.half is not None)
        lowering = Lowering(self._lowered, emitter, self._placement, self.portable, level, self.half)
        model = lowering.run()
        (folder / MODEL).write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(folder / MODEL), full_check=self.portable)
        return {
            "model": MODEL,
            **(self._for_gpu(folder) if self.half else {}),
            "portable": self.portable,
            "onnxruntime": "1.23" if self.portable else "1.31",
            "activations": _NAMES[self.half] if self.half else self.activations,
            "activation_quantised": self.activation_quantised(),
            "terms": self.terms,
            "inputs": [i.name for i in model.graph.input],
            "cache_dtype": _NAMES[self.half],
            "cache": [[c.heads, c.key_size, c.value_size] for c in lowering.caches],
        }

    def _for_gpu(self, folder: Path) -> dict[str, Any]:
        """What the executor needs to know besides, and the model that makes room in caches."""
        (folder / GROW).write_bytes(grow_model().SerializeToString())
        return {"provider": "CUDAExecutionProvider", "grow": GROW}


def _check(target: Target, portable: bool, activations: str) -> str | None:
    """The type of a GPU's activations; None for a CPU.

    Raises:
        MoecError: the options do not suit the target.
    """
    if target.kind == "cpu":
        if activations in ("float16", "bfloat16"):
            raise MoecError(f"--activations {activations} is for GPUs: target {target.name} computes with float or int8")
        return None
    if target.kind != "cuda":
        raise MoecError(f"target {target.name}: the onnx backend writes models for CPUs and NVIDIA GPUs, not for {target.kind!r}")
    if portable:
        raise MoecError(f"target {target.name}: --portable writes a model of standard operators, for CPUs: choose a CPU target")
    if activations not in _HALVES:
        raise MoecError(f"--activations {activations} is for CPUs: target {target.name} computes with bfloat16 or float16")
    return _HALVES[activations]


def _is_x86(target: Target) -> bool:
    """Whether a CPU target is an x86-64 machine, by LLVM's names of it."""
    described = json.loads(target.tvm)
    return str(described.get("mtriple") or described.get("mcpu")).replace("_", "-").startswith("x86-64")


def activation_quantised(graph: Graph, target: Target, activations: Activations = "float") -> list[str]:
    """What `OnnxBackend.activation_quantised` says of a graph."""
    return OnnxBackend(graph, target, activations=activations).activation_quantised()


def activation_kinds(target: Target) -> tuple[str, ...]:
    """What products may be computed with, the usual one first."""
    return ("float", "float16", "bfloat16") if target.kind == "cuda" else ("float", "int8")


def cache_dtypes(target: Target, activations: str = "float") -> tuple[str, ...]:
    """Types of cached keys and values: the attention operators take what queries are, float32 on CPUs, and what a GPU computes with."""
    return (_NAMES[_HALVES.get(activations, "bf16") if target.kind == "cuda" else None],)


def make(
    graph: Graph, target: Target, portable: bool, cache_dtype: str = "float32",  # noqa: ARG001  # there is no choice
    activations: Activations = "float", terms: bool | None = None,
) -> OnnxBackend:  # fmt: skip
    """The backend for a graph."""
    return OnnxBackend(graph, target, portable, activations, terms)
