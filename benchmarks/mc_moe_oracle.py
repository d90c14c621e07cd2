"""Does our solver choose the bit-widths that MC-MoE's authors published, from the factors that they published?

    python -m benchmarks.mc_moe_oracle FACTORS.json

The file has `act_frequency` and `act_weight` (layer -> one number an expert), `quant_loss` (layer -> expert -> bits -> number) and
`published_bits_<n>bit` (layer -> expert -> bits) for budgets of n bits a layer, as released with https://arxiv.org/abs/2410.06270 for
Mixtral-8x7B. A layer agrees if the bits are the same, or if they are not and cost exactly as much (a tie, counted apart).
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from moec.compiler.sensitivity.mc_moe import significance, widest
from moec.compiler.solver import choose

BITS = (1, 2, 3)


def layer_agrees(factors: dict[str, Any], layer: str, budget: int, gamma: float) -> str:
    """`same`, `tie` or `other`: our bits of a layer against the published ones."""
    published = factors[f"published_bits_{budget}bit"][layer]
    experts = sorted(published, key=int)
    loss = [[factors["quant_loss"][layer][e][str(b)] for b in BITS] for e in experts]
    damage = significance(factors["act_frequency"][layer], factors["act_weight"][layer], loss, gamma=gamma)
    size = np.tile(BITS, (len(experts), 1))
    found = choose(damage, size, budget, widest(size, range(len(experts))))
    theirs = [BITS.index(int(published[e])) for e in experts]
    if list(found.options) == theirs:
        return "same"
    cost = float(damage[range(len(experts)), theirs].sum())
    return "tie" if np.isclose(cost, found.damage, rtol=1e-9) and sum(BITS[o] for o in theirs) <= budget else "other"


def main() -> None:
    """Print a line a budget."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--gamma", type=float, default=1.0, help="exponent of the error; the paper's text says 2")
    options = parser.parse_args()
    factors = json.loads(options.file.read_text())
    budgets = sorted(int(m[1]) for key in factors if (m := re.fullmatch(r"published_bits_(\d+)bit", key)))
    for budget in budgets:
        layers = list(factors[f"published_bits_{budget}bit"])
        found = Counter(layer_agrees(factors, layer, budget, options.gamma) for layer in layers)
        print(f"{budget} bits a layer: {found['same']} of {len(layers)} layers the same, {found['tie']} ties, {found['other']} other")


if __name__ == "__main__":
    main()
