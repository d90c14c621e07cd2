"""CUDA kernels for packed weights, written in TIR, compiled without a GPU.

    linear(functions, x, weights, layout: FragmentLayout, bias, most, gpu: Gpu)    x f32 [T, K]     -> f32 [T, N]
    experts(functions, x, ids, routing_weights, weights, layout: ExpertsLayout,
            activation: ExpertActivation, biases, counts, choice: Choice)          x f32 [T, D]     -> f32 [T, D]
    projections_func(spec), routing_step_func(spec), step_func(spec, options)      one token: a PrimFunc each

One layout (`layout`, `packing`, `experts_layout`) serves all of them: the order in which a warp holds operand A of the tensor cores.
Weights that it cannot hold lie in their `rows`. By topic:

    weights        `stored` reads them, `dequantize` makes operand A of them, `element` reads a single number
    few tokens     `stream` multiplies, `ring` brings activations; `experts_decode`, with `routing` and `share`; `linear`
    many tokens    `product` multiplies, by `matrix`, blocks of a `shape` with activations that are `staged`, from `gathered` or
                   `image`, and with weights in `registers`; `product_narrow` those of E4M3 from `narrow`; `experts_prefill` and
                   `experts_results`, with `sort` and `tiles`; `linear`
    one token      `projections` and its parts, on `fixed_point`; `routing_step`; of several tokens `routing_tokens`
    attention      `attention`: `step` and its parts, `attend_product` for blocks of several tokens; `attend` and `attend_tile` for heads of
                   other sizes; `attention_parts`
    rest           `embedding`, `norm`, `rope`, `router` and `choice`, `skip`, `best`, `activation`, `counting`
    options        `space` says which there are for an `experts_layer`, `expected` what they should cost, `tuned` chooses by records, which
                   are of a version of a `family` of kernels
    words          `emit`, `intrinsics`, `loads`, `copies`, `warp`, `arrival`; `pipeline` makes CUDA of them, `calls` is what emitters get

docs/kernels.md says what was tried, and what it gave.

Integer weights meet the activations as they are, without rounding, and scales multiply the sums; activations of float32 are two terms of
bfloat16, or integers of 24 bits: results agree with float arithmetic on the dequantised weights to a few parts in 10^6 of their size.
"""
