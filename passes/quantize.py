"""Choose weight formats: by the role of a parameter, with exceptions by name.

    param @model.layers.0.mlp.experts.up: f32[64, 2048, 2048] as bf16
    ->
    param @model.layers.0.mlp.experts.up: f32[64, 2048, 2048] as int4_g64

The graph is otherwise unchanged: values become codes when the artifact is written, by the quantiser that `method` names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moec.compiler.errors import MoecError
from moec.compiler.ir import Graph
from moec.compiler.quantizers import get_quantizer
from moec.compiler.roles import parameter_roles
from moec.runtime.formats import get_format


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
        method: the quantiser, a file of `compiler/quantizers`.
    """

    experts: str | None = None
    linear: str | None = None
    embedding: str | None = None
    router: str | None = None
    other: str | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)
    method: str = "rtn"

    def __post_init__(self) -> None:
        get_quantizer(self.method)
        for name in (self.experts, self.linear, self.embedding, self.router, self.other, *self.overrides.values()):
            if name is not None:
                get_format(name)
        if self.other is not None and self.other.startswith("int"):
            raise MoecError(f"quantize: other={self.other!r} must be a plain format (f32, bf16, f16): it covers norms and biases")
        for pattern in self.overrides:
            try:
                re.compile(pattern)
            except re.error as error:
                raise MoecError(f"quantize: the override {pattern!r} is not a regular expression: {error}") from error

    def run(self, graph: Graph) -> tuple[Graph, bool]:
        changed = []
        for name, role in parameter_roles(graph).items():
            param = graph.params[name]
            chosen = next((f for p, f in self.overrides.items() if re.search(p, name)), getattr(self, role))
            if param.type.dtype == "f32" and chosen is not None and chosen != param.format:
                changed.append(replace(param, format=chosen))
        return graph.with_params(changed), bool(changed)


PASS = Quantize
