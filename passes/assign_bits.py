"""Give every expert, or every projection of one, the format that its damage to the model is worth, under a budget of bytes.

    param @layers.0.mlp.experts.up: f32[16, 384, 384] as bf16
    ->                                                             budget: 2.5, formats: [int2_g128, int3_g128, int4_g128]
    param @layers.0.mlp.experts.up: f32[16, 384, 384] as [int2_g128, int4_g128, int2_g128, ...]

What else than experts takes a share of the budget (`others`) is in the same program. An integer program chooses (`compiler/solver.py`) for
damages that an objective measures (`compiler/sensitivity/`), over the whole model or layer by layer; then a quantiser makes the values.
`uniform_experts` makes layers of mixed formats runnable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moec.compiler.allocation import Problem, Unit, known_damages, make_units
from moec.compiler.context import Context
from moec.compiler.corrections import corrected_sizes
from moec.compiler.errors import MoecError
from moec.compiler.ir import Param
from moec.compiler.low_rank import Correction
from moec.compiler.model import Model
from moec.compiler.neurons import neuron_orders, split_neurons
from moec.compiler.packed import chosen_format, is_quantized
from moec.compiler.plan import parse_size
from moec.compiler.quantizers import get_quantizer
from moec.compiler.roles import KINDS, node_kinds, parameter_roles
from moec.compiler.sensitivity import Objective, get_objective
from moec.compiler.solver import Solution, choose
from moec.passes.quantize import apply_quantizer
from moec.runtime.errors import unknown


@dataclass(frozen=True)
class AssignBits:
    """Formats by unit under a budget; without a budget nothing changes.

    Args:
        budget: average bits of a weight, scales and zero points counted (2.5), or bytes (`12MiB`), of the experts and `others` together.
        formats: what may be chosen for experts.
        others: what else the budget is for: from `attention`, `shared`, `dense`, `embedding`, `head` to the formats that each may get; or a
            list of these, with the experts' formats. `[]` is experts alone. A matrix that is embedding and head in one is one unit,
            and both names mean it; where both are given they have the same formats.
        units: `expert` or `projection` (gate and up together, and down, each have a format).
        neurons: cut experts into parts of so many neurons, the most salient first, which are units of their own
            (`compiler/neurons.py`); 0 leaves them whole.
        objective: what damage is, a file of `compiler/sensitivity`. With `others` it must measure them in the unit that it measures experts
            in: `gauss_newton` and `kl` do, `fisher` all but the head; `output`, `hessian` and `mc_moe` do not.
        objective_options: options of the objective.
        scope: `model`, one program for everything; or `layer`, one for the experts of each layer with the same share of
            the budget a weight.
        probe: the quantiser whose values the objective tries.
        method, options, weighted: the quantiser that makes the final values, as in `quantize`.
        low_rank: low-rank factors of what the experts' codes lose, as in `quantize`; the budget holds them too.
    """

    budget: float | str | None = None
    formats: Sequence[str] = ("int2_g64", "int3_g64", "int4_g64")
    units: str = "projection"
    neurons: int = 0
    others: Mapping[str, Sequence[str]] | Sequence[str] = ()
    objective: str = "gauss_newton"
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    scope: str = "model"
    probe: str = "rtn"
    method: str = "rtn"
    options: Mapping[str, Any] = field(default_factory=dict)
    weighted: bool = True
    low_rank: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        objective = get_objective(self.objective, self.objective_options)
        get_quantizer(self.method, self.options)
        get_quantizer(self.probe)
        Correction.of(self.low_rank)
        if self.scope not in ("model", "layer"):
            raise unknown("scope of assign_bits", self.scope, ["model", "layer"])
        if self.units not in ("expert", "projection"):
            raise unknown("units of assign_bits", self.units, ["expert", "projection"])
        if self.neurons < 0:
            raise MoecError(f"assign_bits: neurons={self.neurons}: expected the width of an expert's parts, or 0")
        self._check_menus(objective)
        if isinstance(self.budget, str):
            parse_size(self.budget)
        elif self.budget is not None and not 0 < self.budget <= 32:
            raise MoecError(f"assign_bits: budget={self.budget}: expected average bits of a weight, such as 2.5, or a size, such as 12MiB")

    def _check_menus(self, objective: Objective) -> None:
        if isinstance(self.others, str):
            raise MoecError(f"assign_bits: others={self.others!r}: expected a mapping from kinds to formats, or a list of kinds")
        for kind, formats in self.menus.items():
            if kind not in KINDS:
                raise unknown("kind of weights for assign_bits", kind, KINDS[1:])
            if kind not in objective.kinds:
                raise MoecError(
                    f"assign_bits: the objective {self.objective} does not measure {kind} in one unit with experts: "
                    f"use gauss_newton or kl, or take {kind} out of `others`"
                )
            what = "formats" if kind == "experts" else f"others, {kind}"
            if isinstance(formats, str) or len(set(formats)) < max(1, len(formats)):
                raise MoecError(f"assign_bits: {what}={formats!r}: expected a list of different formats, such as [int2_g64, int4_g64]")
            for name in formats:
                chosen_format(name, "assign_bits")
            if kind not in ("embedding", "head"):  # those are rounded to nearest
                for quantizer in (get_quantizer(self.method, self.options), get_quantizer(self.probe)):
                    quantizer.require(*formats)
        if self.others and self.scope == "layer":
            raise MoecError("assign_bits: scope=layer is for experts; with `others` everything is in one program: use scope=model")

    @property
    def menus(self) -> dict[str, Sequence[str]]:
        """The formats of each kind that takes part."""
        others = self.others if isinstance(self.others, Mapping) else dict.fromkeys(self.others, self.formats)
        return {"experts": self.formats, **others}

    def run(self, model: Model, context: Context) -> Model:
        if self.budget is None:
            return model
        if self.neurons:
            whole = Problem(model, context, tuple(make_units(model, "expert", ["experts"])), tuple(self.formats), get_quantizer(self.probe))
            model = split_neurons(model, neuron_orders(whole), self.neurons, "assign_bits")
        units = make_units(model, self.units, self.menus)
        formats = tuple(dict.fromkeys(fmt for menu in self.menus.values() for fmt in menu))
        problem = Problem(model, context, tuple(units), formats, get_quantizer(self.probe), self.menus)
        objective = get_objective(self.objective, self.objective_options)
        self._check(problem, objective)
        budget = self._budget(problem)
        damages = known_damages(objective.damages(problem), problem)
        chosen, solutions = self._solve(problem, objective, damages, budget)
        size, weights = sum(s.size for s in solutions), int(problem.weights.sum())
        context.note(
            "assign_bits",
            objective=self.objective, scope=self.scope, budget_bytes=budget, bytes=size, bits_per_weight=8 * size / weights,
            damage=sum(s.damage for s in solutions), gap=max(s.gap for s in solutions),
            units=dict(Counter(formats[option] for option in chosen)),
            formats={unit.name: formats[option] for unit, option in zip(units, chosen, strict=True)},
        )  # fmt: skip
        return self._quantized(model, units, [formats[option] for option in chosen], context)

    def _check(self, problem: Problem, objective: Objective) -> None:
        """Check what the options and the model must be together."""
        found = node_kinds(problem.model.graph)
        for unit in problem.units:
            kinds = [found[name] for name in unit.uses]
            where = f"assign_bits: @{unit.members[0]} is {' and '.join(kinds)} in one"
            if lost := set(kinds) - set(objective.kinds):
                raise MoecError(f"{where}; the objective {self.objective} does not measure {lost.pop()}: use gauss_newton or kl")
            menus = [set(self.menus[kind]) for kind in kinds if kind in self.menus]
            if any(menu != menus[0] for menu in menus):
                raise MoecError(f"{where}: give both the same formats, or name one of them")
        present = {found[name] for unit in problem.units for name in unit.uses}
        if missing := set(self.menus) - present:
            raise MoecError(f"assign_bits: the model has no weights of the kinds {', '.join(sorted(missing))}: take them out of `others`")

    def _budget(self, problem: Problem) -> int:
        """Bytes."""
        assert self.budget is not None
        sizes, weights = self._sizes(problem), int(problem.weights.sum())
        least = int(np.where(problem.allowed, sizes, sizes.max()).min(1).sum())
        budget = parse_size(self.budget) if isinstance(self.budget, str) else int(self.budget * weights / 8 + 1e-6)
        if budget < least:
            raise MoecError(
                f"assign_bits: budget={self.budget} is {budget:,} bytes for {weights:,} weights; the smallest of the formats "
                f"{', '.join(problem.formats)} need {least:,} bytes ({8 * least / weights:.4g} bits a weight): "
                "raise the budget or add formats"
            )
        return budget

    def _sizes(self, problem: Problem) -> NDArray[np.int64]:
        """Bytes of each unit in each format, low-rank factors included: [U, O]."""
        correction = Correction.of(self.low_rank)
        return problem.sizes if correction is None else corrected_sizes(problem, correction)

    def _solve(self, problem: Problem, objective: Objective, damages: Tensor, budget: int) -> tuple[list[int], list[Solution]]:
        """The option of each unit, and the solutions of the programs."""
        groups = [list(range(len(problem.units)))]
        nodes = [unit.node for unit in problem.units]
        if self.scope == "layer":
            groups = [[i for i, n in enumerate(nodes) if n == node] for node in dict.fromkeys(nodes)]
        chosen, solutions, sizes = [0] * len(problem.units), [], self._sizes(problem)
        for members in groups:
            share = budget if self.scope == "model" else int(budget * problem.weights[members].sum() / problem.weights.sum())
            conditions = objective.conditions(problem, members) if self.scope == "layer" else []
            try:
                found = choose(damages.numpy()[members], sizes[members], share, conditions, problem.allowed[members])
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
        corrects = any(roles[p.name] == "experts" for p in integer)  # where all experts keep their values there is nothing to correct
        return apply_quantizer(
            model, {p.name: roles[p.name] for p in integer}, get_quantizer(self.method, self.options), context,
            weighted=self.weighted, correction=Correction.of(self.low_rank) if corrects else None,
        )  # fmt: skip


PASS = AssignBits
