"""The recipes of the examples are recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from moec.compiler.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[1] / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_has_passes_and_says_what_it_does(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.passes
    assert len(recipe.description) > 20
