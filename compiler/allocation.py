"""What bits are assigned to: units of weights that get one format together, and what each costs in each format."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moec.compiler.calibration.text import Text
from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.factors import require_no_factors
from moec.compiler.layers import MoeLayer, moe_layers
from moec.compiler.model import Model
from moec.compiler.packed import CodedFormat, is_quantized, rounded
from moec.compiler.quantizers import Quantizer, get_quantizer
from moec.compiler.roles import Kind, node_kinds
from moec.runtime.formats import get_format

GRAINS = ("expert", "projection")

Menus = Mapping[str, Sequence[str]]
"""The formats that each kind of weights (`moec.compiler.roles.KINDS`) may get."""


@dataclass(frozen=True)
class Unit:
    """Weights that get one format.

    Args:
        name: what the journal calls it.
        kind: what the weights are for.
        uses: the nodes that read them: one, but for matrices that are tied.
        expert: which expert of it; None for what is whole.
        members: the parameters.
    """

    name: str
    kind: Kind
    uses: tuple[str, ...]
    expert: int | None
    members: tuple[str, ...]

    @property
    def node(self) -> str:
        """The first node that reads them."""
        return self.uses[0]


def make_units(model: Model, grain: str, kinds: Collection[str], what: str = "assign_bits") -> list[Unit]:
    """The units of a model, in the order of the graph.

    A matrix that several nodes share is one unit, of the kind of the first use that takes part.

    Args:
        grain: `expert` gives an expert's projections one format, `projection` each its own.
        kinds: which take part.
        what: who asks, for errors.

    Raises:
        MoecError: there are none, or one is quantised already.
    """
    require_no_factors(model.graph, what)
    layers, found = {layer.name: layer for layer in moe_layers(model.graph)}, node_kinds(model.graph)
    units: list[Unit] = []
    whole: dict[str, Unit] = {}
    for node in model.graph.nodes:
        if node.name in layers and "experts" in kinds:
            units += _expert_units(layers[node.name], grain)
        elif (kind := found.get(node.name, "experts")) != "experts" and node.inputs[1] in model.graph.params:
            known = whole.get(node.inputs[1], Unit(node.inputs[1], kind, (), None, (node.inputs[1],)))
            kind = known.kind if known.kind in kinds else kind
            whole[node.inputs[1]] = replace(known, kind=kind, uses=(*known.uses, node.name))
    units += [unit for unit in whole.values() if unit.kind in kinds]
    order = {node.name: at for at, node in enumerate(model.graph.nodes)}
    units.sort(key=lambda unit: order[unit.node])
    if not units:
        raise MoecError(f"{what}: the model has no weights of the kinds {', '.join(kinds)}")
    for name in {member for unit in units for member in unit.members}:
        if is_quantized(model.graph.params[name]):
            raise MoecError(f"{what}: @{name} is already {model.graph.params[name].format}; put {what} before quantize")
    return units


def _expert_units(layer: MoeLayer, grain: str) -> list[Unit]:
    if grain == "expert":
        return [Unit(f"{layer.name}[{e}]", "experts", (layer.name,), e, (layer.up, layer.down)) for e in range(layer.count)]
    ends = (("up", layer.up), ("down", layer.down))
    return [Unit(f"{layer.name}[{e}].{end}", "experts", (layer.name,), e, (name,)) for e in range(layer.count) for end, name in ends]


def member_shape(model: Model, unit: Unit, member: str) -> tuple[int, ...]:
    """The shape of a unit's part of a parameter."""
    shape = tuple(int(d) for d in model.graph.params[member].type.shape)
    return shape if unit.expert is None else shape[1:]


@dataclass(frozen=True)
class Problem:
    """What an objective is asked: the damage of each unit in each format that it may get.

    Args:
        model: before quantisation.
        context: for calibration text, the seed and progress.
        units, formats: the rows and columns of the answer.
        quantizer: how the formats' values are made to see what they do.
        menus: the formats of a kind, where they are not all.
    """

    model: Model
    context: Context
    units: tuple[Unit, ...]
    formats: tuple[str, ...]
    quantizer: Quantizer
    menus: Menus = field(default_factory=dict)

    @cached_property
    def allowed(self) -> NDArray[np.bool_]:
        """Which formats each unit may get: [U, O]."""
        return np.array([[fmt in self.menus.get(unit.kind, self.formats) for fmt in self.formats] for unit in self.units])

    @property
    def text(self) -> Text:
        return self.context.need_text("assign_bits")

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Exact bytes of each unit in each format, scales and zero points included: [U, O]."""
        shapes = [[member_shape(self.model, unit, m) for m in unit.members] for unit in self.units]
        return np.array([[sum(get_format(f).nbytes(s) for s in row) for f in self.formats] for row in shapes], np.int64)

    @cached_property
    def weights(self) -> NDArray[np.int64]:
        """How many weights each unit has: [U]."""
        return np.array([sum(prod(member_shape(self.model, unit, m)) for m in unit.members) for unit in self.units], np.int64)

    def changed(self, weight: Tensor, option: str, moment: Callable[[], Tensor] | None) -> Tensor:
        """What a weight [N, K] becomes in a format; several threads may ask at a time.

        Args:
            moment: gives the second moment [K, K] of what it is multiplied with; without it the weight is rounded to nearest, as what is
                neither expert nor linear layer is.
        """
        chosen, quantizer = get_format(option), self.quantizer if moment is not None else get_quantizer("rtn")
        if not isinstance(chosen, CodedFormat):
            return rounded(weight, option).to(weight.dtype)
        full = moment() if moment is not None and quantizer.needs != "none" else None
        read = full.diagonal() if full is not None and quantizer.needs == "diagonal" else full
        return quantizer.quantize(weight, chosen, read).values(chosen).to(weight.device)


def known_damages(damages: Tensor, problem: Problem) -> Tensor:
    """Damages [U, O] in which experts' units that no token reached are as sensitive as the least sensitive one that some did."""
    damages = damages.cpu()
    experts = torch.tensor([unit.expert is not None for unit in problem.units], device="cpu")
    silent = (damages == 0).all(1)
    if (lost := experts & silent).any() and (heard := experts & ~silent).any():
        damages = damages.clone()
        damages[lost] = damages[heard][damages[heard].sum(1).argmin()]
    return damages
