"""Experts of one format a node: kernels read one layout, so that a layer of mixed bit-widths becomes a node for each.

    %y = experts(%x, %i, %w, @up, @down)                      # the position in the part, or outside of it
    @up: f32[4, 2F, D] as [int2_g32, int4_g64, ...]      ->   %i0 = aten.index.Tensor(@table0, %i) {indices=1}
                                                              %y0 = experts(%x, %i0, %w, @up.part0, @down.part0)
                                                              ...
                                                              %y = aten.add.Tensor(%y0, %y1)

An id outside a part's experts is skipped by its node, so that every expert still runs once and nothing else is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moec.compiler.ir import Node, Param, TensorType, Value
from moec.compiler.model import Model
from moec.compiler.ops import EXPERT_MATRICES
from moec.compiler.packed import Quantized, format_name
from moec.compiler.weights import Edit, Edited, WeightSource, constant, packed_of


@dataclass(frozen=True)
class Parts:
    """Another source, some of whose stacked parameters are seen as parts: by new name, the old name and the experts of the part."""

    base: WeightSource
    parts: Mapping[str, tuple[str, tuple[int, ...]]]

    def load(self, name: str, expert: int | None = None) -> Tensor:
        """See `PackedSource`."""
        if name not in self.parts:
            return self.base.load(name, expert)
        old, members = self.parts[name]
        if expert is not None:
            return self.base.load(old, members[expert])
        return torch.stack([self.base.load(old, member) for member in members])

    def packed(self, name: str, expert: int | None = None) -> Quantized | None:
        """See `PackedSource`."""
        if name not in self.parts:
            return packed_of(self.base, name, expert)
        old, members = self.parts[name]
        return packed_of(self.base, old, None if expert is None else members[expert])


def uniform_experts(model: Model, factored_only: bool = False) -> Model:
    """The model with every `experts` node of mixed formats split into one node a combination of formats.

    Args:
        factored_only: split only nodes with low-rank factors.
    """
    for node in [n for n in model.graph.nodes if n.op == "experts"]:
        if factored_only and not any(node.inputs[7:]):
            continue
        named = [node.inputs[at] for at in EXPERT_MATRICES if at < len(node.inputs)]
        stacks = [model.graph.params[name] for name in named if name in model.graph.params]
        if all(isinstance(p.format, str) for p in stacks):
            continue
        classes: dict[tuple[str, ...], list[int]] = {}
        for expert in range(int(stacks[0].type.shape[0])):
            classes.setdefault(tuple(format_name(p, expert) for p in stacks), []).append(expert)
        if len(classes) == 1:
            (formats,) = classes
            same = [replace(p, format=fmt) for p, fmt in zip(stacks, formats, strict=True)]
            model = Model(model.graph.with_params(same), model.weights)
        else:
            model = split_experts(model, node, list(classes.values()))
    return model


def split_experts(model: Model, node: Node, groups: Sequence[Sequence[int]]) -> Model:
    """The model with an `experts` node split into one node for each group of experts."""
    graph, ids = model.graph, node.inputs[1]
    count = int(graph.params[node.inputs[3]].type.shape[0])
    params, parts, tables = list[Param](), dict[str, tuple[str, tuple[int, ...]]](), dict[str, Edit]()
    nodes, results = list[Node](), list[str]()
    for index, members in enumerate(groups):
        names = {old: f"{old}.part{index}" for old in node.inputs[3:] if old}
        for old, new in names.items():
            params.append(_part(graph.params[old], new, members))
            parts[new] = old, tuple(members)
        table = torch.full((count + 1,), len(members), dtype=torch.int64)  # the last entry is that of skipped slots
        table[list(members)] = torch.arange(len(members))
        name = f"{node.name}.part{index}"
        params.append(Param(f"{name}.table", TensorType("i64", (count + 1,)), "i64"))
        tables[f"{name}.table"] = constant(table)
        local = Value(f"{name}.ids", graph.type_of(ids))
        nodes.append(Node("aten.index.Tensor", (f"{name}.table", ids), (local,), {"indices": 1}))
        inputs = (node.inputs[0], local.name, node.inputs[2], *(names.get(old, "") for old in node.inputs[3:]))
        result = node.outputs[0] if len(groups) == 1 else Value(name, node.outputs[0].type)
        nodes.append(Node("experts", inputs, (result,), node.attrs))
        results.append(name)
    nodes += _sum(node, results)
    at = graph.nodes.index(node)
    graph = graph.with_params(params).with_nodes([*graph.nodes[:at], *nodes, *graph.nodes[at + 1 :]])
    return Model(graph, Edited(Parts(model.weights, parts), tables))


def _part(param: Param, name: str, members: Sequence[int]) -> Param:
    formats = {format_name(param, expert) for expert in members}
    fmt = formats.pop() if len(formats) == 1 else tuple(format_name(param, expert) for expert in members)
    return Param(name, TensorType(param.type.dtype, (len(members), *param.type.shape[1:])), fmt)


def _sum(node: Node, parts: Sequence[str]) -> list[Node]:
    """Nodes that add the parts, the last of which defines the old node's result."""
    kind = node.outputs[0].type
    nodes, total = list[Node](), parts[0]
    for index, part in enumerate(parts[1:], 1):
        result = node.outputs[0] if index == len(parts) - 1 else Value(f"{node.name}.sum{index}", kind)
        nodes.append(Node("aten.add.Tensor", (total, part), (result,)))
        total = result.name
    return nodes
