"""Bits for the whole model: attention, shared experts, dense layers, embeddings and logits in one program with experts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import numpy as np
import pytest
import torch

from moec.compiler.allocation import Problem, make_units
from moec.compiler.context import Context
from moec.compiler.errors import MoecError
from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model
from moec.compiler.packed import format_name
from moec.compiler.plan import param_bytes
from moec.compiler.quantizers import get_quantizer
from moec.compiler.roles import KINDS, node_kinds
from moec.compiler.sensitivity import get_objective
from moec.compiler.text import parse_graph
from moec.compiler.weights import constant
from moec.passes.assign_bits import AssignBits
from moec.runtime.formats import get_format
from moec.runtime.formats.int import IntFormat
from tests import graphs

PARAMS = """
  param @layers.0.shared.up.weight: f32[20, 16] as f32
  param @layers.0.shared.down.weight: f32[16, 20] as f32
  param @layers.1.up.weight: f32[24, 16] as f32
  param @layers.1.down.weight: f32[16, 24] as f32
  param @head.weight: f32[40, 16] as f32
"""
NODES = """
  %s1: f32[B, T, 20] = linear(%h1, @layers.0.shared.up.weight)
  %s2: f32[B, T, 20] = aten.tanh.default(%s1)
  %s3: f32[B, T, 16] = linear(%s2, @layers.0.shared.down.weight)
  %e1: f32[B, T, 16] = aten.add.Tensor(%e, %s3)
  %h2: f32[B, T, 16] = aten.add.Tensor(%h1, %e1)
  %d1: f32[B, T, 24] = linear(%h2, @layers.1.up.weight)
  %d2: f32[B, T, 24] = aten.tanh.default(%d1)
  %d3: f32[B, T, 16] = linear(%d2, @layers.1.down.weight)
  %h3: f32[B, T, 16] = aten.add.Tensor(%h2, %d3)
