"""experts: the routed experts of a MoE layer, x float32 [T, D] -> float32 [T, D].

out[t] = sum over s of weights[t, s] * down[e] @ f(gate_up[e] @ x[t]),   e = ids[t, s]

A slot whose id is outside of 0 to E - 1 is skipped: it adds nothing, and its weight is not read. One token runs two kernels
(`experts_decode`), any number of tokens five (`experts_prefill`). Activations count as two terms of bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import relax, tirx

from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cpu.emit import tensor_dtype, tensor_shape, tensor_type
from moec.targets.kernels.cuda import experts_decode as decode
from moec.targets.kernels.cuda import experts_prefill as prefill
from moec.targets.kernels.cuda.counting import call_counting
from moec.targets.kernels.cuda.experts_layout import ExpertsLayout
from moec.targets.kernels.cuda.linear import TERMS, split_func
from moec.targets.kernels.cuda.product import Shape
from moec.targets.kernels.cuda.sort import combine_func, most_tiles, sort_func


def experts(
    bb: relax.BlockBuilder,
    x: relax.Expr,
    ids: relax.Expr,
    routing_weights: relax.Expr,
    weights: Mapping[str, relax.Expr],
    layout: ExpertsLayout,
    activation: ExpertActivation,
    biases: tuple[relax.Expr, relax.Expr] | None = None,
    counts: relax.Expr | None = None,
) -> relax.Var:
    """Emit the experts of a layer: float32 [T, D]; T is 1 or symbolic.

    Args:
        x: float32 [T, D].
        ids: int32 or int64 [T, k].
        routing_weights: float32 [T, k].
        weights: the arrays of `layout.arrays()` by name.
        biases: of gate_up and down, as `layout.biases` makes them.
        counts: int64 [8], to which tokens and experts that run are added.
    """
    t, _ = tensor_shape(x)
    top_k, dtype = int(tensor_shape(ids)[1]), tensor_dtype(ids)
    up = [weights[name] for name in layout.arrays() if name.startswith("gate_up_")]
    down = [weights[name] for name in layout.arrays() if name.startswith("down_")]
    up_bias, down_bias = ([biases[0]], [biases[1]]) if biases is not None else ([], [])

    def call(
        name: str, function: tirx.PrimFunc, arguments: list[relax.Expr], *outs: tuple[tuple[object, ...], str],
        counts: relax.Expr | None = None,
    ) -> list[relax.Var]:  # fmt: skip
        return call_counting(bb, bb.add_func(function, name), arguments, counts, *(tensor_type(shape, kind) for shape, kind in outs))

    if isinstance(t, tirx.IntImm) and int(t) == 1:
        spec = decode.DecodeSpec(layout, activation, 1, top_k, dtype, biases is not None, "float32", TERMS, counted=counts is not None)
        (hidden,) = call("gate_up", decode.gate_up_func(spec), [x, ids, *up, *up_bias], (spec.hidden_shape, "uint32"), counts=counts)
        (out,) = call("down", decode.down_func(spec), [hidden, ids, routing_weights, *down, *down_bias], ((1, layout.d), "float32"))
        return out
    many = prefill.PrefillSpec(layout, activation, None, top_k, dtype, biases is not None, "float32", Shape(32, 1, 4, TERMS))
    slots = t * top_k
    size = many.shape.tokens
    most = most_tiles(slots, layout.experts, size)
    sorted_types = [((slots,), "int32"), ((slots,), "int32"), ((most + 1, 4), "int32")]
    sort = sort_func(layout.experts, top_k, dtype, size, counted=counts is not None)
    order, places, tiles = call("sort", sort, [ids], *sorted_types, counts=counts)
    (terms,) = call("split", split_func(layout.d), [x], ((TERMS, t, layout.d), "uint16"))
    hidden_shape = (TERMS, slots, layout.padded_f)
    (hidden,) = call("gate_up", prefill.gate_up_func(many), [terms, order, tiles, *up, *up_bias], (hidden_shape, "uint16"))
    arguments = [hidden, order, tiles, routing_weights, *down, *down_bias]
    (y,) = call("down", prefill.down_func(many), arguments, ((slots, layout.d), "float32"))
    (out,) = call("combine", combine_func(layout.d, top_k, "float32"), [y, places], ((t, layout.d), "float32"))
    return out
