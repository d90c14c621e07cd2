"""M-SMoE: every expert joins the much-used expert whose router logits are most like its own (https://arxiv.org/abs/2310.01334).

The most used experts of a layer lead the groups. How alike two experts are is the cosine of their logits over all tokens. Before they
are averaged, the neurons of each member are matched with the leader's (the pass does that).
"""

from __future__ import annotations

from moec.passes.criteria import View, best

NEEDS = ("statistics",)
ALIGN = True


def group(view: View, keep: int) -> list[list[int]]:
    """The groups, each with its leader first."""
    known = view.statistics
    leaders = best(known.count.double(), keep)
    length = known.logit_moment.diagonal().clamp_min(1e-30).sqrt()
    alike = known.logit_moment / (length[:, None] * length)  # [E, E]
    nearest = alike[:, leaders].argmax(1).tolist()
    groups = [[leader] for leader in leaders]
    for expert in sorted(set(range(view.layer.count)) - set(leaders)):
        groups[nearest[expert]].append(expert)
    return groups
