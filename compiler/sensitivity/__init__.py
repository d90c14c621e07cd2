"""Objectives of bit assignment: how much damage each unit of weights does in each format. A file's name is the objective's.

Each file has `damages(problem) -> [U, O]`, whose sum over units the solver minimises; options are keyword-only arguments. A file may
also have `conditions(problem, members) -> list of AtLeast` for what must hold among the units `members` of a layer, which
it numbers from 0.
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
    """An objective: its name, its function, and what it demands of a layer's units."""

    name: str
    damages: Callable[[Problem], Tensor]
    conditions: Conditions


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
    return Objective(name, damages, getattr(module, "conditions", lambda _problem, _members: []))
