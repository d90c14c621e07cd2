"""The recipes among the examples can be read, and say where they come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.compiler.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.passes and recipe.description and recipe.source.startswith("https://") and recipe.claim
