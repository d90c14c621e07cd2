"""A layer on the GPU: random weights in the kernels' layout, tokens and their routing, and calls of the kernels of a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moec.compiler.measure import reference
from moec.compiler.measure.cases import Case
from moec.compiler.measure.device import DEVICE, load_library, tvm_ffi_module
from moec.targets.kernels.cuda.experts_layer import Layer
from moec.targets.kernels.cuda.experts_layout import Stack
from moec.targets.kernels.cuda.layout import BLOCK

FP8_SPREAD = 107.0
"""The standard deviation of the numbers of E4M3."""

POISON = 0x7FFFFFFF
"""What buffers between kernels hold before: NaN as two bfloat16, no position as int32."""


@dataclass(frozen=True)
class LayerWeights:
    """The weights of a layer as the kernels hold them, by name; biases as the kernels read them."""

    layer: Layer
    gate_up: Mapping[str, Tensor]
    down: Mapping[str, Tensor]
    biases: tuple[Tensor, Tensor] | None = None

    def nbytes(self, ids: Tensor) -> int:
        """Bytes of the experts that these ids run."""
        layout = self.layer.layout
        used = [e for e in ids.unique().tolist() if 0 <= e < layout.experts]
        return sum(layout.gate_up.nbytes(e) + layout.down.nbytes(e) for e in used)


@dataclass(frozen=True)
class Tokens:
    """Tokens and what the router gives them: x [T, D], ids int32 [T, K], routing_weights float32 [T, K]."""

    x: Tensor
    ids: Tensor
    routing_weights: Tensor


def random_weights(layer: Layer, seed: int, biases: bool = False, device: str = DEVICE) -> LayerWeights:
    """Weights whose outputs are about as large as what goes in."""
    generator = torch.Generator(device).manual_seed(seed)
    layout = layer.layout
    made = [_random_arrays(stack, generator, device) for stack in (layout.gate_up, layout.down)]
    both = None
    if biases:
        shapes = ((layout.experts, layout.gate_up.n), (layout.experts, layout.d))
        up, down = (torch.randn(shape, device=device, generator=generator) * 0.1 for shape in shapes)
        both = up, down
    return LayerWeights(layer, made[0], made[1], both)


def _random_arrays(stack: Stack, generator: torch.Generator, device: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for index, layout in enumerate(stack.classes):
        wanted = 1.5 / layout.k**0.5  # the standard deviation of a weight
        for name in layout.arrays():
            shape, _ = stack.arrays()[name + stack.suffix(index)]
            if name == "codes":
                made = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=device, generator=generator)
                if layout.fp8 is not None:
                    codes = made.view(torch.uint8)
                    made = (codes ^ ((codes & 0x7F) == 0x7F)).view(torch.int32)  # there is no NaN
            elif name == "scale":
                # standard deviations of codes drawn uniformly
                spread = 2**layout.integer.bits / 12**0.5 if layout.integer else FP8_SPREAD
                made = (0.5 + torch.rand(shape, device=device, generator=generator)) * (wanted / spread)
                made = made.half() if layout.integer else made
            elif name == "zero":
                levels = layout.integer.levels if layout.integer else 1
                made = torch.randint(levels // 4, levels - levels // 4, shape, device=device, generator=generator).to(torch.uint8)
            else:
                made = (torch.randn(shape, device=device, generator=generator) * wanted).bfloat16()
            found[name + stack.suffix(index)] = made
    return {**found, "table": torch.from_numpy(stack.table()).to(device)} if stack.tabled else found


def random_tokens(layer: Layer, tokens: int, seed: int, skew: str = "uniform", skipped: float = 0.0, device: str = DEVICE) -> Tokens:
    """Tokens whose experts are drawn uniformly, or by Zipf's law (`zipf`: expert e as often as 1 / (e + 1)).

    Args:
        skipped: the share of slots, the last ones of each token, that run no expert: their id is -1.
    """
    generator = torch.Generator(device).manual_seed(1000 + seed)
    x = torch.randn(tokens, layer.d, device=device, generator=generator).to(getattr(torch, layer.outside))
    share = torch.ones(layer.experts, device=device)
    if skew == "zipf":
        share = 1 / torch.arange(1, layer.experts + 1, device=device)
        share = share[torch.randperm(layer.experts, device=device, generator=generator)]
    ids = torch.zeros(0, layer.top_k, dtype=torch.int64, device=device)
    if tokens:
        ids = torch.multinomial(share.expand(tokens, -1), layer.top_k, generator=generator)
    if count := round(skipped * layer.top_k):
        ids[:, layer.top_k - count :] = -1
    weights = torch.rand(tokens, layer.top_k, device=device, generator=generator).softmax(-1)
    return Tokens(x, ids.int(), weights)


@dataclass
class Runner:
    """The kernels of a case, for a number of tokens.

    Args:
        case: what was built.
        library: the loaded library.
        tokens: T.
        ffi: `tvm_ffi`.
    """

    case: Case
    library: Any
    tokens: int
    ffi: Any
    buffers: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, case: Case, name: str, tokens: int) -> Runner:
        """Load a library that was built."""
        library = load_library(folder, name)
        return cls(case, library, tokens, tvm_ffi_module(folder))

    def __post_init__(self) -> None:
        layer, slots = self.case.layer, self.tokens * self.case.layer.top_k
        padded, dtype = layer.layout.padded_f, getattr(torch, layer.outside)
        if self.case.kernel == "prefill":
            options = dict(self.case.options)
            most = min(slots, layer.experts) + slots // options["tokens"]
            self.buffers = {
                "order": _filled(slots), "places": _filled(slots), "tiles": _filled(most + 1, 4),
                "hidden": _filled(layer.terms, slots, padded // 2).view(torch.uint16),
                "y": torch.full((slots, layer.d), torch.nan, dtype=dtype, device=DEVICE),
            }  # fmt: skip
            for name, columns in (("image", layer.d), ("hidden", padded)) if options.get("cluster") else ():
                blocks, size = -(-columns // BLOCK), options["tokens"]
                if "chunk" in options:
                    self.buffers[name] = _filled(most, blocks, size * BLOCK // 4).view(torch.uint8)
                    self.buffers[f"{name}_scale"] = _filled(most, blocks, size).view(torch.float32)
                else:
                    self.buffers[name] = _filled(most, blocks, size * BLOCK // 2).view(torch.uint16)
        else:
            self.buffers = {"hidden": _filled(slots, layer.terms, padded // 2).view(torch.uint32)}
        self.buffers["out"] = torch.full((self.tokens, layer.d), torch.nan, dtype=dtype, device=DEVICE)

    def bind(self, weights: LayerWeights, tokens: Tokens) -> Callable[[], Tensor]:
        """A call of the kernels, on the current stream, that returns the result."""
        convert, b = self.ffi.from_dlpack, self.buffers
        ids, share = tokens.ids, tokens.routing_weights
        up, down = ([_as_kernels_read(name, t) for name, t in side.items()] for side in (weights.gate_up, weights.down))
        if weights.biases is not None:
            up, down = [*up, weights.biases[0]], [*down, weights.biases[1]]
        if self.case.kernel == "prefill":
            x = split_terms(tokens.x, self.case.layer.terms)
            image, hidden = ([b[n] for n in (name, f"{name}_scale") if n in b] for name in ("image", "hidden"))
            given: dict[str, list[Tensor]] = {
                "sort": [ids, b["order"], b["places"], b["tiles"]],
                "arrange": [x, b["order"], b["tiles"], *image],
                "gate_up": [x, *image, b["order"], b["tiles"], *up, *hidden],
                "down": [*hidden, b["tiles"], *down, b["y"]],
                "combine": [b["y"], b["places"], share, b["out"]],
            }
        else:
            given = {"gate_up": [tokens.x, ids, *up, b["hidden"]], "down": [b["hidden"], ids, share, *down, b["out"]]}
        calls = [(self.library[name], [convert(t) for t in given[name]]) for name in self.case.functions]

        def run() -> Tensor:
            for function, arguments in calls:
                function(*arguments)
            return b["out"]

        run.kept = given  # type: ignore[attr-defined]  # tensors that the arguments point into
        return run

    def poison(self) -> None:
        """Fill buffers with what would show in the result."""
        for name, buffer in self.buffers.items():
            if name in ("out", "y"):
                buffer.fill_(torch.nan)
            else:
                buffer.view(torch.int32).fill_(POISON)


def split_terms(x: Tensor, terms: int) -> Tensor:
    """x [T, D] as uint16 [terms, T, D], the bits of bfloat16 numbers that add up to it."""
    parts, rest = [], x.float()
    for _ in range(terms):
        parts.append(rest.bfloat16())
        rest = rest - parts[-1].float()
    return torch.stack(parts).view(torch.uint16)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, nan where the result is not finite; of nothing it is 0."""
    if not expected.numel():
        return 0.0
    size = expected.norm()
    difference = (found.double() - expected).norm()
    return float(difference / size) if size > 0 else float(difference)


def expected_result(weights: LayerWeights, tokens: Tokens, activation: str = "silu") -> Tensor:
    """What the layer computes, in float64."""
    layout = weights.layer.layout
    given = (tokens.x, tokens.ids, tokens.routing_weights)
    return reference.experts(layout, weights.gate_up, weights.down, *given, activation, weights.biases)


def _filled(*shape: int) -> Tensor:
    return torch.full(shape, POISON, dtype=torch.int32, device=DEVICE)


def _as_kernels_read(name: str, x: Tensor) -> Tensor:
    """The tensor with the type that the kernels declare."""
    if name.startswith("codes"):
        return x.view(torch.uint32)
    return x.view(torch.uint16) if name.startswith("values") else x
