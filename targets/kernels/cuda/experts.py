"""experts: the routed experts of a MoE layer, x float32 [T, D] -> float32 [T, D].

out[t] = sum over s of weights[t, s] * down[e] @ f(gate_up[e] @ x[t]),   e = ids[t, s]

A slot whose id is outside of 0 to E - 1 is skipped: it adds nothing, and its weight is not read. A few tokens run two kernels
(`experts_decode`), any number of tokens five or six: `linear.terms_of` and those of `experts_prefill`. Activations count as two terms of
bfloat16, or of many tokens as one, or as E4M3, as options have it. Layers that these kernels do not read have `plain.experts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import relax, tirx

from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cpu.emit import tensor_dtype, tensor_shape, tensor_type
from moec.targets.kernels.cuda import experts_decode as decode
from moec.targets.kernels.cuda import experts_prefill as prefill
from moec.targets.kernels.cuda.calls import Functions
from moec.targets.kernels.cuda.counting import call_counting
from moec.targets.kernels.cuda.experts_layout import ExpertsLayout
from moec.targets.kernels.cuda.linear import TERMS, terms_of
from moec.targets.kernels.cuda.shape import Shape
from moec.targets.kernels.cuda.sort import combine_func, most_tiles, sort_func
from moec.targets.kernels.cuda.tuned import Choice


def experts(
    functions: Functions,
    x: relax.Expr,
    ids: relax.Expr,
    routing_weights: relax.Expr,
    weights: Mapping[str, relax.Expr],
    layout: ExpertsLayout,
    activation: ExpertActivation,
    biases: tuple[relax.Expr, relax.Expr] | None,
    counts: relax.Expr | None,
    choice: Choice,
) -> relax.Expr:
    """Emit the experts of a layer: float32 [T, D].

    Args:
        x: float32 [T, D].
        ids: int32 or int64 [T, k].
        routing_weights: float32 [T, k].
        weights: the arrays of `layout.arrays()` by name.
        biases: of gate_up and down, as `layout.biases` makes them.
        counts: int64 [8], to which tokens and experts that run are added.
        choice: which kernels run, and their options; those of a few tokens need a constant T.
    """
    up = [weights[name] for name in layout.names("gate_up")] + ([biases[0]] if biases is not None else [])
    down = [weights[name] for name in layout.names("down")] + ([biases[1]] if biases is not None else [])
    emit = _few if choice.kernel == "decode" else _many
    return emit(functions, (x, ids, routing_weights), (up, down), layout, activation, biases is not None, choice.options, counts)


def _few(
    functions: Functions, routed: tuple[Any, Any, Any], weights: tuple[list[Any], list[Any]], layout: ExpertsLayout,
    activation: ExpertActivation, biases: bool, options: Mapping[str, int], counts: relax.Expr | None,
) -> relax.Expr:  # fmt: skip
    x, ids, routing_weights = routed
    t, top_k = tensor_shape(ids)
    assert isinstance(t, tirx.IntImm)
    spec = decode.DecodeSpec(
        layout, activation, int(t), int(top_k), tensor_dtype(ids), biases, "float32", TERMS, counted=counts is not None, **options
    )
    gate_up = functions.get("gate_up", spec, lambda: decode.gate_up_func(spec))
    hidden_type = tensor_type(spec.hidden_shape, "uint32")
    (hidden,) = call_counting(functions.bb, gate_up, [x, ids, *weights[0]], counts, hidden_type)
    arguments = [hidden, ids, routing_weights, *weights[1]]
    return functions.call("down", spec, lambda: decode.down_func(spec), arguments, ((t, layout.d), "float32"))[0]


def _many(
    functions: Functions, routed: tuple[Any, Any, Any], weights: tuple[list[Any], list[Any]], layout: ExpertsLayout,
    activation: ExpertActivation, biases: bool, options: Mapping[str, int], counts: relax.Expr | None,
) -> relax.Expr:  # fmt: skip
    x, ids, routing_weights = routed
    t, top_k, dtype = tensor_shape(ids)[0], int(tensor_shape(ids)[1]), tensor_dtype(ids)
    shape = Shape.of(options)
    spec = prefill.PrefillSpec(layout, activation, None, top_k, dtype, biases, "float32" if shape.terms > 1 else "bfloat16", shape)
    slots, experts, d = t * top_k, layout.experts, layout.d
    most = most_tiles(slots, experts, shape.tokens)
    sorted_types = [tensor_type(kind, "int32") for kind in ((slots,), (slots,), (most + 1, 4))]
    own = (experts, top_k, dtype, shape.tokens, None, counts is not None)
    sort = functions.get("sort", own, lambda: sort_func(*own))
    order, places, tiles = call_counting(functions.bb, sort, [ids], counts, *sorted_types)
    terms, images, hidden_types = (
        terms_of(functions, x, shape.terms),
        list[relax.Expr](),
        [((shape.terms, slots, layout.padded_f), "uint16")],
    )
    if shape.cluster:
        types, hidden_types = spec.image_types(most, d), spec.image_types(most, layout.padded_f)
        images = functions.call("arrange", spec, lambda: prefill.arrange_func(spec), [terms, order, tiles], *types)
    arguments = [terms, *images, order, tiles, *weights[0]]
    hidden = functions.call("gate_up", spec, lambda: prefill.gate_up_func(spec), arguments, *hidden_types)
    arguments = [*hidden, tiles, *weights[1]]
    (y,) = functions.call("down", spec, lambda: prefill.down_func(spec), arguments, ((slots, d), spec.dtype))
    key = (d, top_k, spec.dtype, None, "float32")
    (out,) = functions.call("combine", key, lambda: combine_func(*key), [y, places, routing_weights], ((t, d), "float32"))
    return out
