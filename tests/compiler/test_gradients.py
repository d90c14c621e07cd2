"""Derivatives through a graph, against central differences in float64 and against a tape over the whole graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moec.compiler.gradients import Tape, segments
from moec.compiler.interpreter import Interpreter
from moec.compiler.model import Model
from moec.compiler.weights import constant
from tests import graphs

GATE, UP, NORM = "layers.0.gate.weight", "layers.0.experts.up", "norm.weight"


def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 40, (3, 2, 7), generator=torch.Generator().manual_seed(1))
    return [{"ids": part, "positions": torch.arange(7).expand(2, -1)} for part in ids]


def loss(index: int, outputs: tuple[Tensor, ...]) -> Tensor:
    return (outputs[0].log_softmax(-1)[..., : 5 + index] * torch.arange(1, 6 + index, device=outputs[0].device)).sum()


def value(model: Model) -> float:
    found = []
    Interpreter(model.graph, model.weights, dtype=torch.float64).run(batches(), lambda i, o: found.append(float(loss(i, o))))
    return sum(found)


def test_gradients_of_parameters_are_the_central_differences() -> None:
    model = graphs.model()
    leaves = {n: model.load(n).double().requires_grad_() for n in (GATE, UP, NORM)}
    tape = Tape(model.graph, model.weights, leaves, device="cpu", dtype=torch.float64)
    assert abs(sum(tape.backward(batches(), loss)) - value(model)) < 1e-9
    generator = torch.Generator().manual_seed(2)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 1e-3
        step = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        ahead, back = (model.edited(model.graph, {name: constant(leaf.detach() + s * 1e-6 * step)}) for s in (1, -1))
        expected = (value(ahead) - value(back)) / 2e-6
        assert abs(float((leaf.grad * step).sum()) - expected) <= 1e-5 * max(1.0, abs(expected))


def test_gradients_of_values_are_those_of_a_tape_over_the_whole_graph() -> None:
    model = graphs.model()
    found: dict[str, tuple[Any, Tensor | None]] = {}
    tape = Tape(model.graph, model.weights, device="cpu", keep=True)
    assert len(tape.segments) == 2
    tape.backward(batches(), loss, {"e", "h1", "out"}, lambda node, inputs, gradient: found.update({node.name: (inputs, gradient)}))
    assert found["out"][1] is None
    for index, batch in enumerate(batches()):
        kept: dict[str, Tensor] = {}

        class Leaves(Interpreter):
            def _step(self, node, weights, environment, symbols):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
                super()._step(node, weights, environment, symbols)
                if node.name in ("e", "h1"):
                    if not environment[node.name].requires_grad:
                        environment[node.name].requires_grad_()
                    environment[node.name].retain_grad()
                    kept[node.name] = environment[node.name]  # noqa: B023  # used within this turn

        whole = Leaves(model.graph, model.weights)
        run = Interpreter.run.__wrapped__  # type: ignore[attr-defined]  # without no_grad
        run(whole, [batch], lambda _, outputs, index=index: loss(index, outputs).backward())
        for name in ("e", "h1"):
            inputs, gradient = found[name]
            assert gradient is not None
            assert gradient.shape == (1, 3 * 14, 16)
            torch.testing.assert_close(gradient[0, 14 * index : 14 * index + 14].view(2, 7, 16), kept[name].grad)
            assert all(x is None or not x.requires_grad for x in inputs[index])
            assert [x is None for x in inputs[index]] == [False, False] + ([] if name == "h1" else [False, True, True])


def test_samples_are_runs_of_their_own() -> None:
    model, drawn = graphs.model(), iter(range(1000))

    def other(index: int, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0][..., (7 * next(drawn) + index) % 40].square().sum()

    def run(samples: int) -> tuple[dict[str, Any], Tensor]:
        found: dict[str, Any] = {}
        leaf = model.load(GATE).clone().requires_grad_()
        Tape(model.graph, model.weights, {GATE: leaf}, device="cpu").backward(
            batches(), other, {"q", "e"}, lambda node, _, gradient: found.update({node.name: gradient}), samples
        )
        assert leaf.grad is not None
        return found, leaf.grad

    together, total = run(3)
    drawn = iter(range(1000))
    apart = [run(1) for _ in range(3)]
    for name in ("q", "e"):
        torch.testing.assert_close(together[name], torch.cat([found[name] for found, _ in apart]))
    torch.testing.assert_close(total, sum(gradient for _, gradient in apart))


def test_segments_hand_on_what_is_used_later() -> None:
    first, second = segments(graphs.moe())
    assert first.nodes[-1].op == "experts"
    assert set(first.handed) == {"e", "h1"} == set(second.given)
    assert second.handed == ("out",)
