"""Rotations leave the function alone, to float64's precision, and spread large channels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moec.compiler.context import Context
from moec.compiler.frontend import huggingface
from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model
from moec.compiler.text import parse_graph, print_graph
from moec.compiler.verify import verify
from moec.passes.rotate import Rotate, rotation
from moec.runtime.errors import MoecError
from tests import graphs
from tests.passes.test_awq import uneven

TINY = Path(__file__).parents[2] / "examples/models/tiny-moe"


def changed(source: Model, old: str, new: str) -> Model:
    """The model with its graph's text changed."""
    text = print_graph(source.graph)
    assert old in text
    return Model(parse_graph(text.replace(old, new)), source.weights)


@pytest.mark.parametrize("size", [1, 2, 12, 16, 384])
def test_orthogonal(size: int) -> None:
    q = rotation(size, 3)
    assert torch.allclose(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert not torch.equal(q, rotation(size, 4)) or size <= 2
    assert q.square().max() <= size // (size & -size) / size * 1.0001  # no channel stays by itself


@pytest.mark.parametrize("options", [{"residual": True}, {"heads": True}, {"residual": True, "heads": True, "seed": 5}])
def test_the_function_stays(options: dict[str, bool]) -> None:
    source = uneven()
    rotated = Rotate(untie=True, **options).run(source, graphs.context(source))
    verify(rotated.graph)
    name = "layers.0.o.weight"
    assert not torch.allclose(rotated.load(name), source.load(name), atol=1e-3)
    assert (graphs.logits(rotated) - graphs.logits(source)).abs().max() < 1e-9


def test_the_function_of_a_trained_model_stays() -> None:
    source = Model(*huggingface.load(TINY))
    rotated = Rotate(residual=True, heads=True, untie=True).run(source, Context())
    ids = torch.randint(0, 4096, (1, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"ids": ids, "positions": torch.arange(12)[None]}
    found, expected = (Interpreter(m.graph, m.weights, dtype=torch.float64)(**inputs)[0] for m in (rotated, source))
    assert (found - expected).abs().max() < 1e-9


def test_large_channels_are_spread() -> None:
    source = uneven()
    rotated = Rotate(residual=True, untie=True).run(source, Context())
    assert torch.equal(rotated.load("layers.0.norm2.weight"), torch.zeros(16))  # offset 1
    peaks = [
        float(m.load("layers.0.gate.weight").abs().max() / m.load("layers.0.gate.weight").square().mean().sqrt()) for m in (source, rotated)
    ]
    assert peaks[1] < peaks[0]


def test_tied_embeddings() -> None:
    with pytest.raises(MoecError, match=r"@embed.weight \[40x16\] is both embedding and projection.*untie: true"):
        Rotate(residual=True).run(uneven(), Context())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("= rms_norm(%h, @layers.0.norm.weight) {eps=1e-05}", "= layer_norm(%h, @layers.0.norm.weight) {eps=1e-05}", "%n: layer_norm"),
        ("aten.add.Tensor(%h, %o)", "aten.add.Tensor(%h, %o) {alpha=2}", "%h1"),
        ("aten.add.Tensor(%h1, %e)", "aten.mul.Tensor(%h1, %e)", "%h2"),
        ("linear(%n, @layers.0.k.weight)", "linear(%n, @layers.0.v.weight)", "@layers.0.v.weight is used elsewhere"),
    ],
)
def test_declines(old: str, new: str, message: str) -> None:
    with pytest.raises(MoecError, match=message):
        Rotate(residual=True, untie=True).run(changed(uneven(), old, new), Context())


def test_nothing_to_do() -> None:
    source = graphs.model()
    assert Rotate().run(source, Context()) is source
