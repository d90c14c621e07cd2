"""Any torch module with experts as a graph: `trace(module, inputs, dynamic_axes)`.

A module marks its experts with `moec.moe_experts`, which computes them when it runs and becomes the graph's `experts` when it is
traced; everything else is found by the rules of the frontend.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.frontend.convert import convert
from moec.compiler.frontend.normalize import normalize
from moec.compiler.frontend.source import GraphWeights, ModuleWeights
from moec.compiler.frontend.trace import export
from moec.compiler.ir import Graph
from moec.compiler.verify import verify
from moec.compiler.weights import WeightSource


def moe_experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    gated: bool = True,
    limit: float = 0.0,
    transposed: bool = False,
    interleaved: bool = False,
) -> Tensor:
    """Each token through its K experts, summed by weight: x [..., D], ids and weights [..., K] -> [..., D].

    Args:
        up: [E, 2F, D] with the gate rows before the up rows, or [E, F, D] when not gated.
        down: [E, D, F].
        up_bias, down_bias: [E, 2F] (or [E, F]) and [E, D].
        activation: a name of `moec.compiler.ops.ACTIVATIONS`, or `swiglu_oai`.
        gated, limit: as in `moec.compiler.ops.expert_activation`.
        transposed: up is [E, D, 2F] and down [E, F, D].
        interleaved: gate and up rows alternate.
    """
    return torch.ops.moec.experts(  # type: ignore[no-any-return]
        x, ids, weights, up, down, up_bias, down_bias, activation, gated, limit, transposed, interleaved
    )


def trace(
    module: torch.nn.Module, inputs: Mapping[str, Tensor], dynamic_axes: Mapping[str, Mapping[int, str]] | None = None
) -> tuple[Graph, WeightSource]:
    """The verified graph of a module in normal form, and its weights.

    Args:
        module: any module; it is traced in evaluation mode and in float32.
        inputs: an example of each argument of `forward`, by name.
        dynamic_axes: for each argument the axes that may have any size, with a name for each; equal names are equal sizes.

    Raises:
        MoecError: the arguments do not fit `forward`, or the module cannot be traced.
    """
    names = list(inspect.signature(module.forward).parameters)
    unknown = sorted({*inputs, *(dynamic_axes or {})} - set(names))
    if unknown:
        raise MoecError(f"{type(module).__name__}.forward has no argument {unknown[0]!r}; it has {', '.join(names)}")
    given = [name for name in names if name in inputs]
    axes = {name: dict((dynamic_axes or {}).get(name, {})) for name in given}
    sizes = {symbol: torch.export.Dim(symbol, min=1, max=1 << 30) for of in axes.values() for symbol in of.values()}
    shapes = {name: {axis: sizes[symbol] for axis, symbol in axes[name].items()} for name in given}
    module = module.eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = export(module, tuple(inputs[name] for name in given), shapes)
    symbols = {name: tuple(axes[name].get(axis, "") for axis in range(inputs[name].dim())) for name in given}
    traced = convert(program, type(module).__name__, symbols)
    normal = normalize(traced)
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    constants = {n: v.detach() for n, v in program.constants.items() if isinstance(v, Tensor) and n not in tensors}
    weights = GraphWeights(ModuleWeights(tensors), constants, normal.layouts, traced.params)
    graph = weights.formatted(replace(normal.graph, meta={"moe": any(n.op == "experts" for n in normal.graph.nodes)}))
    verify(graph)
    return graph, weights
