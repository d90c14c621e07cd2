"""Recipes, passes by name, roles, and plans in closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.layers import keep_experts, moe_layers
from moec.compiler.passes import known_passes, make_pass, run_passes
from moec.compiler.plan import make_plan, parse_size
from moec.compiler.recipe import NOTHING, known_recipes, load_recipe, parse_recipe
from moec.compiler.roles import parameter_roles
from moec.compiler.verify import verify
from moec.passes.quantize import Quantize
from moec.targets import get_target
from tests import graphs


@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_that_ships_applies(name: str) -> None:
    recipe, model = load_recipe(name), graphs.model()
    found = run_passes(model, recipe.passes)
    verify(found.graph)
    assert recipe.description
    assert (found is model) == (name == "f32")  # the graph is float32 to begin with


@pytest.mark.parametrize("name", known_passes())
def test_every_pass_has_defaults_that_change_nothing(name: str) -> None:
    model = graphs.model()
    assert make_pass(name, {}).run(model, Context()) is model


def test_roles() -> None:
    roles = parameter_roles(graphs.moe())
    assert roles["embed.weight"] == "embedding"
    assert roles["layers.0.gate.weight"] == "router"
    assert roles["layers.0.experts.up"] == roles["layers.0.experts.down"] == "experts"
    assert {roles[f"layers.0.{n}.weight"] for n in "qkvo"} == {"linear"}
    assert roles["norm.weight"] == "other"


def test_quantize_by_role_and_by_name() -> None:
    model = graphs.model()
    step = Quantize(experts="int4_g32", linear="int8_g32", overrides={r"\.o\.": "bf16"})
    found = step.run(model, Context()).graph
    formats = {n: p.format for n, p in found.params.items()}
    assert formats["layers.0.experts.up"] == "int4_g32"
    assert (formats["layers.0.q.weight"], formats["layers.0.o.weight"]) == ("int8_g32", "bf16")
    assert formats["embed.weight"] == formats["layers.0.gate.weight"] == "f32"
    assert found.nodes == model.graph.nodes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pases": []}, "did you mean 'passes'"),
        ({"sourec": "x"}, "did you mean 'source'"),
        ({"claim": 3}, "`claim` must be text, found 3"),
        ({"passes": [{"quantise": {}}]}, "pass 1: unknown pass 'quantise': did you mean 'quantize'"),
        ({"passes": [{"quantize": {"expert": "int4_g64"}}]}, "did you mean 'experts'"),
        ({"passes": [{"quantize": {"experts": "int4_64"}}]}, "int<bits>_g<group>"),
        ({"passes": [{"quantize": {"other": "int4_g64"}}]}, "must be a plain format"),
        ({"passes": [{"quantize": {"method": "gtpq"}}]}, "unknown quantiser 'gtpq'"),
        ({"passes": [{"quantize": {"overrides": {"(": "bf16"}}}]}, "not a regular expression"),
        ({"passes": {"quantize": {}}}, "must be a list"),
        (["quantize"], "expected a mapping"),
    ],
)
def test_bad_recipes(data: Any, message: str) -> None:
    with pytest.raises(MoecError, match=message.replace("(", r"\(") if message == "(" else message):
        parse_recipe(data, "r", "r.yaml")


def test_passes_in_the_wrong_order_are_one_clear_error() -> None:
    model = run_passes(graphs.model(), [Quantize(experts="int4_g32")])
    with pytest.raises(MoecError, match="prune: @layers.0.experts.up is already int4_g32; put prune before the passes that choose formats"):
        keep_experts(model, moe_layers(model.graph)[0], [0, 1, 2], "prune")
    with pytest.raises(MoecError, match="is already int4_g32; a weight can be quantised once"):
        run_passes(model, [Quantize(experts="int8_g32")])


def test_recipe_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("description: mine\npasses:\n  - quantize: {experts: int4_g32}\n")
    assert load_recipe(path).passes == (Quantize(experts="int4_g32"),)
    path.write_text("source: https://x\nclaim: half the size\nmeasured: not so\npasses: []\n")
    found = load_recipe(path)
    assert (found.source, found.claim, found.measured, found.description) == ("https://x", "half the size", "not so", "")
    path.write_text("passes: [")
    with pytest.raises(MoecError, match="is not YAML"):
        load_recipe(path)
    with pytest.raises(MoecError, match="did you mean 'int4'"):
        load_recipe("int44")
    with pytest.raises(MoecError, match="no recipe file"):
        load_recipe(tmp_path / "none.yaml")


def test_plan_in_closed_form() -> None:
    graph = Quantize(experts="int4_g32").run(graphs.model(), Context()).graph
    plan = make_plan(graph, NOTHING, get_target("cpu"), None)
    up, down = 6 * 24 * 16, 6 * 16 * 12
    rest = 40 * 16 + 2 * 16 + 2 * 16 * 16 + 2 * 8 * 16 + 6 * 16
    assert plan.parameters == up + down + rest
    expert_bytes = 6 * 24 * (8 + 2) + 6 * 16 * (6 + 2)  # half a byte a code, one float16 scale a row
    assert plan.weight_bytes == expert_bytes + 4 * rest
    assert plan.bytes_per_token == round(expert_bytes * 2 / 6) + 4 * rest
    assert (plan.cache_dtype, plan.cache_bytes_per_token) == ("float32", 4 * 2 * (2 * 4))
    assert make_plan(graph, NOTHING, get_target("h100-sxm"), None, "bfloat16").cache_bytes_per_token == 2 * 2 * (2 * 4)


def test_mixed_formats_count_each_expert() -> None:
    graph = graphs.moe()
    up = replace(graph.params["layers.0.experts.up"], format=("int4_g32",) * 2 + ("int2_g32",) * 4)
    graph = graph.with_params([up])
    verify(graph)
    row = next(r for r in make_plan(graph, NOTHING, get_target("cpu"), None).rows if r.format == "mixed")
    assert row.bytes == 2 * 24 * (8 + 2) + 4 * 24 * (4 + 2)


def test_sizes() -> None:
    assert [parse_size(s) for s in ("12GiB", "500 MB", "1.5kB", "77", 5)] == [12 << 30, 500_000_000, 1500, 77, 5]
    with pytest.raises(MoecError, match="not understood"):
        parse_size("12 GiBs")
