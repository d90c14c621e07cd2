"""Give every expert, or every projection of one, the format that its damage to the model is worth, under a budget of bytes.

    param @layers.0.mlp.experts.up: f32[16, 384, 384] as bf16
    ->                                                             budget: 2.5, formats: [int2_g128, int3_g128, int4_g128]
    param @layers.0.mlp.experts.up: f32[16, 384, 384] as [int2_g128, int4_g128, int2_g128, ...]

An integer program chooses (`compiler/solver.py`) for damages that an objective measures (`compiler/sensitivity/`), over the whole model or
layer by layer; then a quantiser makes the values. `uniform_experts` makes layers of mixed formats runnable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from moec.compiler.allocation import KINDS, Problem, Unit, known_damages, make_units
from moec.compiler.context import Context
from moec.compiler.corrections import correction_bytes
from moec.compiler.errors import MoecError
from moec.compiler.ir import Param
from moec.compiler.low_rank import Correction
from moec.compiler.model import Model
from moec.compiler.neurons import neuron_orders, split_neurons
from moec.compiler.packed import chosen_format, is_quantized
from moec.compiler.plan import parse_size
from moec.compiler.quantizers import get_quantizer
from moec.compiler.roles import parameter_roles
from moec.compiler.sensitivity import Objective, get_objective
from moec.compiler.solver import Solution, choose
from moec.passes.quantize import apply_quantizer
from moec.runtime.errors import unknown


@dataclass(frozen=True)
class AssignBits:
    """Formats by unit under a budget; without a budget nothing changes.

    Args:
        budget: average bits of a weight, scales and zero points counted (2.5), or the bytes of all that is included (`12MiB`).
        formats: what may be chosen.
        units: `expert` or `projection` (gate and up together, and down, each have a format).
        neurons: cut experts into parts of so many neurons, the most salient first, which are units of their own
            (`compiler/neurons.py`); 0 leaves them whole.
        include: which weights the budget is for: `experts`, `linear` (attention, shared experts, dense layers).
        objective: what damage is, a file of `compiler/sensitivity`.
        objective_options: options of the objective.
        scope: `model`, one program for all layers; or `layer`, one for each with the same share of the budget a weight.
        probe: the quantiser whose values the objective tries.
        method, options, weighted: the quantiser that makes the final values, as in `quantize`.
        low_rank: low-rank factors of what the experts' codes lose, as in `quantize`; the budget holds them too.
    """

    budget: float | str | None = None
    formats: Sequence[str] = ("int2_g64", "int3_g64", "int4_g64")
    units: str = "projection"
    neurons: int = 0
    include: Sequence[str] = ("experts",)
    objective: str = "gauss_newton"
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    scope: str = "model"
    probe: str = "rtn"
    method: str = "rtn"
    options: Mapping[str, Any] = field(default_factory=dict)
    weighted: bool = True
    low_rank: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        get_objective(self.objective, self.objective_options)
        get_quantizer(self.method, self.options)
        get_quantizer(self.probe)
        Correction.of(self.low_rank)
        if self.scope not in ("model", "layer"):
            raise unknown("scope of assign_bits", self.scope, ["model", "layer"])
        if self.units not in ("expert", "projection"):
            raise unknown("units of assign_bits", self.units, ["expert", "projection"])
        if self.neurons < 0:
            raise MoecError(f"assign_bits: neurons={self.neurons}: expected the width of an expert's parts, or 0")
        for kind in self.include:
            if kind not in KINDS:
                raise unknown("part for assign_bits to include", kind, KINDS)
        if isinstance(self.formats, str) or len(set(self.formats)) < max(1, len(self.formats)):
            raise MoecError(f"assign_bits: formats={self.formats!r}: expected a list of different formats, such as [int2_g64, int4_g64]")
        for name in self.formats:
            chosen_format(name, "assign_bits")
        if isinstance(self.budget, str):
            parse_size(self.budget)
        elif self.budget is not None and not 0 < self.budget <= 32:
            raise MoecError(f"assign_bits: budget={self.budget}: expected average bits of a weight, such as 2.5, or a size, such as 12MiB")

    def run(self, model: Model, context: Context) -> Model:
        if self.budget is None:
            return model
        if self.neurons:
            whole = Problem(model, context, tuple(make_units(model, "expert", ["experts"])), tuple(self.formats), get_quantizer(self.probe))
            model = split_neurons(model, neuron_orders(whole), self.neurons, "assign_bits")
        units = make_units(model, self.units, self.include)
        problem = Problem(model, context, tuple(units), tuple(self.formats), get_quantizer(self.probe))
        budget = self._budget(problem)
        objective = get_objective(self.objective, self.objective_options)
        damages = known_damages(objective.damages(problem))
        chosen, solutions = self._solve(problem, objective, damages, budget)
        size, weights = sum(s.size for s in solutions), int(problem.weights.sum())
        context.note(
            "assign_bits",
            objective=self.objective, scope=self.scope, budget_bytes=budget, bytes=size, bits_per_weight=8 * size / weights,
            damage=sum(s.damage for s in solutions), gap=max(s.gap for s in solutions),
            units=dict(Counter(self.formats[option] for option in chosen)),
            formats={unit.name: self.formats[option] for unit, option in zip(units, chosen, strict=True)},
        )  # fmt: skip
        return self._quantized(model, units, [self.formats[option] for option in chosen], context)

    def _budget(self, problem: Problem) -> int:
        """Bytes."""
        assert self.budget is not None
        weights, least = int(problem.weights.sum()), int(problem.sizes.min(1).sum())
        budget = parse_size(self.budget) if isinstance(self.budget, str) else int(self.budget * weights / 8 + 1e-6)
        budget = self._without_factors(problem.model, budget)
        if budget < least:
            raise MoecError(
                f"assign_bits: budget={self.budget} is {budget:,} bytes for {weights:,} weights; the smallest of the formats "
                f"{', '.join(self.formats)} need {least:,} bytes ({8 * least / weights:.4g} bits a weight): raise the budget or add formats"
            )
        return budget

    def _without_factors(self, model: Model, budget: int) -> int:
        """What a budget leaves for codes."""
        correction = Correction.of(self.low_rank)
        if correction is None:
            return budget
        if correction.rank < 1:
            return int(budget / (1 + correction.rank))
        return budget - correction_bytes(model, parameter_roles(model.graph), correction)

    def _solve(self, problem: Problem, objective: Objective, damages: Tensor, budget: int) -> tuple[list[int], list[Solution]]:
        """The option of each unit, and the solutions of the programs."""
        groups = [list(range(len(problem.units)))]
        nodes = [unit.node for unit in problem.units]
        if self.scope == "layer":
            groups = [[i for i, n in enumerate(nodes) if n == node] for node in dict.fromkeys(nodes)]
        chosen, solutions = [0] * len(problem.units), []
        for members in groups:
            share = budget if self.scope == "model" else int(budget * problem.weights[members].sum() / problem.weights.sum())
            conditions = objective.conditions(problem, members) if self.scope == "layer" else []
            try:
                found = choose(damages.cpu().numpy()[members], problem.sizes[members], share, conditions)
            except MoecError as error:
                raise MoecError(f"assign_bits, {problem.units[members[0]].node}: {error}") from error
            solutions.append(found)
            for unit, option in zip(members, found.options, strict=True):
                chosen[unit] = option
        return chosen, solutions

    def _quantized(self, model: Model, units: Sequence[Unit], formats: Sequence[str], context: Context) -> Model:
        """The model with these formats, quantised."""
        params: dict[str, Param] = {}
        for unit, fmt in zip(units, formats, strict=True):
            for name in unit.members:
                param = params.get(name, model.graph.params[name])
                if unit.expert is None:
                    params[name] = replace(param, format=fmt)
                else:
                    names = [param.format] * int(param.type.shape[0]) if isinstance(param.format, str) else list(param.format)
                    names[unit.expert] = fmt
                    params[name] = replace(param, format=tuple(names))
        changed = [
            replace(p, format=p.format[0]) if len(set(p.format)) == 1 and not isinstance(p.format, str) else p for p in params.values()
        ]
        model = Model(model.graph.with_params(changed), model.weights)
        roles = parameter_roles(model.graph)
        integer = [p for p in changed if is_quantized(p)]
        return apply_quantizer(
            model, {p.name: roles[p.name] for p in integer}, get_quantizer(self.method, self.options), context,
            weighted=self.weighted, correction=Correction.of(self.low_rank),
        )  # fmt: skip


PASS = AssignBits
