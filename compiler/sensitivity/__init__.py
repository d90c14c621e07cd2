"""Objectives of bit assignment: how much damage each unit of weights does in each format. A file's name is the objective's.

Each file has `damages(problem) -> [U, O]`, whose sum over units the solver minimises; options are keyword-only arguments. A file may
also have `conditions(problem, members) -> list of AtLeast` for what must hold among the units `members` of a layer, which
it numbers from 0; and `KINDS`, the kinds of weights whose damages it measures in one unit (`experts` alone unless given: errors of
outputs tell layers of one kind apart, not attention from experts).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moec.compiler.allocation import Problem
from moec.compiler.plugins import file_names, load_file, with_options
from moec.compiler.solver import AtLeast

Conditions = Callable[[Problem, Sequence[int]], list[AtLeast]]


@dataclass(frozen=True)
class Objective:
    """An objective: its name, its function, what it demands of a layer's units, and which kinds of weights it can tell apart."""

    name: str
    damages: Callable[[Problem], Tensor]
    conditions: Conditions
    kinds: Sequence[str] = ("experts",)


def known_objectives() -> list[str]:
    """The names of all objectives."""
    return file_names(__name__)


def get_objective(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of this name.

    Raises:
        MoecError: there is none, or it has no such option; the message lists those that exist.
    """
    module = load_file(__name__, "objective", name)
    damages = with_options(module.damages, options, f"objective {name}")
    conditions: Conditions = getattr(module, "conditions", lambda _problem, _members: [])
    return Objective(name, damages, conditions, getattr(module, "KINDS", ("experts",)))
