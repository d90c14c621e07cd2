"""From a causal language model (a transformers module, in memory or on the meta device) to a graph in normal form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moec.compiler.errors import MoecError
from moec.compiler.frontend.constants import unsaved_buffers
from moec.compiler.frontend.convert import convert
from moec.compiler.frontend.facts import facts
from moec.compiler.frontend.normalize import Normalized, normalize
from moec.compiler.frontend.positions import count_by_positions
from moec.compiler.frontend.source import GraphWeights, ModuleWeights, Stored
from moec.compiler.frontend.trace import export_language_model
from moec.compiler.ir import Graph
from moec.compiler.verify import verify
from moec.compiler.weights import WeightSource

_AXES = {"ids": ("B", "T"), "positions": ("B", "T")}


def _names(model: Any) -> dict[str, str]:
    """Our name of every parameter and buffer: a tied weight has that of its first appearance, the embedding."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        names[name] = first.setdefault(id(tensor), name)
    return names


def _constants(program: torch.export.ExportedProgram, model: Any) -> dict[str, torch.Tensor]:
    constants = unsaved_buffers(model)
    for name, value in program.constants.items():
        if isinstance(value, torch.Tensor) and not value.is_meta:
            constants.setdefault(name.removeprefix("model."), value.detach())
    return {n: v.float() if v.dtype in (torch.float64, torch.bfloat16, torch.float16) else v for n, v in constants.items()}


def trace(model: Any) -> tuple[Normalized, Graph, dict[str, torch.Tensor]]:
    """The graph of a causal language model in normal form, the graph as traced, and the values of its constants."""
    program = export_language_model(model)
    names = _names(model)

    def name(target: str) -> str:
        stripped = target.removeprefix("model.")
        return names.get(stripped, stripped)

    meta = facts(model)
    traced = convert(program, model.config.model_type, _AXES, name, meta)
    normal = normalize(traced, count_by_positions)
    graph = replace(normal.graph, meta={**meta, "moe": any(n.op == "experts" for n in normal.graph.nodes)})
    return replace(normal, graph=graph), traced, _constants(program, model)


def finish(model: Any, stored: Stored) -> tuple[Graph, GraphWeights]:
    """The verified graph of a model and its weights, which `stored` keeps."""
    normal, traced, constants = trace(model)
    needed = {name: value for name, value in constants.items() if name in normal.graph.params}
    for name, param in normal.graph.params.items():
        if name in needed and tuple(needed[name].shape) != tuple(param.type.shape):
            raise MoecError(f"{model.config.model_type}: the constant {name} has the shape {list(needed[name].shape)}, traced {param.type}")
    weights = GraphWeights(stored, needed, normal.layouts, traced.params)
    graph = weights.formatted(normal.graph)
    verify(graph)
    return graph, weights


def graph_of(model: Any) -> tuple[Graph, WeightSource]:
    """The graph and weights of a causal language model in memory."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    return finish(model.eval(), ModuleWeights(tensors))
