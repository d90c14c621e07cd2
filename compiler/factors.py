"""Low-rank factors of experts as a part of the graph: W + L R in the place of W.

    %y = experts(%x, %i, %w, @up, @down)   ->   %y = experts(%x, %i, %w, @up, @down, _, _, @up.left, @up.right, @down.left, @down.right)

@up: [E, 2F, D], @up.left: [E, 2F, r], @up.right: [E, r, D]. Where nothing is left of W, its format is `zero` and it takes no bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph, Param, TensorType
from moec.compiler.layers import MoeLayer, moe_layers, replace_node
from moec.compiler.model import Model
from moec.compiler.weights import Edit, each_expert


def with_factors(graph: Graph, layer: MoeLayer, ranks: Mapping[str, int], formats: Mapping[str, str]) -> Graph:
    """The graph with low-rank factors at some projections of a layer; their values are for the caller to give.

    Args:
        ranks: by the name of the projection.
        formats: of both factors, by the name of the projection.
    """
    inputs = [*layer.experts.inputs, *[""] * (11 - len(layer.experts.inputs))]
    params = list[Param]()
    for at, name in ((7, layer.up), (9, layer.down)):
        if name not in ranks:
            continue
        param, rank = graph.params[name], ranks[name]
        count, n, k = (int(d) for d in param.type.shape)
        for place, end, shape in ((at, "left", (count, n, rank)), (at + 1, "right", (count, rank, k))):
            inputs[place] = graph.fresh(f"{name}.{end}")
            params.append(Param(inputs[place], TensorType(param.type.dtype, shape), formats[name]))
    while not inputs[-1]:
        inputs.pop()
    node = replace(layer.experts, inputs=tuple(inputs))
    return replace_node(graph.with_params(params), layer.experts, [node])


def folded(model: Model, layers: Sequence[MoeLayer] | None = None) -> Model:
    """The model with the low-rank factors of its layers (or of some of them) added to the projections, whose values they become.

    A projection that was nothing but its factors gets their format, and takes the bytes of a whole matrix.
    """
    for layer in moe_layers(model.graph) if layers is None else layers:
        if layer.factors:
            model = _folded(model, layer)
    return model


def _folded(model: Model, layer: MoeLayer) -> Model:
    params, edits = list[Param](), dict[str, Edit]()
    for name, (left, _) in layer.factors.items():
        param, fmt = model.graph.params[name], model.graph.params[left].format
        params.append(replace(param, format=fmt if param.format == "zero" else param.format))
        edits[name] = each_expert(partial(layer.matrix, model, name), layer.count)
    inputs = layer.experts.inputs[:7]
    while not inputs[-1]:
        inputs = inputs[:-1]
    node = replace(layer.experts, inputs=inputs)
    return model.edited(replace_node(model.graph.with_params(params), layer.experts, [node]), edits)


def require_no_factors(graph: Graph, what: str) -> None:
    """Check that no expert has low-rank factors.

    Raises:
        MoecError: one has; the message says where the pass has to stand.
    """
    if layer := next((layer for layer in moe_layers(graph) if layer.factors), None):
        raise MoecError(f"{what}: the experts of %{layer.name} have low-rank factors; put {what} before the pass that makes them")
