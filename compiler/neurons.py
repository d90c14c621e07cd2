"""Experts cut along their neurons: one `experts` node of width F becomes F / b nodes of width b on the same routing, whose results add up.

    %y = experts(%x, %i, %w, @up, @down)      ->   %y.n0 = experts(%x, %i, %w, @up.n0, @down.n0)         @up.n0: [E, 2b, D]
    @up: [E, 2F, D]   @down: [E, D, F]             %y.n1 = experts(%x, %i, %w, @up.n1, @down.n1)         @down.n0: [E, D, b]
                                                   %y = aten.add.Tensor(%y.n0, %y.n1)

An expert is a sum over its neurons, down[:, j] act(gate[j] x) (up[j] x), so that this is exact for any order of them. With the most salient
neurons first, bits can be assigned to parts of an expert: MixLLM's precision by output features (https://arxiv.org/abs/2412.14590) for
experts, in parts that kernels can run as they run experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from moec.compiler.allocation import Problem
from moec.compiler.change import Reached
from moec.compiler.errors import MoecError
from moec.compiler.factors import require_no_factors
from moec.compiler.ir import Node, Param, TensorType, Value
from moec.compiler.layers import MoeLayer, moe_layers, require_values
from moec.compiler.model import Model
from moec.compiler.ops import expert_activation
from moec.compiler.packed import CodedFormat
from moec.compiler.probe import Prober, run_probe
from moec.compiler.weights import Edit, WeightSource
from moec.runtime.formats import get_format


def split_neurons(model: Model, orders: Mapping[str, Tensor], width: int, what: str) -> Model:
    """A model whose MoE layers are cut into nodes of `width` neurons.

    Args:
        orders: by layer (`MoeLayer.name`), the order of each expert's neurons: [E, F].
        width: b; the last node has what is left.

    Raises:
        MoecError: the experts have biases of their outputs and no gate, or are quantised already.
    """
    require_no_factors(model.graph, what)
    for layer in [found for found in moe_layers(model.graph) if found.name in orders]:
        require_values(model, [layer.up, layer.down], what)
        if width < layer.width:
            model = _split(model, layer, orders[layer.name], width)
    return model


def _split(model: Model, layer: MoeLayer, order: Tensor, width: int) -> Model:
    node, graph = layer.experts, model.graph
    params, edits, nodes, total = list[Param](), dict[str, Edit](), list[Node](), ""
    parts = [order[:, start : start + width] for start in range(0, layer.width, width)]
    for index, chosen in enumerate(parts):
        inputs = list(node.inputs)
        for at in range(3, len(node.inputs)):
            if not (old := node.inputs[at]):
                continue
            if at == 6 and index:  # the bias of the output is added once
                inputs[at] = ""
                continue
            inputs[at] = old if at == 6 else f"{old}.n{index}"
            if at != 6:
                params.append(_part(graph.params[old], inputs[at], at, layer, chosen.shape[1]))
                edits[inputs[at]] = _take(model.weights, old, at, layer, chosen)
        while inputs[-1] == "":
            inputs.pop()
        result = Value(f"{node.name}.n{index}", node.outputs[0].type)
        nodes.append(Node("experts", tuple(inputs), (result,), node.attrs))
        if index:
            made = node.outputs[0] if index == len(parts) - 1 else Value(f"{node.name}.upto{index}", node.outputs[0].type)
            nodes.append(Node("aten.add.Tensor", (total, result.name), (made,)))
            total = made.name
        else:
            total = result.name
    at = graph.nodes.index(node)
    return model.edited(graph.with_params(params).with_nodes([*graph.nodes[:at], *nodes, *graph.nodes[at + 1 :]]), edits)


def _part(param: Param, name: str, at: int, layer: MoeLayer, width: int) -> Param:
    rows = width * (2 if layer.gated else 1)
    shape = {3: (layer.count, rows, layer.hidden), 4: (layer.count, layer.hidden, width), 5: (layer.count, rows)}[at]
    return Param(name, TensorType(param.type.dtype, shape), param.format)


def _take(weights: WeightSource, name: str, at: int, layer: MoeLayer, chosen: Tensor) -> Edit:
    """An edit that takes some neurons of each expert: rows of `up` (of both halves where it is gated), columns of `down`."""

    def edit(expert: int | None) -> Tensor:
        if expert is None:
            return torch.stack([edit(e) for e in range(layer.count)])
        value = weights.load(name, expert)
        neurons = chosen[expert].to(value.device)
        if at == 4:
            return value[:, neurons]
        return value[torch.cat([neurons, neurons + layer.width]) if layer.gated else neurons]

    return edit


@dataclass
class _Salience(Prober):
    """The observer that asks what each neuron's quantisation does to the log-likelihood."""

    found: dict[str, Tensor] = field(default_factory=dict)

    def expert(self, layer: MoeLayer, expert: int, x: Tensor, reached: Reached) -> None:
        """See `Prober`."""
        model = self.problem.model
        biases = [None if bias is None else bias[expert] for bias in layer.load_biases(model)]
        up, down = model.load(layer.up, expert), model.load(layer.down, expert)
        fmt = self.problem.formats[0]
        h, changed = (expert_activation(F.linear(x, w, biases[0]), **layer.activation) for w in (up, self.quantized(up, fmt)))
        gradient = reached.pulled  # [S, n, D]
        product = changed * (gradient @ self.quantized(down, fmt)) - h * (gradient @ down)  # [S, n, F]
        self.found[layer.name][expert] = product.square().sum((0, 1))


def neuron_orders(problem: Problem, samples: int = 2) -> dict[str, Tensor]:
    """The neurons of each expert, the most salient first: by layer [E, F].

    A neuron's salience is the sum over tokens of (G_t (z' - z)_t)^2, the change of the log-likelihood to first order, squared, when that
    neuron alone has the first of the problem's formats; G as in `compiler/probe.py`.
    """
    if not isinstance(get_format(problem.formats[0]), CodedFormat):
        raise MoecError(
            f"assign_bits: neurons are ranked by what the first format does, which must be one of codes (int, ternary, binary, fp8), "
            f"got {problem.formats[0]}"
        )
    observer = _Salience(problem, lambda _: 0.0)
    observer.found = {layer.name: torch.zeros(layer.count, layer.width) for layer in moe_layers(problem.model.graph)}
    run_probe(observer, "sampled", samples)
    return {name: value.argsort(1, descending=True) for name, value in observer.found.items()}
