"""The KL divergence itself: each unit is put into each format, and the rest of the model is run.

    damage = mean over tokens of KL(reference || reference with this one unit quantised), nats

Exact for one unit at a time (what units do together is still added up, and so is what the two uses of a tied matrix do). Each evaluation
starts at the unit's layer from kept values, so the cost is U x O half forward passes over `tokens` tokens: minutes for hundreds of units,
not for tens of thousands. Any matrix is measured alike, so that all may share one budget.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moec.compiler.allocation import Problem
from moec.compiler.calibration.collect import batches_of
from moec.compiler.change import Change
from moec.compiler.gradients import Tape
from moec.compiler.probe import probe
from moec.compiler.roles import KINDS as EVERY

KINDS = EVERY


def damages(problem: Problem, *, tokens: int = 2048) -> Tensor:
    """See the module.

    Args:
        tokens: about how many tokens of the calibration text to use.
    """
    text = problem.text.first(max(1, tokens // problem.text.ids.shape[1]))
    smaller = replace(problem, context=replace(problem.context, text=text))
    batches, nodes = batches_of(text), {name for unit in problem.units for name in unit.uses}
    run = Tape(problem.model.graph, problem.model.weights, cuts=nodes, keep=True)
    states = run.forward(batches)
    after = {segment.nodes[-1].name: at + 1 for at, segment in enumerate(run.segments)}
    truth = [logits.double().log_softmax(-1) for logits in run.rest(batches, states[-1], len(states) - 1)]
    rows = [batch["ids"].numel() for batch in batches]

    def score(change: Change) -> float:
        if change.reached.logits is not None:
            logp, other = change.reached.logits.double(), (change.reached.logits + change.delta).double().log_softmax(-1)
            logp = logp.log_softmax(-1)
            return float((logp.exp() * (logp - other)).sum()) / sum(rows)
        at = after[change.node]
        name = run.segments[at - 1].nodes[-1].outputs[0].name
        whole = torch.zeros(sum(rows), change.delta.shape[-1], device=change.delta.device).index_add_(0, change.reached.token, change.delta)
        changed = [
            {**state, name: state[name] + delta.view_as(state[name])} for state, delta in zip(states[at], whole.split(rows), strict=True)
        ]
        total = 0.0
        for logits, expected in zip(run.rest(batches, changed, at), truth, strict=True):
            total += float((expected.exp() * (expected - logits.double().log_softmax(-1))).sum())
        return total / sum(rows)

    return probe(smaller, score)
