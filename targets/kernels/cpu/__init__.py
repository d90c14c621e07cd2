"""CPU kernels for packed weights, written in TIR for any LLVM target.

Every operator is a function that emits `call_tir` into a `relax.BlockBuilder`; the token dimension T may be symbolic (prefill) or
static (T = 1 has a kernel of its own for decoding):

    linear(bb, x, weights, layout: LaneLayout, isa, bias=None)                  x f32 [T, K]     -> f32 [T, N]
    experts(bb, x, ids, routing_weights, weights, layout: ExpertsLayout,
            activation: ExpertActivation, isa, biases=None)                     x f32 [T, D]     -> f32 [T, D]
    embedding(bb, ids, weights, layout: LaneLayout)                             ids int [T]      -> f32 [T, D]

`weights` maps the names of `layout.arrays()` to Relax tensors of the shapes and dtypes given there; `isa` is `Isa.of(target)`.

    LaneLayout(n, k, format).arrays()      integer formats: codes uint32 [N/16, K/32, bits, 16], scale float16 [N/16, groups, 16],
                                           where asymmetric zero uint8 [N/16, groups, 16]; N and K padded, see `layout`
                                           f32, f16, bf16: values float32, float16, uint16 [N/16, K, 16]
    ExpertsLayout(E, D, F, gate_up_format, down_format, gated=True).arrays()
                                           the same under gate_up_ and down_, with a leading axis E; where a projection has low-rank
                                           factors, also under gate_up_left_, gate_up_right_, down_left_, down_right_

Packing, in numpy, one expert or all of them (any leading axes):

    layout.tile(codes [..., N, K], scale [..., N, groups], zero or None)        integer formats; `untile` is the exact inverse
    layout.tile_values(values [..., N, K])                                      floating point, bf16 as its bits in uint16
    experts.gate_up.tile(experts.interleave(codes), experts.interleave(scale))  rows [gate; up] -> tiles of gate and up in turn
    experts.down.tile(codes, scale)
    experts.biases(gate_up [E, 2F], down [E, D])                                what `experts(biases=...)` takes

Every array has to start at an address divisible by 64.

Integer weights meet activations quantised to 16 bits in groups: results agree with float arithmetic on the dequantised weights to
a few parts in 10^5 of their size. Floating-point weights are computed in float32.
"""

from moec.targets.kernels.cpu.activation_functions import ExpertActivation
from moec.targets.kernels.cpu.embedding import embedding, embedding_func
from moec.targets.kernels.cpu.experts import experts, experts_func
from moec.targets.kernels.cpu.experts_layout import ExpertsLayout
from moec.targets.kernels.cpu.isa import Isa
from moec.targets.kernels.cpu.layout import LaneLayout
from moec.targets.kernels.cpu.linear import linear, linear_func

__all__ = [
    "ExpertActivation",
    "ExpertsLayout",
    "Isa",
    "LaneLayout",
    "embedding",
    "embedding_func",
    "experts",
    "experts_func",
    "linear",
    "linear_func",
]
