"""Choose weight formats, by the role of a parameter, with exceptions by name, and how values become codes.

    param @model.layers.0.mlp.experts.up: f32[64, 2048, 2048] as bf16
    ->
    param @model.layers.0.mlp.experts.up: f32[64, 2048, 2048] as int4_g64

The graph is otherwise unchanged. A quantiser that reads nothing but the weight works when the artifact is written, one expert at a time;
one that reads the second moments of inputs works layer by layer while calibration text runs through the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from moec.compiler.context import Context
from moec.compiler.corrections import Corrected, with_corrections
from moec.compiler.errors import MoecError
from moec.compiler.low_rank import Correction
from moec.compiler.model import Model
from moec.compiler.moments import diagonal_moments
from moec.compiler.packed import chosen_format, is_quantized
from moec.compiler.quantization import QuantizedWeights, quantize_in_order
from moec.compiler.quantizers import Quantizer, get_quantizer
from moec.compiler.roles import Role, parameter_roles
from moec.runtime.formats import get_format
from moec.runtime.formats.float import PlainFormat

KEEP_CODES_BELOW = 1 << 28
"""Parameters of a model whose codes are kept in memory once made; of a larger one they are made again when needed."""


@dataclass(frozen=True)
class Quantize:
    """Weight formats by role; None leaves a role as it is.

    Args:
        experts: format of the experts' projections.
        linear: format of every other linear layer (attention, shared experts, dense layers).
        embedding: format of the token embedding and of the projection to the logits.
        router: format of the routers' matrices.
        other: format of norms, biases and tables; a plain one.
        overrides: from a regular expression over parameter names to a format; the first that matches wins over the role.
        method: the quantiser, a file of `compiler/quantizers`, of experts and linear layers; others are rounded to nearest.
        options: options of the quantiser.
        weighted: moments of an expert count tokens by the square of their routing weight.
        low_rank: low-rank factors of what the experts' codes lose: rank, format, weighted, rounds as in `compiler/low_rank.py` (LoRC).
        sequential: quantise layer by layer, each with the inputs that its quantised predecessors make; otherwise inputs are those of
            the model before. None: only methods that read whole moments are, the others use the calibration statistics.
    """

    experts: str | None = None
    linear: str | None = None
    embedding: str | None = None
    router: str | None = None
    other: str | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    method: str = "rtn"
    options: Mapping[str, Any] = field(default_factory=dict)
    weighted: bool = True
    low_rank: Mapping[str, Any] | None = None
    sequential: bool | None = None

    def __post_init__(self) -> None:
        chosen = get_quantizer(self.method, self.options)
        Correction.of(self.low_rank)
        for name in (self.experts, self.linear, self.embedding, self.router, self.other, *self.overrides.values()):
            if name is not None:
                chosen_format(name, "quantize")
        if self.other is not None and not isinstance(get_format(self.other), PlainFormat):
            raise MoecError(f"quantize: other={self.other!r} must be a plain format (f32, bf16, f16): it covers norms and biases")
        chosen.require(self.experts, self.linear)
        for pattern in self.overrides:
            try:
                re.compile(pattern)
            except re.error as error:
                raise MoecError(f"quantize: the override {pattern!r} is not a regular expression: {error}") from error

    def run(self, model: Model, context: Context) -> Model:
        roles = parameter_roles(model.graph)
        changed = []
        for name, role in roles.items():
            param = model.graph.params[name]
            chosen = next((f for p, f in self.overrides.items() if re.search(p, name)), getattr(self, role))
            if param.type.dtype == "f32" and chosen is not None and param.format not in (chosen, "zero"):
                if is_quantized(param):
                    raise MoecError(f"quantize: @{name} is already {param.format}; a weight can be quantised once")
                changed.append(replace(param, format=chosen))
        if not changed:
            return model
        model = Model(model.graph.with_params(changed), model.weights)
        names = {p.name: roles[p.name] for p in changed if is_quantized(p)}
        chosen_quantizer = get_quantizer(self.method, self.options)
        chosen_quantizer.require(*(str(p.format) for p in changed if roles[p.name] in ("experts", "linear")))
        return apply_quantizer(
            model, names, chosen_quantizer, context,
            weighted=self.weighted, sequential=self.sequential, correction=Correction.of(self.low_rank),
        )  # fmt: skip


def apply_quantizer(
    model: Model, names: Mapping[str, Role], chosen: Quantizer, context: Context, *,
    weighted: bool = True, sequential: bool | None = None, correction: Correction | None = None,
) -> Model:  # fmt: skip
    """A model whose parameters `names` (with their roles) are quantised in the formats that the graph states.

    Args:
        weighted, sequential: as in `Quantize`.
        correction: low-rank factors that the experts get.
    """
    corrections: dict[str, Corrected] = {}
    if correction is not None:
        model, corrections = with_corrections(model, names, correction)
        if not corrections:
            raise MoecError("low_rank corrects quantised experts, and this step quantises none: give `experts` an integer format")
    plain = get_quantizer("rtn")
    quantizers = {name: chosen if role in ("experts", "linear") else plain for name, role in names.items()}
    quantizers |= {factor: plain for corrected in corrections.values() for factor in (corrected.left, corrected.right)}
    moments, what = None, f"quantize with {chosen.name}"
    weighs = correction is not None and correction.weighted
    if weighs or (chosen.needs != "none" and chosen in quantizers.values()):
        if weighs or chosen.needs == "full" or sequential:
            return quantize_in_order(
                model, quantizers, context.need_text(f"{what} and weighted factors" if weighs else what), context.progress,
                weighted=weighted, sequential=sequential is not False, work=context.work and context.work / "codes",
                corrections=corrections,
            )  # fmt: skip
        moments = diagonal_moments(model.graph, context.statistics(model, what), weighted)
    size = sum(prod(int(d) for d in p.type.shape) for p in model.graph.params.values())
    keep = size < KEEP_CODES_BELOW
    return Model(model.graph, QuantizedWeights(model.weights, model.graph, quantizers, moments, keep=keep, corrections=corrections))


PASS = Quantize
