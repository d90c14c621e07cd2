"""What can be chosen for the experts kernels: the options of each, and which of them fit a layer and a target. Data only, no compiler.

Kernels are named by what a measurement times: `gate_up` and `down` are the two of a few tokens, `decode` both in a row, and `prefill` the
four of many tokens. Options are the fields of `DecodeSpec` and of `Shape`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import product

from moec.targets import Target
from moec.targets.kernels.cuda.expected import cost
from moec.targets.kernels.cuda.experts_layer import Layer
from moec.targets.kernels.cuda.layout import BLOCK, COLUMN_WORDS, PADDING, blocks_ahead, ceil_div
from moec.targets.kernels.cuda.shape import Shape

Options = dict[str, int]

COMMON_OPTIONS = ("tokens", "tiles", "stages", "exact", "residency", "depth", "batch", "multiprocessors", "cluster", "ring")
PREFILL_OPTIONS = (*COMMON_OPTIONS, "groups", "halved")
PREFILL = (
    (8, 1, 16, 1, 2, 4, 1, 0), (8, 1, 16, 1, 3, 3, 1, 0), (8, 1, 6, 1, 2, 8, 1, 0), (8, 1, 6, 1, 2, 2, 1, 0),
    (16, 1, 16, 1, 2, 4, 1, 0), (16, 1, 16, 1, 3, 3, 1, 0), (16, 1, 6, 1, 2, 6, 1, 0), (16, 1, 6, 1, 2, 4, 4, 1),
    (24, 1, 16, 1, 2, 4, 1, 0), (24, 1, 6, 1, 2, 4, 1, 0), (32, 1, 8, 1, 2, 4, 1, 0), (32, 1, 4, 1, 2, 4, 1, 0), (32, 1, 4, 1, 2, 4, 2, 1),
    (40, 1, 4, 1, 2, 3, 1, 0), (48, 1, 4, 1, 2, 3, 1, 0), (64, 1, 4, 0, 2, 2, 1, 0), (64, 1, 4, 1, 2, 2, 1, 0),
    (72, 2, 4, 0, 1, 2, 2, 1), (72, 2, 4, 0, 1, 2, 1, 1, 1, 4), (80, 2, 4, 0, 1, 2, 1, 1), (96, 2, 4, 0, 1, 2, 1, 1),
    (112, 2, 4, 0, 1, 2, 1, 1),
    (128, 2, 4, 0, 1, 2, 1, 1), (128, 2, 4, 0, 1, 2, 1, 1, 2), (128, 2, 3, 0, 1, 2, 1, 1, 2, 3), (136, 2, 4, 0, 1, 2, 1, 1),
    (192, 1, 8, 0, 1, 2, 1, 1, 4, 0, 2, 1), (256, 1, 6, 0, 1, 2, 1, 1, 2, 0, 2, 1), (256, 1, 3, 0, 1, 2, 1, 1, 4),
    (256, 1, 6, 0, 1, 2, 1, 1, 4, 0, 2, 1), (256, 1, 6, 0, 1, 4, 1, 1, 4, 0, 2, 1),
    (8, 1, 6, 1, 4, 8, 1, 0, 0, 0, 1), (16, 1, 6, 1, 4, 4, 1, 0, 0, 0, 1), (32, 1, 4, 1, 4, 4, 1, 0, 0, 0, 1),
    (48, 2, 8, 0, 3, 2, 1, 1, 4, 0, 1, 1), (64, 2, 7, 0, 3, 2, 1, 1, 4, 0, 1, 1), (72, 2, 8, 0, 2, 2, 1, 1, 4, 0, 1, 1),
    (96, 2, 8, 0, 2, 2, 1, 1, 4, 0, 1, 1), (128, 2, 6, 0, 2, 2, 1, 1, 2, 0, 1, 1), (128, 2, 3, 0, 2, 2, 1, 1, 4, 0, 1),
    (128, 2, 6, 0, 2, 2, 1, 1, 4, 0, 1, 1), (136, 2, 6, 0, 2, 2, 1, 1, 4, 0, 1, 1), (128, 2, 9, 0, 1, 2, 1, 1, 2, 0, 2, 1),
)  # fmt: skip
"""What a sweep tries of the kernels of many tokens, by columns: the product is too large, and most of it does not fit in registers.

