"""Objectives of bit assignment: how much damage each unit of weights does in each format. A file's name is the objective's.

Each file has `damages(problem) -> [U, O]`, whose sum over units the solver minimises; options are keyword-only arguments. A file may
also have `conditions(problem, members) -> list of AtLeast` for what must hold among the units `members` of a layer, which
it numbers from 0.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from moec.compiler.allocation import Problem
from moec.compiler.errors import MoecError
from moec.compiler.solver import AtLeast
from moec.runtime.errors import unknown

Conditions = Callable[[Problem, Sequence[int]], list[AtLeast]]


@dataclass(frozen=True)
class Objective:
    """An objective: its name, its function, and what it demands of a layer's units."""

    name: str
    damages: Callable[[Problem], Tensor]
    conditions: Conditions


def known_objectives() -> list[str]:
    """The names of all objectives."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get_objective(name: str, options: Mapping[str, Any] | None = None) -> Objective:
    """The objective of this name.

    Raises:
        MoecError: there is none, or it has no such option; the message lists those that exist.
    """
    if name not in known_objectives():
        raise unknown("objective", name, known_objectives())
    module = importlib.import_module(f"{__name__}.{name}")
    known = [p.name for p in inspect.signature(module.damages).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for option in options or ():
        if option not in known:
            raise (
                unknown(f"option of the objective {name}", option, known)
                if known
                else MoecError(f"the objective {name} has no options, got {option!r}")
            )
    damages = partial(module.damages, **options) if options else module.damages
    return Objective(name, damages, getattr(module, "conditions", lambda _problem, _members: []))
