"""What bits are assigned to: units of weights that get one format together, and what each costs in each format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from moec.compiler.packed import is_quantized
from moec.compiler.quantizers import Quantizer
from moec.compiler.roles import parameter_roles
from moec.runtime.formats import get_format
from moec.runtime.formats.int import IntFormat

KINDS = ("experts", "linear")
GRAINS = ("expert", "projection")


@dataclass(frozen=True)
class Unit:
    """Weights that get one format.

    Args:
        name: what the journal calls it.
        node: the `experts` or `linear` node that they belong to.
        expert: which expert of it; None for a linear layer.
        members: the parameters.
    """

    name: str
    node: str
    expert: int | None
    members: tuple[str, ...]


def make_units(model: Model, grain: str, include: Sequence[str], what: str = "assign_bits") -> list[Unit]:
    """The units of a model, in the order of the graph.

    Args:
        grain: `expert` gives an expert's projections one format, `projection` each its own.
        include: which roles take part: `experts`, `linear`.
        what: who asks, for errors.

    Raises:
        MoecError: there are none, or one is quantised already.
    """
    require_no_factors(model.graph, what)
    layers, roles = {layer.name: layer for layer in moe_layers(model.graph)}, parameter_roles(model.graph)
    units: list[Unit] = []
    for node in model.graph.nodes:
        if node.name in layers and "experts" in include:
            units += _expert_units(layers[node.name], grain)
        elif node.op == "linear" and "linear" in include and roles.get(node.inputs[1]) == "linear":
            units.append(Unit(node.name, node.name, None, (node.inputs[1],)))
    if not units:
        raise MoecError(f"{what}: the model has no weights of the kinds {', '.join(include)}")
    for name in {member for unit in units for member in unit.members}:
        if is_quantized(model.graph.params[name]):
            raise MoecError(f"{what}: @{name} is already {model.graph.params[name].format}; put {what} before quantize")
    return units


def _expert_units(layer: MoeLayer, grain: str) -> list[Unit]:
    if grain == "expert":
        return [Unit(f"{layer.name}[{e}]", layer.name, e, (layer.up, layer.down)) for e in range(layer.count)]
    ends = (("up", layer.up), ("down", layer.down))
    return [Unit(f"{layer.name}[{e}].{end}", layer.name, e, (name,)) for e in range(layer.count) for end, name in ends]


def member_shape(model: Model, unit: Unit, member: str) -> tuple[int, ...]:
    """The shape of a unit's part of a parameter."""
    shape = tuple(int(d) for d in model.graph.params[member].type.shape)
    return shape if unit.expert is None else shape[1:]


@dataclass(frozen=True)
class Problem:
    """What an objective is asked: the damage of each unit in each format.

    Args:
        model: before quantisation.
        context: for calibration text, the seed and progress.
        units, formats: the rows and columns of the answer.
        quantizer: how the formats' values are made to see what they do.
    """

    model: Model
    context: Context
    units: tuple[Unit, ...]
    formats: tuple[str, ...]
    quantizer: Quantizer

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

    def changed(self, weight: Tensor, option: str, moment: Tensor | None) -> Tensor:
        """What a weight [N, K] becomes in a format.

        Args:
            moment: [K, K], of what it is multiplied with.
        """
        chosen, quantizer = get_format(option), self.quantizer
        if not isinstance(chosen, IntFormat):
            return weight.to(torch.bfloat16 if option == "bf16" else torch.float16 if option == "f16" else weight.dtype).to(weight.dtype)
        read = None if moment is None or quantizer.needs == "none" else moment.diagonal() if quantizer.needs == "diagonal" else moment
        made = quantizer.quantize(weight, chosen, read)
        return made.values(chosen).to(weight.device)


def known_damages(damages: Tensor) -> Tensor:
    """Damages [U, O] in which units that no token reached are as sensitive as the least sensitive one that some did."""
    silent = (damages == 0).all(1)
    if silent.any() and not silent.all():
        damages = damages.clone()
        damages[silent] = damages[~silent][damages[~silent].sum(1).argmin()]
    return damages
