"""Gradient descent on the matrices that a search found: an addition of ours to https://arxiv.org/abs/2407.00945, which uses no gradients.

    loss(merge, route) = mean over a few windows, new ones each step, of what the fitness measures:
        kl           KL(model before || candidate)
        perplexity   negative log-likelihood of the text
        task         negative log-likelihood of the answers

The E' x E numbers of a merging and of a routing matrix enter everything smoothly, but for which experts a token gets: that choice is a
constant of each step, as in `moec.compiler.gradients`. Sums of experts that were trained apart are noise at first, and scores are not: the
merging matrices move in smaller steps. Adam (https://arxiv.org/abs/1412.6980), whose step size falls to nothing along a
cosine. Some times on the way the matrices are measured as the search measures candidates; the best are the result, the first ones included.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moec.compiler.errors import MoecError
from moec.compiler.progress import Progress
from moec.passes.evolution.genes import Candidate

MEASURED = 8
"""So many times the matrices are measured, and kept where the search is."""


@dataclass(frozen=True)
class Refine:
    """How to descend; without steps, not at all.

    Args:
        steps: of Adam.
        rate: the step size at the start, in units of the matrices' entries.
        merging: the merging matrices' step size, as a share of that.
        tokens: of text, or of questions and answers, in a step.
    """

    steps: int = 0
    rate: float = 0.01
    merging: float = 0.1
    tokens: int = 4096

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rate <= 0 or self.merging < 0 or self.tokens < 1:
            raise MoecError("eep: refine: steps and merging must be at least 0, the rate above 0, and tokens at least 1")


Loss = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], Tensor]
"""Of the merging and the routing matrices, a pair a group, on some rows (int64) of what is learned from."""


@dataclass
class Descent:
    """A descent from a candidate.

    Args:
        loss: what to lessen.
        rows: so many rows there are to learn from, `size` of which are a step's.
        worth: the fitness of a candidate.
        keep_in: where to keep how far it is; None keeps nothing.
        identity: tells this descent from others in the file.
    """

    loss: Loss
    rows: int
    size: int
    worth: Callable[[Candidate], float]
    options: Refine
    seed: int = 0
    keep_in: Path | None = None
    identity: str = ""
    losses: list[float] = field(default_factory=list)

    def run(self, start: Candidate, progress: Progress) -> Candidate:
        """The best candidate on the way from `start`, whose fitness is known."""
        half, steps = len(start.merge), self.options.steps
        leaves = [torch.from_numpy(m.copy()).to(torch.get_default_device()).requires_grad_() for m in (*start.merge, *start.route)]
        rates = [(leaves[:half], self.options.rate * self.options.merging), (leaves[half:], self.options.rate)]
        optimiser = torch.optim.Adam([{"params": part, "lr": rate} for part, rate in rates], betas=(0.9, 0.95))
        best = self._restore(leaves, optimiser, start)
        every = max(1, -(-steps // MEASURED))
        order = self._order()
        with progress.counter("refine experts") as count:
            for step in range(len(self.losses), steps):
                for group, (_, rate) in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                optimiser.zero_grad()
                value = self.loss(leaves[:half], leaves[half:], order[step * self.size : (step + 1) * self.size])
                value.backward()
                optimiser.step()
                self.losses.append(float(value.detach()))
                if (step + 1) % every == 0 or step + 1 == steps:
                    matrices = [leaf.detach().cpu().numpy().copy() for leaf in leaves]
                    now = Candidate(tuple(matrices[:half]), tuple(matrices[half:]))
                    now = replace(now, fitness=self.worth(now))
                    best = max(best, now, key=lambda c: c.fitness)
                    self._save(leaves, optimiser, best)
                count(step + 1, steps)
        return best

    def _order(self) -> Tensor:
        """Rows in the order in which they are learned from, all of them before any comes again."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        epochs = -(-self.options.steps * self.size // self.rows)
        return torch.cat([torch.randperm(self.rows, generator=generator, device="cpu") for _ in range(epochs)])

    def _save(self, leaves: Sequence[Tensor], optimiser: torch.optim.Adam, best: Candidate) -> None:
        if self.keep_in is None:
            return
        tensors = {f"best.{i}": torch.from_numpy(m) for i, m in enumerate((*best.merge, *best.route))}
        for i, leaf in enumerate(leaves):
            state = optimiser.state[leaf]
            parts = {"now": leaf.detach(), "mean": state["exp_avg"], "square": state["exp_avg_sq"]}
            tensors |= {f"{name}.{i}": value.cpu().clone() for name, value in parts.items()}
        facts = {"identity": self.identity, "losses": self.losses, "fitness": best.fitness}
        part = self.keep_in.with_name(self.keep_in.name + ".part")
        try:
            save_file({n: t.contiguous().clone() for n, t in tensors.items()}, part, metadata={"moec": json.dumps(facts)})
            part.replace(self.keep_in)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise MoecError(f"cannot keep the search in {self.keep_in}: {error}") from error

    @torch.no_grad()
    def _restore(self, leaves: Sequence[Tensor], optimiser: torch.optim.Adam, start: Candidate) -> Candidate:
        """Take up an interrupted descent of the same start, if there is one; the best candidate so far."""
        if self.keep_in is None or not self.keep_in.exists():
            return start
        try:
            with safe_open(self.keep_in, framework="pt") as file:
                facts = json.loads(file.metadata()["moec"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            if facts["identity"] != self.identity:
                return start
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise MoecError(f"{self.keep_in}: not what a search keeps ({error}); remove the file to search anew") from error
        self.losses[:] = facts["losses"]
        for i, leaf in enumerate(leaves):
            leaf.copy_(tensors[f"now.{i}"])
            step = torch.tensor(float(len(self.losses)), device="cpu")
            mean, square = (tensors[f"{name}.{i}"].to(leaf.device) for name in ("mean", "square"))
            optimiser.state[leaf] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        matrices = [tensors[f"best.{i}"].cpu().numpy() for i in range(len(leaves))]
        half = len(start.merge)
        return Candidate(tuple(matrices[:half]), tuple(matrices[half:]), float(facts["fitness"]))
