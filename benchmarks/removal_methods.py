"""The ways of removing experts that `benchmarks.expert_removal` compares: lists of passes by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Steps = list[dict[str, Any]]
"""Passes, each as {name: options}; `seed` beside a name is of the compilation, and `keep` is filled in."""

STARTS = ["frequency", "soft_frequency", "ean", "weighted_ean", "reap", "naee"]

FEW = {"tokens": 4096, "initial": 12, "groups": 0, "start": STARTS, "rates": {"row": 0.05}}
"""The published search with a matrix a layer, from the choices of criteria: some hundred candidates on few tokens."""

ON = {"tokens": 32768, "window": 256, "questions": 256, "groups": 0, "initial": 1}
CLIMB = {**ON, "start": STARTS, "climb": 400, "prune_steps": 0, "merge_steps": 0}
"""A climb in place of the evolution of pruned models. On 2048 tokens, most of what it gains is gone on other text."""

EVERYWHERE = {**CLIMB, "budget": "global", "climb": 500}
NEAR = {"deviation": 0.02, "element": 0.1, "crossover": 0.1, "mutation_points": 0.1, "crossover_points": 0.1}
"""Rates of small steps from the best few candidates."""
TUNED = {"steps": 300, "what": ["router", "norm"], "windows": 16, "rate": 0.002}
TAUGHT = {**TUNED, "loss": "text"}
REFINE = {"steps": 300, "rate": 0.01, "tokens": 8192}
DOMAIN = {"fitness": "perplexity"}
"""What is wanted of a model for one domain is that it predicts it, not that it is what it was."""
ONE = {**ON, "top_k": 1}


def _eep(base: dict[str, Any], phase: str, **options: Any) -> Steps:
    return [{"eep": {**base, "phase": phase, **options}}]


METHODS: dict[str, Steps] = {
    **{f"random, seed {seed}": [{"remove_experts": {"criterion": "random"}, "seed": seed}] for seed in range(3)},
    **{
        name: [{"remove_experts": {"criterion": name}}]
        for name in ("router_norm", "frequency", "soft_frequency", "weighted_frequency", "ean", "weighted_ean", "reap", "stun", "naee")
    },
    "reap, global": [{"remove_experts": {"criterion": "reap", "budget": "global"}}],
    "weighted_ean, global": [{"remove_experts": {"criterion": "weighted_ean", "budget": "global"}}],
    "naee, moe_i2": [{"remove_experts": {"criterion": "naee", "budget": "moe_i2"}}],
    "hc_smoe": [{"merge_experts": {"method": "hc_smoe"}}],
    "m_smoe": [{"merge_experts": {"method": "m_smoe"}}],
    "m_smoe, global": [{"merge_experts": {"method": "m_smoe", "budget": "global"}}],
    "eep prune, 4 groups": [{"eep": {"phase": "prune", "tokens": 4096, "initial": 30, "prune_steps": 100}}],
    "eep prune, published": _eep(FEW, "prune", prune_steps=120),
    "eep prune+merge, published": _eep(FEW, "both", prune_steps=120, merge_steps=300),
    "eep prune": _eep(CLIMB, "prune"),
    "eep prune+merge": _eep(CLIMB, "both", merge_steps=300, rates=NEAR),
    "eep prune+refine": _eep(CLIMB, "both", refine=REFINE),
    "eep prune, global": _eep(EVERYWHERE, "prune"),
    "eep prune+merge, global": _eep(EVERYWHERE, "both", merge_steps=300, rates=NEAR),
    "eep prune+refine, global": _eep(EVERYWHERE, "both", refine=REFINE),
    "eep prune, global, tuned": [*_eep(EVERYWHERE, "prune"), {"tune_routers": TUNED}],
    "eep prune+refine, global, tuned": [*_eep(EVERYWHERE, "both", refine=REFINE), {"tune_routers": TUNED}],
    "eep perplexity prune": _eep(CLIMB, "prune", **DOMAIN),
    "eep perplexity prune+refine": _eep(CLIMB, "both", refine=REFINE, **DOMAIN),
    "eep perplexity prune, global": _eep(EVERYWHERE, "prune", **DOMAIN),
    "eep perplexity prune, global, tuned": [*_eep(EVERYWHERE, "prune", **DOMAIN), {"tune_routers": TAUGHT}],
    "eep perplexity prune, global, tuned by kl": [*_eep(EVERYWHERE, "prune", **DOMAIN), {"tune_routers": TUNED}],
    "eep perplexity prune, tuned": [*_eep(CLIMB, "prune", **DOMAIN), {"tune_routers": TAUGHT}],
    "eep prune, tuned": [*_eep(CLIMB, "prune"), {"tune_routers": TUNED}],
    "weighted_ean, tuned": [{"remove_experts": {"criterion": "weighted_ean"}}, {"tune_routers": TUNED}],
    "naee, tuned": [{"remove_experts": {"criterion": "naee"}}, {"tune_routers": TUNED}],
    "eep perplexity prune+refine, global, tuned": [
        *_eep(EVERYWHERE, "both", refine=REFINE, **DOMAIN),
        {"tune_routers": TAUGHT},
    ],
    "eep perplexity prune+merge, global": _eep(EVERYWHERE, "both", merge_steps=300, rates=NEAR, **DOMAIN),
    "eep perplexity prune+refine, global": _eep(EVERYWHERE, "both", refine=REFINE, **DOMAIN),
    **{
        f"eep{kind} prune+refine, global, rate {rate}": _eep(EVERYWHERE, "both", refine={**REFINE, "rate": rate}, **given)
        for kind, given in (("", {}), (" perplexity", DOMAIN))
        for rate in (0.003, 0.03)
    },
    "eep task prune": _eep(CLIMB, "prune", fitness="task", climb=800),
    "eep task prune+merge": _eep(CLIMB, "both", fitness="task", climb=800, merge_steps=300, rates=NEAR),
    "eep task prune+refine": _eep(CLIMB, "both", fitness="task", climb=800, refine=REFINE),
    "eep task prune, global": _eep(EVERYWHERE, "prune", fitness="task", climb=800),
    "eep task prune+refine, global": _eep(EVERYWHERE, "both", fitness="task", climb=800, refine=REFINE),
    "top_k 1": [{"top_k": {"k": 1}}],
    "eep top_k 1": _eep(ONE, "merge", merge_steps=300, rates=NEAR),
    "eep top_k 1, refined": _eep(ONE, "merge", merge_steps=0, refine={**REFINE, "steps": 600}),
    "eep task top_k 1, refined": _eep(ONE, "merge", merge_steps=0, fitness="task", refine={**REFINE, "steps": 600}),
}


_CRITERIA = ["frequency", "reap", "naee", "weighted_ean", "weighted_ean, global"]
SETS: dict[str, list[str]] = {
    "mixed": [
        *_CRITERIA,
        *("eep prune", "eep prune+merge", "eep prune+refine", "eep prune, tuned", "naee, tuned", "weighted_ean, tuned"),
        *("eep prune, global", "eep prune+merge, global", "eep prune+refine, global", "eep prune, global, tuned"),
        "eep prune+refine, global, tuned",
    ],
    "single": [
        *_CRITERIA,
        *("eep perplexity prune", "eep perplexity prune+refine", "eep perplexity prune, tuned"),
        *("eep perplexity prune, global", "eep perplexity prune+refine, global", "eep perplexity prune+refine, global, rate 0.003"),
        *("eep perplexity prune, global, tuned", "eep perplexity prune, global, tuned by kl"),
        *("eep perplexity prune+refine, global, tuned",),
    ],
    "task": [
        *_CRITERIA,
        *("eep task prune", "eep task prune+merge", "eep task prune+refine", "eep task prune, global", "eep task prune+refine, global"),
    ],
    "one active": ["top_k 1", "eep top_k 1", "eep top_k 1, refined", "eep task top_k 1, refined"],
}
"""Names for methods that are compared with each other."""

CLIMB_FACTS = {"climb": 0, "budget": "per_layer", "fitness": "kl", "tokens": 0, "top_k": None}
"""Options that tell climbs from each other."""


def chains(methods: Sequence[str]) -> list[list[str]]:
    """Methods that share a climb together, in order; every other one by itself.

    >>> chains(["naee", "eep prune", "eep prune+merge", "reap"])
    [['naee'], ['eep prune', 'eep prune+merge'], ['reap']]
    """
    found: dict[str, list[str]] = {}
    for name in methods:
        options = METHODS[name][0].get("eep", {})
        climb = {k: options.get(k, default) for k, default in CLIMB_FACTS.items()} if options.get("climb") else name
        found.setdefault(json.dumps(climb), []).append(name)
    return list(found.values())
