"""CUDA kernels for packed weights, written in TIR, compiled without a GPU.

    linear(functions, x, weights, layout: FragmentLayout, bias, most, gpu)         x f32 [T, K]     -> f32 [T, N]
    experts(functions, x, ids, routing_weights, weights, layout: ExpertsLayout,
            activation: ExpertActivation, biases, choice)                          x f32 [T, D]     -> f32 [T, D]

One layout (`layout`, `experts_layout`) serves all of them: the order in which a warp holds operand A of the tensor cores. `stored` reads
it; `stream` multiplies it with a few tokens, `product` with many (compute capability 9.0; `plain` elsewhere). `experts_decode` and
`experts_prefill` are made of these, `routing` and `sort` bring tokens to their experts, `space` and `tuned` choose options.
`norm`, `rope`, `router`, `skip`, `embedding` and `attention` are the rest of a model. `emit`, `intrinsics`, `matrix` and
`warp` have the words that they are written in; docs/kernels.md says what was tried, and what it gave.

Integer weights meet the activations as they are, in bfloat16 without rounding, and scales multiply the sums; activations of float32 are
two terms of bfloat16: results agree with float arithmetic on the dequantised weights to a few parts in 10^6 of their size.
"""