"""
MENUS = {
    "attention": ["int3_channel", "int8_channel"], "shared": ["int4_channel", "bf16"], "dense": ["int2_channel", "int4_channel"],
    "embedding": ["int8_channel", "f16"], "head": ["int4_channel", "int8_channel"],
}  # fmt: skip
EXPERTS = ["int2_channel", "int4_channel"]


def whole_model() -> Model:
    """The layer of `graphs.moe` with a shared expert, a dense layer after it, and a matrix of its own for the logits."""
    text = graphs.MOE.replace("  param @norm.weight", PARAMS.strip("\n") + "\n  param @norm.weight")
    text = text.replace("  %h2: f32[B, T, 16] = aten.add.Tensor(%h1, %e)\n", NODES.lstrip("\n"))
    graph = parse_graph(text.replace("rms_norm(%h2", "rms_norm(%h3").replace("linear(%n2, @embed.weight)", "linear(%n2, @head.weight)"))
    return Model(graph, graphs.random_weights(graph))


@pytest.fixture(scope="module")
def model() -> Model:
    return whole_model()


@pytest.fixture(scope="module")
def context(model: Model) -> Context:
    return graphs.context(model)


def asked(model: Model, context: Context, kinds: Sequence[str], formats: tuple[str, ...]) -> Problem:
    return Problem(model, context, tuple(make_units(model, "expert", kinds)), formats, get_quantizer("rtn"))


def test_kinds_are_read_off_the_graph(model: Model) -> None:
    found = node_kinds(model.graph)
    expected = {"h": "embedding", "e": "experts", "s1": "shared", "s3": "shared", "d1": "dense", "d3": "dense", "out": "head"}
    assert found == expected | dict.fromkeys(("q", "k", "v", "o"), "attention")
    tied = make_units(graphs.model(), "expert", ["head"])
    assert [(unit.kind, unit.uses, unit.members) for unit in tied] == [("head", ("h", "out"), ("embed.weight",))]


@pytest.mark.parametrize("budget", [4.5, 5.5, 7.0])
def test_the_choice_is_the_best_of_all(budget: float, model: Model, context: Context) -> None:
    context.journal.clear()
    step = AssignBits(budget=budget, formats=EXPERTS, units="expert", others=MENUS, objective="gauss_newton")
    result = step.run(model, context)
    (note,) = context.journal
    units = make_units(model, "expert", list(KINDS))
    formats = tuple(dict.fromkeys([*EXPERTS, *(f for menu in MENUS.values() for f in menu)]))
    problem = asked(model, context, list(KINDS), formats)
    damage = get_objective("gauss_newton").damages(problem).numpy()
    menus = [[formats.index(f) for f in (EXPERTS if unit.kind == "experts" else MENUS[unit.kind])] for unit in units]
    assert len(units) == 6 + 4 + 2 + 2 + 1 + 1
    # Every choice at once: sums over units of one of two numbers each.
    choices = np.array(list(product((0, 1), repeat=len(units))))
    rows = np.arange(len(units))
    pairs = np.array(menus)
    weights = sum(prod(_shape(model, m, None)) for m in {m for unit in units for m in unit.members})
    sizes = [[sum(get_format(formats[o]).nbytes(_shape(model, m, unit.expert)) for m in unit.members) for o in pair]
             for unit, pair in zip(units, menus, strict=True)]  # fmt: skip
    size = np.array(sizes)[rows, choices].sum(1)
    total = damage[rows, pairs[rows, choices]].sum(1)
    best = total[size <= int(budget * weights / 8)].min()
    assert note["damage"] == pytest.approx(best, rel=1e-6)
    stored = sum(param_bytes(result.graph.params[m]) for m in {m for unit in units for m in unit.members})
    assert stored == note["bytes"] <= note["budget_bytes"] == int(budget * weights / 8)
    assert note["bits_per_weight"] == 8 * stored / weights
    for unit in units:
        chosen = note["formats"][unit.name]
        assert chosen in (EXPERTS if unit.kind == "experts" else MENUS[unit.kind])
        assert {format_name(result.graph.params[m], unit.expert) for m in unit.members} == {chosen}


def _shape(model: Model, name: str, expert: int | None) -> tuple[int, ...]:
    shape = tuple(int(d) for d in model.graph.params[name].type.shape)
    return shape if expert is None else shape[1:]


def test_kl_of_each_matrix_is_the_distance_of_a_model_with_it_changed(model: Model, context: Context) -> None:
    kinds = [kind for kind in KINDS if kind != "experts"]
    problem, text = asked(model, context, kinds, ("int3_channel",)), context.need_text("")
    exact = get_objective("kl", {"tokens": text.tokens}).damages(problem)[:, 0]
    estimate = get_objective("gauss_newton", {"samples": 16}).damages(problem)[:, 0]
    truth, fmt = _logp(model, text.ids), get_format("int3_channel")
    assert isinstance(fmt, IntFormat)
    for index, unit in enumerate(problem.units):
        value = get_quantizer("rtn").quantize(model.load(unit.members[0]), fmt).values(fmt)
        other = _logp(model.edited(model.graph, {unit.members[0]: constant(value)}), text.ids)
        expected = float((truth.exp() * (truth - other)).sum(-1).mean())
        assert float(exact[index]) == pytest.approx(expected, rel=1e-3, abs=1e-7), unit
        # Attention moves other tokens as well, whose products with each other the estimate leaves out.
        assert float(estimate[index]) == pytest.approx(expected, rel=0.2 if unit.kind == "head" else 0.7), unit


def _logp(model: Model, ids: torch.Tensor) -> torch.Tensor:
    outputs = Interpreter(model.graph, model.weights)(ids=ids, positions=torch.arange(ids.shape[1]).expand(ids.shape))
    return outputs[0].double().log_softmax(-1)


def test_a_tied_matrix_counts_once_and_for_both_its_uses() -> None:
    model = graphs.model()
    context = graphs.context(model)
    for others in ({"embedding": ["int4_channel"]}, {"head": ["int4_channel"]}, {"embedding": ["int4_channel"], "head": ["int4_channel"]}):
        context.journal.clear()
        result = AssignBits(budget=8.0, formats=EXPERTS, others=others).run(model, context)
        assert result.graph.params["embed.weight"].format == "int4_channel"
        assert context.journal[0]["budget_bytes"] == 6 * (24 * 16 + 16 * 12) + 40 * 16
    problem = Problem(model, context, tuple(make_units(model, "expert", ["head"])), ("int4_channel",), get_quantizer("rtn"))
    value, fmt = model.load("embed.weight"), get_format("int4_channel")
    assert isinstance(fmt, IntFormat)
    text, damage = context.need_text(""), 0.0
    error = get_quantizer("rtn").quantize(value, fmt).values(fmt) - value
    apart = model.graph.with_params([model.graph.params["embed.weight"]])
    for name in ("h", "out"):
        nodes = [n if n.name != name else type(n)(n.op, (n.inputs[0], "other"), n.outputs, n.attrs) for n in apart.nodes]
        param = type(apart.params["embed.weight"])("other", apart.params["embed.weight"].type, "f32")
        changed = model.edited(apart.with_params([param]).with_nodes(nodes), {"other": constant(value + error)})
        truth, other = _logp(model, text.ids), _logp(changed, text.ids)
        damage += float((truth.exp() * (truth - other)).sum(-1).mean())
    assert float(get_objective("kl", {"tokens": text.tokens}).damages(problem)) == pytest.approx(damage, rel=1e-3)


@pytest.mark.parametrize("rank", [2, 0.4])
def test_factors_of_experts_are_in_the_budget_of_all(rank: float, model: Model, context: Context) -> None:
    """Only experts pay for them: what a share of experts' bytes takes is not taken from the others too."""
    context.journal.clear()
    low_rank = {"rank": rank, "format": "int4_channel", "weighted": False}
    step = AssignBits(budget=7.0, formats=EXPERTS, units="expert", others=MENUS, low_rank=low_rank)
    result = step.run(model, context)
    names = {m for unit in make_units(model, "expert", list(KINDS)) for m in unit.members}
    factors = set(result.graph.params) - set(model.graph.params)
    assert {name.rsplit(".", 1)[1] for name in factors} == {"left", "right"}
    stored = sum(param_bytes(result.graph.params[name]) for name in names | factors)
    note, weights = context.journal[0], sum(prod(_shape(model, name, None)) for name in names)
    assert stored <= note["bytes"] <= note["budget_bytes"] == int(7.0 * weights / 8)
    assert note["budget_bytes"] < 1.05 * note["bytes"]
    if rank >= 1:
        assert stored == note["bytes"]


