"""experts: the routed experts of a MoE layer, x float32 [T, D] -> float32 [T, D].

out[t] = sum over s of weights[t, s] * down[e] @ f(gate_up[e] @ x[t]),   e = ids[t, s]

A slot whose id is outside of 0 to E - 1 is skipped: it adds nothing, costs nothing, and its weight is not read.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import relax, tirx

from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cpu.emit import prim_func, tensor_dtype, tensor_shape, tensor_type
from moec.targets.kernels.cpu.experts_decode import emit_decode
from moec.targets.kernels.cpu.experts_layout import ExpertsLayout, ExpertsOperands
from moec.targets.kernels.cpu.experts_prefill import emit_prefill
from moec.targets.kernels.cpu.isa import Isa


def experts_func(
    layout: ExpertsLayout,
    activation: ExpertActivation,
    isa: Isa,
    *,
    tokens: int | None,
    top_k: int,
    ids_dtype: str = "int64",
    biases: bool = False,
) -> tirx.PrimFunc:
    """PrimFunc (x [T, D], ids [T, k], weights [T, k], arrays..., [gate_up_bias, down_bias], out [T, D])."""

    def build() -> None:
        operands = ExpertsOperands(layout, tokens, top_k, ids_dtype, biases)
        emit = emit_decode if tokens == 1 else emit_prefill
        emit(operands, activation, isa)

    return prim_func(build)


def experts(
    bb: relax.BlockBuilder,
    x: relax.Expr,
    ids: relax.Expr,
    routing_weights: relax.Expr,
    weights: Mapping[str, relax.Expr],
    layout: ExpertsLayout,
    activation: ExpertActivation,
    isa: Isa,
    biases: tuple[relax.Expr, relax.Expr] | None = None,
) -> relax.Var:
    """Emit the experts of a layer: float32 [T, D]; T is static or symbolic.

    Args:
        x: float32 [T, D].
        ids: int32 or int64 [T, k]; slots with an id outside of 0 to E - 1 are skipped.
        routing_weights: float32 [T, k].
        weights: the arrays of `layout.arrays()` by name.
        biases: of gate_up and down, as `layout.biases` makes them.
    """
    t, d = tensor_shape(x)
    top_k = int(tensor_shape(ids)[1])
    func = experts_func(
        layout,
        activation,
        isa,
        tokens=int(t) if isinstance(t, tirx.IntImm) else None,
        top_k=top_k,
        ids_dtype=tensor_dtype(ids),
        biases=biases is not None,
    )
    arguments = [x, ids, routing_weights, *(weights[name] for name in layout.arrays()), *(biases or ())]
    return bb.emit(relax.call_tir(bb.add_func(func, "experts"), arguments, out_ty=tensor_type((t, d), "float32")))
