"""Experts that are a factor times their input plus a constant: how well they stand for real ones, and their nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moec.compiler.ir import Node, Param, TensorType, Value
from moec.compiler.layers import MoeLayer, add_constant, replace_node
from moec.compiler.model import Model
from moec.compiler.weights import Edit, select
from moec.passes.routing.insert import Namer, like, namer
from moec.passes.routing.observe import Block

KINDS = ("zero", "copy", "constant", "mixed")


@dataclass(frozen=True)
class Fit:
    """An expert as scale * x + value [D]; None is no value."""

    scale: float
    value: Tensor | None


@dataclass(frozen=True)
class Worth:
    """Moments of the experts of a layer over their tokens, with g the routing weight: float64.

    Args:
        square: [E], sum of g^2.
        output, input: [E, D], sums of g^2 f and g^2 x.
        outputs, inputs, both: [E], sums of g^2 |f|^2, g^2 |x|^2 and g^2 f x.
        stream: sum over all tokens of the square of the residual stream after the layer.
    """

    square: Tensor
    output: Tensor
    input: Tensor
    outputs: Tensor
    inputs: Tensor
    both: Tensor
    stream: float

    @classmethod
    def of(cls, block: Block) -> Worth:
        """The moments of a layer on calibration text."""
        e, d = block.layer.count, block.x.shape[1]
        sums = [torch.zeros(size, dtype=torch.float64) for size in ((e,), (e, d), (e, d), (e,), (e,), (e,))]
        for expert in range(e):
            token, slot = torch.where(block.ids == expert)
            g = block.weights[token, slot].double()
            gf, gx = block.slots[token, slot].double(), block.x[token].double() * g[:, None]
            parts = (g.square().sum(), g @ gf, g @ gx, gf.square().sum(), gx.square().sum(), (gf * gx).sum())
            for total, part in zip(sums, parts, strict=True):
                total[expert] = part
        stream = float((block.residual + block.slots.sum(1)).double().square().sum())
        square, output, inner, outputs, inputs, both = sums
        return cls(square, output, inner, outputs, inputs, both, stream)

    def fit(self, expert: int, kind: str) -> Fit:
        """The free expert of a kind that is nearest to an expert, in squares weighted by g^2."""
        if kind in ("zero", "copy") or self.square[expert] == 0:
            return Fit(float(kind == "copy"), None)
        n, scale = self.square[expert], 0.0
        if kind == "mixed" and (variance := self._spread(self.inputs, self.input, self.input, expert)) > 0:
            scale = self._spread(self.both, self.output, self.input, expert) / variance
        return Fit(scale, ((self.output[expert] - scale * self.input[expert]) / n).float())

    def error(self, expert: int, kind: str) -> float:
        """The squared error of the layer's result that the replacement makes, relative to the residual stream."""
        if self.square[expert] == 0:
            return 0.0
        if kind == "zero":
            found = float(self.outputs[expert])
        elif kind == "copy":
            found = float(self.outputs[expert] - 2 * self.both[expert] + self.inputs[expert])
        else:
            found = self._spread(self.outputs, self.output, self.output, expert)
            variance = self._spread(self.inputs, self.input, self.input, expert)
            if kind == "mixed" and variance > 0:
                found -= self._spread(self.both, self.output, self.input, expert) ** 2 / variance
        return found / self.stream

    def _spread(self, products: Tensor, first: Tensor, second: Tensor, expert: int) -> float:
        """A sum of products less that of the means."""
        return float(products[expert] - first[expert] @ second[expert] / self.square[expert])


def insert_free_experts(model: Model, layer: MoeLayer, fits: Mapping[int, Fit]) -> Model:
    """A model in which some experts of a layer are free ones; their weights are gone and never read."""
    keep = [e for e in range(layer.count) if e not in fits]
    name = namer(model.graph, layer.name)
    graph, edits = model.graph, dict[str, Edit]()
    params = []
    for stacked in layer.stacks:
        param = graph.params[stacked]
        fmt = param.format if isinstance(param.format, str) else tuple(param.format[e] for e in keep)
        params.append(replace(param, type=TensorType(param.type.dtype, (len(keep), *param.type.shape[1:])), format=fmt))
        edits[stacked] = select(model.weights, stacked, keep)
    model = model.edited(graph.with_params(params), edits)
    table = torch.full((layer.count + 1,), len(keep), dtype=torch.int64)  # the last entry is that of skipped slots
    table[keep] = torch.arange(len(keep))
    x, ids, weights, *rest = layer.experts.inputs
    model, local, nodes = _lookup(model, "kept", table, ids, name)
    result = layer.experts.outputs[0]
    real = Value(name("real"), result.type)
    nodes.append(replace(layer.experts, inputs=(x, local, weights, *rest), outputs=(real,)))
    terms = [real.name]
    if any(fit.scale for fit in fits.values()):
        model, more, term = _scaled(model, layer, fits, name)
        nodes, terms = [*nodes, *more], [*terms, term]
    if any(fit.value is not None for fit in fits.values()):
        model, more, term = _constants(model, layer, fits, name)
        nodes, terms = [*nodes, *more], [*terms, term]
    if len(terms) == 1:
        nodes[-1] = replace(nodes[-1], outputs=(result,))
    total = terms[0]
    for index, term in enumerate(terms[1:], 1):
        value = result if index == len(terms) - 1 else Value(name("sum"), result.type)
        nodes.append(Node("aten.add.Tensor", (total, term), (value,)))
        total = value.name
    return Model(replace_node(model.graph, layer.experts, nodes), model.weights)