The column of multiprocessors says whether blocks of threads stay for many tiles: as an option it is how many the GPU has. The last columns
may be left out.
"""

PREFILL_TERMS = ((64, 1, 4, 1, 1, 2, 1, 0), (64, 1, 4, 1, 1, 2, 1, 1), (96, 1, 3, 1, 1, 2, 1, 1))
"""What else it tries where activations are two terms, whose stages take twice the memory."""

NARROW_OPTIONS = (*COMMON_OPTIONS, "chunk", "buffers")
PREFILL_NARROW = (
    (32, 2, 4, 0, 1, 3, 1, 1, 1, 0, 32, 2), (64, 2, 4, 0, 1, 2, 1, 1, 1, 0, 64, 1), (64, 2, 4, 0, 1, 2, 1, 1, 1, 3, 64, 2),
    (64, 2, 4, 0, 1, 2, 1, 1, 2, 3, 64, 2), (96, 2, 4, 0, 1, 2, 1, 1, 1, 3, 48, 2), (96, 2, 4, 0, 1, 2, 1, 1, 2, 3, 48, 2),
    (128, 2, 4, 0, 1, 2, 1, 1, 1, 3, 64, 1), (128, 2, 4, 0, 1, 2, 1, 1, 2, 3, 64, 1),
)  # fmt: skip
"""What else it tries where activations may be E4M3: fields of `NarrowShape`."""

MULTIPROCESSORS = 132
"""Of an H100, which a GPU is taken for unless its target says otherwise."""

MOST_SHARED = 232_448
"""Bytes of shared memory of a block of compute capability 9.0."""

RESERVED = 1024
"""Bytes of shared memory that each block takes beside its own."""

MOST_DECODE = 8
"""The most tokens of the kernels of a few tokens."""


def shared_memory(target: Target) -> int:
    """Bytes of shared memory that a block may have on a target."""
    return int(json.loads(target.tvm).get("max_shared_memory_per_block", 48 << 10))


def has_many(target: Target) -> bool:
    """Whether a target can run the kernels of many tokens: they need what came with compute capability 8.0."""
    return int(re.sub(r"\D", "", str(json.loads(target.tvm)["arch"]))) >= 80


def has_clusters(target: Target) -> bool:
    """Whether a target can run those of them whose blocks share what they read, and `linear_tokens`: compute capability 9.0."""
    return str(json.loads(target.tvm)["arch"]) == "sm_90a"


def multiprocessors(target: Target) -> int:
    """The multiprocessors of a target."""
    return target.multiprocessors or MULTIPROCESSORS


def limits(target: Target) -> tuple[int, int, bool]:
    """What `default`, `candidates` and `Gpu` take of a target: bytes of shared memory, multiprocessors, and whether there are clusters."""
    return shared_memory(target), multiprocessors(target), has_clusters(target)


def default(
    kernel: str, layer: Layer, tokens: int, limit: int = MOST_SHARED, size: int = MULTIPROCESSORS, clusters: bool = True
) -> Options:
    """Options that are right for want of measurements: those that should cost least, and not fewer warps than hide latency."""
    if kernel == "prefill":
        fitting = [options for options in _all(kernel, layer, size) if fits(kernel, layer, tokens, options, limit, clusters)]
        if not fitting:
            return {"tokens": 8, "tiles": 1, "stages": 3, "terms": layer.terms, "exact": 1, "residency": 1, "depth": 2, "batch": 1,
                    "multiprocessors": 0}  # fmt: skip

        def rank(options: Options) -> tuple[float, bool]:
            stays = options["multiprocessors"] > 0
            return cost(layer.experts, layer.top_k, tokens, options), stays != (options["tokens"] > 16)

        return min(fitting, key=rank)
    splits = next(n for n in (4, 2, 1) if n <= ceil_div(layer.d, BLOCK))
    gate_up = {"warps": 8, "splits": splits, "unroll": 128, "residency": 0}
    downs = [{"down_warps": warps, "down_unroll": 64} for warps in (16, 8, 4)]
    down = next((options for options in downs if needs("down", layer, tokens, options)[1] <= limit), downs[-1])
    return {"gate_up": gate_up, "down": down, "decode": {**gate_up, **down}}[kernel]


def candidates(
    kernel: str, layer: Layer, tokens: int, limit: int = MOST_SHARED, size: int = MULTIPROCESSORS, clusters: bool = True
) -> list[Options]:
    """What a sweep tries on a GPU of `size` multiprocessors: all that fits, the default first."""
    fitting = (options for options in _all(kernel, layer, size) if fits(kernel, layer, tokens, options, limit, clusters))
    found = [default(kernel, layer, tokens, limit, size, clusters), *fitting]
    unique: dict[tuple[tuple[str, int], ...], Options] = {}
    for options in found:
        unique.setdefault(tuple(sorted(_effective(layer, options).items())), options)
    return list(unique.values())


def _effective(layer: Layer, options: Options) -> Options:
    """Options whose bytes under way are whole blocks of the widest format, as the kernels take them."""
    stack = layer.layout.down if "down_unroll" in options else layer.layout.gate_up
    block = max(c.block_words // 8 for c in stack.classes)
    return {name: max(1, value // block) if name.endswith("unroll") else value for name, value in options.items()}


def _all(kernel: str, layer: Layer, size: int) -> list[Options]:
    if kernel == "gate_up":
        return [
            {"warps": warps, "splits": splits, "unroll": unroll, "residency": 0}
            for (warps, splits), unroll in product(((4, 4), (8, 4), (8, 8)), (64, 128))
        ]
    if kernel == "down":
        return [{"down_warps": warps, "down_unroll": unroll} for warps, unroll in product((16, 32), (32, 64, 128))]
    shapes = PREFILL if layer.terms == 1 else (*PREFILL, *PREFILL_TERMS)
    found = [dict(zip(PREFILL_OPTIONS, shape, strict=False)) | {"terms": layer.terms} for shape in shapes]
    if layer.narrow:
        found += [dict(zip(NARROW_OPTIONS, shape, strict=True)) | {"terms": 1} for shape in PREFILL_NARROW]
    return [options | {"multiprocessors": options["multiprocessors"] * size} for options in found]


def fits(kernel: str, layer: Layer, tokens: int, options: Mapping[str, int], limit: int = MOST_SHARED, clusters: bool = True) -> bool:
    """Whether a block has the threads and the shared memory (`limit` bytes) that the options ask for, and a use for them.

    Weights are not rounded, which `exact` says, where activations are more than bfloat16.
    """
    threads, shared = needs(kernel, layer, tokens, options)
    if threads > 1024 or shared > limit:
        return False
    if kernel == "prefill":
        if ("chunk" in options and not layer.narrow) or (options.get("cluster") and not clusters):
            return False
        if (cluster := options.get("cluster", 0)) and (options["terms"] > 1 or layer.widths):
            return False
        if options.get("halved") and (not cluster or "chunk" in options):
            return False
        if cluster * Shape.of(options).block_tiles * layer.layout.tile_rows % BLOCK:
            return False  # a cluster writes whole blocks of hidden values
        each = tokens * layer.top_k / layer.experts  # tiles of which next to nothing would be used
        useful = options["tokens"] <= 8 or options["tokens"] <= 8 * each
        precise = bool(options["exact"]) or layer.terms == 1  # two terms would be for nothing
        return options["residency"] * (shared + RESERVED) <= limit + RESERVED and useful and precise
    return kernel == "down" or options["splits"] <= ceil_div(layer.d, BLOCK)


def needs(kernel: str, layer: Layer, tokens: int, options: Mapping[str, int]) -> tuple[int, int]:
    """Threads and bytes of shared memory of a block.

    >>> needs("down", Layer(64, 8, 2048, 1024, "int4_g128", "int4_g128"), 1, {"down_warps": 16, "down_unroll": 64})
    (512, 28672)
    """
    if kernel == "prefill":
        shape, layout = Shape.of(options), layer.layout
        up, down = shape.for_columns(layer.d), shape.for_columns(layer.f)
        gate_up_words = up.shared_words(layout.gate_up, up.hidden_words(layout.tile_rows))
        return shape.threads, 4 * max(gate_up_words, down.shared_words(layout.down, down.output_words(layer.outside)))
    columns = tokens * layer.terms
    fragments, slots = ceil_div(columns, 8), tokens * layer.top_k
    routing = 0 if tokens == 1 else sum(ceil_div(n, 4) * 4 for n in (layer.experts * layer.top_k, slots, slots * tokens, 1))
    threads = 32 * options["warps" if kernel == "gate_up" else "down_warps"]
    words = threads * 4 * fragments + routing
    if kernel == "gate_up":
        return threads, 4 * (words + columns * (ceil_div(layer.d, BLOCK) * BLOCK // 2 + PADDING))
    if layer.widths or layer.layout.down.mixed:  # where each rank's work begins
        words += 4 * (ceil_div(slots, 4) + ceil_div(slots + 1, 4))
    return threads, 4 * (words + threads // 32 * blocks_ahead(columns) * columns * COLUMN_WORDS)
