"""Recipes: what is done to a model, as a list of passes with options.

    description: 4-bit experts and linears
    source: https://arxiv.org/abs/...          what describes the method (optional)
    claim: what the source says it gives       (optional)
    measured: what it gave on our models       (optional)
    passes:
      - quantize: {experts: int4_g64, linear: int4_g64, embedding: int8_g64}

A recipe is a file or the name of one that ships. Unknown keys are errors with the nearest name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import moec.passes
from moec.compiler.errors import MoecError
from moec.compiler.passes import Pass, make_pass
from moec.runtime.errors import unknown

_FOLDER = Path(moec.passes.__path__[0]) / "recipes"

_TEXTS = ("description", "source", "claim", "measured")


@dataclass(frozen=True)
class Recipe:
    """A named list of passes; `steps` is the list as data, as the artifact records it.

    `source` is the paper or page that describes the method, `claim` what it says the method gives, `measured` what it gave here.
    """

    name: str
    description: str
    passes: tuple[Pass, ...]
    steps: tuple[dict[str, Any], ...]
    source: str = ""
    claim: str = ""
    measured: str = ""


NOTHING = Recipe("none", "every weight keeps its value", (), ())
"""The recipe that changes nothing."""


def known_recipes() -> list[str]:
    """The names of the recipes that ship."""
    return sorted(p.stem for p in _FOLDER.glob("*.yaml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A recipe by name, or from a file.

    Raises:
        MoecError: no such recipe or file, not YAML, or an unknown key or value in it.
    """
    path = Path(name_or_path)
    if str(name_or_path) in known_recipes():
        path = _FOLDER / f"{name_or_path}.yaml"
    elif path.suffix not in (".yaml", ".yml") and not path.is_file():
        raise unknown("recipe", str(name_or_path), known_recipes())
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise MoecError(f"no recipe file {path}: give a YAML file or one of {', '.join(known_recipes())}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MoecError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    return parse_recipe(data, path.stem, str(path))


def parse_recipe(data: Any, name: str, where: str) -> Recipe:
    """A recipe from data.

    Args:
        where: what error messages call it.
    """
    if not isinstance(data, dict):
        raise MoecError(f"recipe {where}: expected a mapping with `passes`, found {type(data).__name__}")
    for key in data:
        if key not in (*_TEXTS, "passes"):
            raise MoecError(f"recipe {where}: {unknown('key', str(key), [*_TEXTS, 'passes'])}")
    for key in _TEXTS:
        if not isinstance(data.get(key) or "", str):
            raise MoecError(f"recipe {where}: `{key}` must be text, found {data[key]!r}; put it in quotes")
    steps = data.get("passes") or []
    if not isinstance(steps, list):
        raise MoecError(f"recipe {where}: `passes` must be a list, found {type(steps).__name__}")
    passes = []
    for index, entry in enumerate(steps, 1):
        step = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(step, dict) or len(step) != 1:
            raise MoecError(f"recipe {where}, pass {index}: expected `name: {{options}}`, found {step!r}")
        ((kind, options),) = step.items()
        if not isinstance(options or {}, dict):
            raise MoecError(f"recipe {where}, pass {index}: the options of {kind} must be a mapping, found {options!r}")
        try:
            passes.append(make_pass(str(kind), dict(options or {})))
        except (MoecError, TypeError) as error:
            raise MoecError(f"recipe {where}, pass {index}: {error}") from error
    texts = {key: str(data.get(key) or "") for key in _TEXTS}
    return Recipe(name=name, passes=tuple(passes), steps=tuple(steps), **texts)