def test_experts_that_keep_their_values_need_no_factors(model: Model, context: Context) -> None:
    low_rank = {"rank": 2, "format": "int4_channel", "weighted": False}
    step = AssignBits(budget=16.0, formats=["bf16"], units="expert", others={"dense": ["int4_channel"]}, low_rank=low_rank)
    result = step.run(model, context)
    assert set(result.graph.params) == set(model.graph.params)
    assert result.graph.params["layers.1.up.weight"].format == "int4_channel"


def test_bad_others(model: Model, context: Context) -> None:
    tied = graphs.model()
    others = {"embedding": ["int8_channel"], "head": ["int4_channel"]}
    with pytest.raises(MoecError, match="embed.weight is embedding and head in one: give both the same formats"):
        AssignBits(budget=8.0, formats=EXPERTS, others=others).run(tied, graphs.context(tied))
    with pytest.raises(MoecError, match="embed.weight is embedding and head in one; the objective fisher does not measure head"):
        AssignBits(budget=8.0, formats=EXPERTS, others=["embedding"], objective="fisher").run(tied, graphs.context(tied))
    with pytest.raises(MoecError, match="no weights of the kinds dense, shared: take them out"):
        AssignBits(budget=8.0, formats=EXPERTS, others=["dense", "shared"]).run(tied, graphs.context(tied))
    with pytest.raises(MoecError, match=r"smallest of the formats .* need 3,512 bytes"):
        AssignBits(budget=2.0, formats=EXPERTS, others=MENUS).run(model, context)
