"""Training a few of a model's numbers, with everything else fixed, so that its next-token distribution comes back to the reference's.

    loss = mean over tokens of KL(reference || model)

What can be trained: matrices of routers, weights of norms, and the scales of quantised weights, whose codes stay (as in
https://arxiv.org/abs/2407.11062, second phase). Scales are shared between a weight's group members: value = (code - zero) scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moec.compiler.ir import Param
from moec.compiler.model import Model
from moec.compiler.ops import Stacked
from moec.compiler.packed import Quantized, coded_format
from moec.compiler.roles import parameter_roles
from moec.compiler.weights import Edited, WeightSource, constant, packed_of
from moec.runtime.formats.int import IntFormat

KINDS = ("router", "norm", "scale")
TINY = 2.0**-24
"""The smallest float16: no scale is smaller."""


@dataclass(frozen=True)
class Rescaled:
    """Another source, some of whose quantised weights have new scales; keys are parameters and experts."""

    base: WeightSource
    made: Mapping[tuple[str, int | None], Quantized]
    params: Mapping[str, Param]

    def packed(self, name: str, expert: int | None = None) -> Quantized | None:
        """See `PackedSource`."""
        return self.made.get((name, expert)) or packed_of(self.base, name, expert)

    def load(self, name: str, expert: int | None = None) -> Tensor:
        """See `PackedSource`."""
        if expert is None and (name, 0) in self.made:
            return torch.stack([self.load(name, e) for e in range(int(self.params[name].type.shape[0]))])
        if (packed := self.made.get((name, expert))) is None:
            return self.base.load(name, expert)
        fmt = coded_format(self.params[name], expert)
        assert fmt is not None
        return packed.values(fmt)


@dataclass
class ScaledWeight:
    """A quantised weight [N, K] as a function of its scales, the only thing that is differentiated."""

    codes: Tensor
    """[N, K] int8, the zero points taken off."""
    scale: Tensor
    """[N, groups] float32, a leaf."""
    size: int

    def value(self) -> Tensor:
        """(code - zero) scale: float32 [N, K]."""
        return self.codes * self.scale.repeat_interleave(self.size, 1)[:, : self.codes.shape[1]]


@dataclass
class ScaledStack:
    """A stacked weight [E, N, K] of `ScaledWeight`s, made an expert at a time."""

    experts: Sequence[ScaledWeight]
    is_meta: bool = False

    @property
    def shape(self) -> Sequence[int]:
        return (len(self.experts), *self.experts[0].codes.shape)

    def __getitem__(self, expert: int) -> Tensor:
        return self.experts[expert].value()


@dataclass
class Trained:
    """What is trained of a model.

    `plain` holds values by parameter, `scaled` quantised weights by parameter and expert, `leaves` what takes their place in the graph.
    """

    model: Model
    plain: dict[str, Tensor] = field(default_factory=dict)
    scaled: dict[tuple[str, int | None], ScaledWeight] = field(default_factory=dict)
    leaves: dict[str, Tensor | Stacked] = field(default_factory=dict)

    def groups(self, rates: Mapping[str, float]) -> list[dict[str, object]]:
        """Parameter groups of an optimiser; scales move in proportion to their mean size."""
        plain: list[dict[str, object]] = [{"params": list(self.plain.values()), "lr": rates["plain"]}] if self.plain else []
        scales = (weight.scale for weight in self.scaled.values())
        return plain + [{"params": [s], "lr": rates["scale"] * float(s.detach().abs().mean())} for s in scales]

    @torch.no_grad()
    def result(self) -> Model:
        """The model with the values as they are now, in the formats that it has."""
        made = {}
        for (name, expert), weight in self.scaled.items():
            old = packed_of(self.model.weights, name, expert)
            assert old is not None
            scale = weight.scale.cpu().clamp(-65504.0, 65504.0).numpy().astype(np.float16)
            scale = np.where(np.abs(scale) < TINY, np.copysign(np.float16(TINY), scale), scale).astype(np.float16)
            made[name, expert] = Quantized(old.codes, scale, old.zero)
        weights: WeightSource = Rescaled(self.model.weights, made, self.model.graph.params) if made else self.model.weights
        values = {n: constant(v.detach().clone().cpu()) for n, v in self.plain.items()}
        return Model(self.model.graph, Edited(weights, values))


def trained(model: Model, kinds: Sequence[str]) -> Trained:
    """The leaves of a model of these kinds: `router`, `norm`, `scale`.

    Scales of experts alone are trained, and only where all experts of a stack are quantised.
    """
    found, device = Trained(model), torch.get_default_device()
    roles = parameter_roles(model.graph)
    for name, param in model.graph.params.items():
        norm = any(n.op in ("rms_norm", "layer_norm") and n.inputs[1] == name for n in model.graph.users.get(name, ()))
        if param.type.dtype != "f32":
            continue
        if (roles[name] == "router" and "router" in kinds and coded_format(param) is None) or (norm and "norm" in kinds):
            found.plain[name] = found.leaves[name] = model.load(name).clone().requires_grad_()
        elif roles[name] == "experts" and "scale" in kinds:
            stack = [_scaled(model, param, e, device) for e in range(int(param.type.shape[0]))]
            if all(w is not None for w in stack):
                weights = [w for w in stack if w is not None]
                found.scaled |= {(name, e): w for e, w in enumerate(weights)}
                found.leaves[name] = ScaledStack(weights)
    return found


def _scaled(model: Model, param: Param, expert: int, device: torch.device) -> ScaledWeight | None:
    fmt, packed = coded_format(param, expert), packed_of(model.weights, param.name, expert)
    if not isinstance(fmt, IntFormat) or packed is None:  # scales of fp8 blocks belong to several rows
        return None
    k = packed.codes.shape[1]
    zero = np.repeat(packed.zero.astype(np.int16), fmt.group_size(k), axis=1)[:, :k]
    codes = torch.from_numpy((packed.codes.astype(np.int16) - zero).astype(np.int8 if fmt.bits < 8 else np.int16)).to(device)
    scale = torch.from_numpy(packed.scale.astype(np.float32)).to(device).requires_grad_()
    return ScaledWeight(codes, scale, fmt.group_size(k))