def _lookup(model: Model, suffix: str, table: Tensor, ids: str, name: Namer) -> tuple[Model, str, list[Node]]:
    """Rows of a constant table at ids [..., K]: the model with the table, the result's name, the node."""
    param = Param(name(f"{suffix}_table"), TensorType("f32", ()), "f32")
    model = add_constant(model, param.name, table)
    kind = model.graph.type_of(ids)
    dtype = "f32" if table.is_floating_point() else "i64"
    found = Value(name(suffix), TensorType(dtype, (*kind.shape, *table.shape[1:])))
    return model, found.name, [Node("aten.index.Tensor", (param.name, ids), (found,), {"indices": 1})]


def _scaled(model: Model, layer: MoeLayer, fits: Mapping[int, Fit], name: Namer) -> tuple[Model, list[Node], str]:
    """The sum over k of w[k] scale[i[k]], times x."""
    x, ids, weights = layer.experts.inputs[:3]
    table = torch.zeros(layer.count + 1)
    for expert, fit in fits.items():
        table[expert] = fit.scale
    model, scales, nodes = _lookup(model, "scales", table, ids, name)
    shares = Value(name("scaled_weights"), model.graph.type_of(weights))
    share = Value(name("scale"), like(model.graph, weights, 1, "f32"))
    result = Value(name("scaled"), model.graph.type_of(x))
    nodes += [
        Node("aten.mul.Tensor", (weights, scales), (shares,)),
        Node("aten.sum.dim_IntList", (shares.name,), (share,), {"dim": (-1,), "keepdim": True}),
        Node("aten.mul.Tensor", (x, share.name), (result,)),
    ]
    return model, nodes, result.name


def _constants(model: Model, layer: MoeLayer, fits: Mapping[int, Fit], name: Namer) -> tuple[Model, list[Node], str]:
    """The sum over k of w[k] value[i[k]]: a matrix of the values times the weights that each token gives them."""
    x, ids, weights = layer.experts.inputs[:3]
    members = [e for e, fit in fits.items() if fit.value is not None]
    place = torch.full((layer.count + 1,), len(members), dtype=torch.int64)  # the last row is zero
    place[members] = torch.arange(len(members))
    values = torch.stack([*(v for e in members if (v := fits[e].value) is not None), torch.zeros(layer.hidden)])
    model, places, nodes = _lookup(model, "constant_ids", place, ids, name)
    model, rows, more = _lookup_rows(model, values, places, layer, name)
    column = Value(name("constant_weights"), TensorType("f32", (*model.graph.type_of(weights).shape, 1)))
    shares = Value(name("constant_shares"), TensorType("f32", (*model.graph.type_of(weights).shape, layer.hidden)))
    result = Value(name("constant"), model.graph.type_of(x))
    nodes += [
        *more,
        Node("aten.view.default", (weights,), (column,), {"size": column.type.shape}),
        Node("aten.mul.Tensor", (rows, column.name), (shares,)),
        Node("aten.sum.dim_IntList", (shares.name,), (result,), {"dim": (-2,), "keepdim": False}),
    ]
    return model, nodes, result.name


def _lookup_rows(model: Model, values: Tensor, places: str, layer: MoeLayer, name: Namer) -> tuple[Model, str, list[Node]]:
    """Rows [..., K, D] of values [R, D] at places [..., K], a value that is not in the graph yet."""
    table = name("constants")
    model = add_constant(model, table, values)
    shape = (*model.graph.type_of(layer.experts.inputs[1]).shape, layer.hidden)
    rows = Value(name("constant_rows"), TensorType("f32", shape))
    return model, rows.name, [Node("aten.index.Tensor", (table, places), (rows,), {"indices": 1})]
